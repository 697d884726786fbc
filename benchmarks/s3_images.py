"""Searched schedules against every scheduler of diffusers, on one pipeline, with the same noises and classes.

    python benchmarks/s3_images.py PIPELINE SCHEDULER --nfe 5 6 8 10 --samples 1000 --seeds 0 1 2

PIPELINE is the folder of a DDPMPipeline or a ClassImagePipeline, SCHEDULER the one of ``thalweg search`` or
``thalweg refine``. Each class of diffusers is represented by two of its variants (order, grid, end), chosen
on noises of their own, as ours were: that with the least error, and that with the least FD among the best by
error. Then everything draws from the same fresh noises, and there are three numbers, each with its mean over
the seeds and the deviation between them:

- error: median distance (L2 of pixels in [-1, 1]) to the end of a teacher of 60 evaluations;
- clean: the same to the teacher's data prediction at its end, since the end keeps a trace of noise;
- FD: Frechet distance to the real images in the features of a classifier.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thalweg.diffusion.from_diffusers import network_of
from thalweg.diffusion.library import LibraryScheduler, library_schedulers, sample_with
from thalweg.diffusion.s3.compare import ends, ranked
from thalweg.diffusion.s3.image_model import TEACHER_END
from thalweg.diffusion.s3.objectives import teacher as teacher_objective
from thalweg.diffusion.s3.samplers import SampleObjective
from thalweg.diffusion.solvers.schedule import Node
from thalweg.diffusion.solvers.scheduler import SearchedScheduler

FRESH = 10_000
"""Added to the seeds, so that no search has seen the noises."""
OURS, TEACHER = "searched (ours)", "teacher"
NUMBERS = ("error", "clean", "FD")


def objective_of(arguments: argparse.Namespace, count: int, seed: int) -> SampleObjective:
    """The distance to the teacher on some noises."""
    options = {"guidance_scale": arguments.guidance_scale, "batch": arguments.batch}
    return teacher_objective("cpu", arguments.pipeline, count=count, seed=seed, **options)


class Judge:
    """The three numbers of end states, for the noises of one seed.

    Args:
        arguments: Of the command line.
        seed: Of the noises.
        features: Maps images from 0 to 1 to features, and the statistics of real ones; None for no FD.
    """

    def __init__(self, arguments: argparse.Namespace, seed: int, features: Any) -> None:
        self.objective = objective_of(arguments, arguments.samples, FRESH + seed)
        self.sampler: Any = self.objective.sampler
        self.denoiser = self.sampler.denoiser
        self.seed, self.features = seed, features
        noise, _ = network_of(self.denoiser.pipeline.scheduler.config)
        t = TEACHER_END
        node = Node(alpha=float(noise.alpha(t)), sigma=float(noise.sigma(t)), label=float(noise.label(t)))
        batch = arguments.batch
        parts = [slice(i, i + batch) for i in range(0, len(self.objective), batch)]
        with torch.no_grad():
            clean = [self.denoiser.on(rows)(self.objective.target[rows], node) for rows in parts]
        self.clean = torch.cat(clean)

    def __call__(self, end: Tensor) -> dict[str, float]:
        """Error, clean and FD."""
        targets = {"error": self.objective.target, "clean": self.clean}
        found = {
            name: float((end - target).flatten(1).norm(dim=1).median()) for name, target in targets.items()
        }
        return {**found, "FD": self.features(end) if self.features else float("nan")}


def features_of(arguments: argparse.Namespace, size: int, channels: int) -> Any:
    """The Frechet distance of end states to real images, as a function."""
    from thalweg.diffusion.metrics.distance import frechet, gaussian
    from thalweg.diffusion.metrics.features import embed, extractor
    from thalweg.diffusion.metrics.quality import real_images

    network = extractor(arguments.features, images=arguments.images, size=size, channels=channels)
    real, _ = real_images(arguments.images, size=size, channels=channels)
    truth = gaussian(embed(network, real))
    print(f"features: {network.name}; {len(real)} real images of {arguments.images}")

    def distance(end_BCHW: Tensor) -> float:
        pixels = ((end_BCHW / 2 + 0.5).clamp(0, 1) * 255).round().byte()
        return frechet(gaussian(embed(network, pixels)), truth)

    return distance


def chosen(
    arguments: argparse.Namespace, few: SampleObjective, features: Any, nfe: int
) -> list[LibraryScheduler]:
    """The best variants of each class, by error and by FD, on noises of their own."""
    found = []
    for entries in ranked(few, nfe, screen=arguments.screen).values():
        names = {entries[0].name: entries[0]}
        if features is not None:
            some = [(ends(e, few, nfe), e) for e in entries[: arguments.finalists]]
            best = min((features(end), i) for i, (end, _) in enumerate(some) if end is not None)[1]
            names[some[best][1].name] = some[best][1]
        found += names.values()
    return found


def rows_of(
    arguments: argparse.Namespace,
    judges: list[Judge],
    few: SampleObjective,
    ours: SearchedScheduler,
    nfe: int,
    known: dict[str, list[dict[str, float]]],
) -> dict[str, list[dict[str, float]]]:
    """Numbers of ours and of the chosen variants of each class, by name, one entry per seed.

    Those of the library that are known are not measured again.
    """
    batch = arguments.batch
    rivals = chosen(arguments, few, judges[0].features, nfe)
    table: dict[str, list[dict[str, float]]] = {}
    for judge in judges:
        starts = judge.sampler.x_T
        parts = [slice(i, i + batch) for i in range(0, len(starts), batch)]
        labels = judge.denoiser.labels
        if nfe in ours.schedules:
            network = judge.denoiser.network
            some = [None if labels is None else labels[rows] for rows in parts]
            pairs = zip(parts, some, strict=True)
            drawn = [sample_with(ours, network, starts[rows], part, nfe) for rows, part in pairs]
            table.setdefault(OURS, []).append(judge(torch.cat(drawn)))
        for entry in rivals:
            if entry.name in known:
                table[entry.name] = known[entry.name]
                continue
            end = ends(entry, judge.objective, nfe, seed=judge.seed)
            if end is None:
                print(f"left out: {entry.name}", file=sys.stderr)
                continue
            table.setdefault(entry.name, []).append(judge(end))
    return {name: numbers for name, numbers in table.items() if len(numbers) == len(judges)}


def earlier(arguments: argparse.Namespace) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Numbers that the file holds, by number of evaluations and name.

    Raises:
        ValueError: If they were made in another way.
    """
    if not (arguments.json and Path(arguments.json).is_file()):
        return {}
    report = json.loads(Path(arguments.json).read_text())
    for name in ("pipeline", "samples", "seeds", "guidance_scale", "images", "features"):
        if report["arguments"][name] != getattr(arguments, name):
            raise ValueError(f"{arguments.json} was made with {name} {report['arguments'][name]}")
    return report["numbers"]


