"""Gradient refinement on the two toy problems of the golden search data.

    THALWEG_ORACLES=FOLDER python benchmarks/s3_refine.py [--nfe 4 5 6 8 10] [--iterations 800]

Known multistep solvers are scanned over orders, predictions, grids and last times on the 256 training
starts. A spread of them is refined on 192 of the starts and chosen by the other 64. Medians are over the 512
test starts. The bar is the best known solver over all grids, as stored with the problem; so is the ratio that
a simple refinement reached ("stored"). One thread, float64.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from thalweg.diffusion.s3.descent import Settings
from thalweg.diffusion.s3.examples import Denoiser, Examples, evaluate
from thalweg.diffusion.s3.refine import refine
from thalweg.diffusion.schedules import NoiseSchedule
from thalweg.diffusion.solvers.grids import nodes
from thalweg.diffusion.solvers.named import named
from thalweg.diffusion.solvers.schedule import SolverSchedule
from thalweg.diffusion.toy import GaussianMixture

TRAIN = slice(0, 192)
VALIDATION = slice(192, 256)
GRIDS = ("uniform_t", "quadratic_t", "uniform_lambda", "karras")
ENDS = (1e-3, 1e-2, 3e-2)
STARTS = 10


def denoiser_of(arrays: dict[str, Tensor], name: str) -> Denoiser:
    """Exact denoiser of a golden mixture."""
    names = ("weights", "means", "covariances")
    mixture = GaussianMixture.from_dict({key: arrays[f"mix.{name}.{key}"] for key in names})
    return lambda x, alpha, sigma, label: mixture.data(x, alpha, sigma)


def scan(
    noise: NoiseSchedule, nfe: int, denoiser: Denoiser, train: Examples
) -> list[tuple[float, SolverSchedule]]:
    """Simple multistep schedules with their medians on the training starts, the best first."""
    predictions = ("data", "noise", "velocity") if noise.kind == "flow" else ("data", "noise")
    found = []
    for grid, end, order, prediction in product(GRIDS, ENDS, (1, 2, 3), predictions):
        if prediction == "noise" and noise.kind == "flow":
            continue  # from alpha = 0 noise prediction starts with order 1 of data; the others cover it
        on = nodes(noise, nfe, grid, t_end=end)
        schedule = named("adams", on, order=order, prediction=prediction)
        found.append((evaluate(schedule, denoiser, train), schedule))
    return sorted(found, key=lambda entry: entry[0])


def spread(found: list[tuple[float, SolverSchedule]]) -> list[SolverSchedule]:
    """Starts of a refinement: the best, then every third."""
    return [schedule for _, schedule in found[: 3 * STARTS : 3]]


def run(
    problem: str,
    nfe: int,
    values: dict[str, Any],
    arrays: dict[str, Tensor],
    denoiser: Denoiser,
    settings: Settings,
) -> dict[str, Any]:
    """Medians and costs of one problem at a number of evaluations."""
    noise = NoiseSchedule.from_dict(values["schedule"])
    train, test = (
        Examples(x_T=arrays[f"{problem}.{part}_x_T"], target=arrays[f"{problem}.{part}_exact"])
        for part in ("train", "test")
    )
    begun = time.perf_counter()
    found = scan(noise, nfe, denoiser, train)
    scanned = time.perf_counter() - begun
    refined = refine(
        spread(found),
        denoiser,
        train.pick(TRAIN),
        train.pick(VALIDATION),
        noise_schedule=noise,
        settings=settings,
    )
    bar = values["nfe"][str(nfe)]["bar"]
    median = evaluate(refined.schedule, denoiser, test)
    return {
        "problem": problem,
        "nfe": nfe,
        "bar": bar["beat_baseline"],
        "simple": evaluate(found[0][1], denoiser, test),
        "validation": refined.error,
        "refined": median,
        "ratio": median / bar["beat_baseline"],
        "stored": bar["gradient_reaches"] / bar["beat_baseline"],
        "calls": refined.evaluations + nfe * len(train) * len(found),
        "seconds": scanned + refined.seconds,
    }


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--problem", nargs="+", default=["gm16_vp_linear", "gm16_flow"])
    parser.add_argument("--nfe", type=int, nargs="+", default=[4, 5, 6, 8, 10])
    parser.add_argument("--iterations", type=int, default=Settings().iterations)
    parser.add_argument("--loss", default="l2")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    roots = [Path(__file__).parents[1] / "tests/data/s3", Path(os.environ.get("THALWEG_ORACLES", ".")) / "s3"]
    folder = next((root for root in roots if (root / "search.json").exists()), None)
    if folder is None:
        raise SystemExit("search.json is not there; set THALWEG_ORACLES")
    values = json.loads((folder / "search.json").read_text())["problems"]
    arrays, toy = load_file(folder / "search.safetensors"), load_file(folder / "toy.safetensors")
    settings = Settings(iterations=options.iterations, loss=options.loss, seed=options.seed)
    print(f"{'problem':>15} nfe     bar  simple refined  ratio stored  network evaluations  seconds")
    for problem, nfe in product(options.problem, options.nfe):
        row = run(
            problem, nfe, values[problem], arrays, denoiser_of(toy, values[problem]["mixture"]), settings
        )
        print(
            "{problem:>15} {nfe:3d} {bar:7.4f} {simple:7.4f} {refined:7.4f} {ratio:6.3f} {stored:6.3f} "
            "{calls:20,d} {seconds:8.1f}".format(**row),
            flush=True,
        )


if __name__ == "__main__":
    main()
