"""How far the objectives of a search rank schedules alike, and like a Frechet distance on other noises.

    python benchmarks/s3_objectives.py PIPELINE --nfe 5 --schedules 40 --count 128 --judge 1000

Random schedules and known solvers, half of each, are scored by every objective on ``count`` noises, and by
the Frechet distance to the real images on ``judge`` other noises. Printed is Kendall's rank correlation
(tau-b) of each objective with that distance, for all schedules and for the better half by it; and the
objective's own noise, as its mean standard error over the deviation between schedules.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np
import torch
from scipy.stats import kendalltau
from torch import Tensor

from thalweg.diffusion.s3.image_model import ImageSampler
from thalweg.diffusion.s3.objectives import OBJECTIVES
from thalweg.diffusion.s3.pool import ObjectiveRef
from thalweg.diffusion.s3.space import SearchSpace
from thalweg.diffusion.solvers.schedule import SolverSchedule

OTHER = 20_000


def schedules(noise: Any, nfe: int, count: int) -> list[SolverSchedule]:
    """Known solvers, evenly over all there are, and random candidates."""
    space, rng = SearchSpace(noise=noise, nfe=nfe), np.random.default_rng(0)
    known, half = space.seeds(), count // 2
    genes = [known[i * len(known) // half] for i in range(half)]
    return [space.schedule(g) for g in [*genes, *(space.random(rng) for _ in range(count - half))]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("pipeline")
    parser.add_argument("--nfe", type=int, default=5)
    parser.add_argument("--schedules", type=int, default=40)
    parser.add_argument("--count", type=int, default=128)
    parser.add_argument("--judge", type=int, default=1000)
    parser.add_argument("--images", default="mnist5k")
    parser.add_argument("--out", default=None, help="JSON file")
    arguments = parser.parse_args()
    begun = time.perf_counter()
    common = {"folder": arguments.pipeline, "count": arguments.count}
    real = {**common, "reference": arguments.images}
    options: dict[str, dict[str, Any]] = {
        "teacher": common,
        "multiscale": common,
        "features": {**common, "images": arguments.images},
        "fid": real,
        "kid": real,
        "fid to teacher": {**real, "reference": "teacher", "images": arguments.images},
    }
    sampler = ImageSampler("cpu", arguments.pipeline, arguments.count)
    judges: dict[str, Any] = {
        name: ObjectiveRef(function=OBJECTIVES[name.split()[0]], options=given).make("cpu").judge
        for name, given in options.items()
    }
    truth = ObjectiveRef(
        function=OBJECTIVES["fid"], options={**real, "count": arguments.judge, "seed": OTHER}
    ).make("cpu")
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in judges}
    distances = []
    for schedule in schedules(sampler.noise, arguments.nfe, arguments.schedules):
        states: Tensor = sampler.draw(schedule)  # the same for all objectives
        for name, judge in judges.items():
            score = judge(states)
            found[name].append((score.value, score.noise))
        distances.append(truth(schedule).value)
    report(found, np.array(distances), arguments, time.perf_counter() - begun)


def report(
    found: dict[str, list[tuple[float, float]]],
    distances: np.ndarray,
    arguments: argparse.Namespace,
    seconds: float,
) -> None:
    """Print the table, and write all numbers where that is asked for."""
    better = distances <= np.median(distances)
    print(f"{arguments.schedules} schedules of {arguments.nfe} evaluations, {seconds:.0f} s; tau with the")
    span = f"{distances.min():.3f} to {distances.max():.3f}"
    print(f"Frechet distance of {arguments.judge} other samples ({span})")
    print(f"{'objective':<16}{'all':>8}{'better half':>13}{'noise':>8}")
    for name, pairs in found.items():
        values, noises = np.array(pairs).T
        taus = [kendalltau(values[rows], distances[rows]).statistic for rows in (slice(None), better)]
        print(f"{name:<16}{taus[0]:>8.2f}{taus[1]:>13.2f}{noises.mean() / values.std():>8.2f}")
    if arguments.out:
        with open(arguments.out, "w") as file:
            json.dump({"arguments": vars(arguments), "scores": found, "fid": distances.tolist()}, file)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