def show(nfe: int, table: dict[str, list[dict[str, float]]], teacher: list[dict[str, float]]) -> None:
    """Print the table of one number of evaluations, and the ratio of ours to the best of the others."""
    mean = {
        name: {key: statistics.fmean(n[key] for n in numbers) for key in NUMBERS}
        for name, numbers in [*table.items(), (TEACHER, teacher)]
    }
    print(f"\n{nfe} evaluations\n{'':60}" + "".join(f"{key:>20}" for key in NUMBERS))
    for name in [*sorted(table, key=lambda name: mean[name]["error"]), TEACHER]:
        numbers = table.get(name, teacher)
        spread = {key: statistics.pstdev(n[key] for n in numbers) for key in NUMBERS}
        cells = "".join(f"{mean[name][key]:12.4f} ±{spread[key]:6.4f}" for key in NUMBERS)
        print(f"{name:60}{cells}")
    if OURS in table and len(table) > 1:
        for key in NUMBERS:
            best = min((name for name in table if name != OURS), key=lambda name: mean[name][key])
            print(f"{key}: ours / best = {mean[OURS][key] / mean[best][key]:.3f} ({best})")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("pipeline")
    parser.add_argument("scheduler")
    parser.add_argument("--nfe", type=int, nargs="+", default=[5, 6, 8, 10])
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--screen", type=int, default=8, help="noises on which variants are compared")
    parser.add_argument("--finalists", type=int, default=8, help="variants of a class compared by FD")
    parser.add_argument("--screen-fd", type=int, default=64, help="noises on which those are compared")
    parser.add_argument("--guidance-scale", type=float, default=1.0)
    parser.add_argument("--images", default="mnist5k", help="real images, for FD; none for no FD")
    parser.add_argument("--features", default="classifier")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--json", help="file for all numbers; those of the library in it are not made again")
    arguments = parser.parse_args(argv)
    ours = SearchedScheduler.from_pretrained(arguments.scheduler)
    start = time.perf_counter()
    judges = [Judge(arguments, seed, None) for seed in arguments.seeds]
    pipeline = judges[0].denoiser.pipeline
    if arguments.images != "none":
        config = pipeline.unet.config
        features = features_of(arguments, config.sample_size, config.in_channels)
        for judge in judges:
            judge.features = features
    count = len(library_schedulers(pipeline.scheduler.config))
    print(f"{arguments.samples} samples, seeds {arguments.seeds}, {count} variants in the library")
    teacher = [judge(judge.clean) for judge in judges]
    found: dict[str, Any] = {}
    few = objective_of(arguments, max(arguments.screen, arguments.screen_fd), FRESH - 1)
    known = earlier(arguments)
    for nfe in arguments.nfe:
        found[str(nfe)] = rows_of(arguments, judges, few, ours, nfe, known.get(str(nfe), {}))
        show(nfe, found[str(nfe)], teacher)
        if arguments.json:
            numbers = {**known, **found}
            report = {"arguments": vars(arguments), "teacher": teacher, "numbers": numbers}
            Path(arguments.json).write_text(json.dumps(report, indent=1) + "\n")
    print(f"\n{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
