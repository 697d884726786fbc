"""How well the predictor ranks schedules that it has not seen, and what it costs.

    python benchmarks/s3_predictor.py ORACLES [--count 400] [--seed 0 1 2]

ORACLES is a folder with toy.safetensors, search.json and search.safetensors. Random multistep schedules with
5 to 8 evaluations are run on the 16-dimensional mixture under the linear schedule; their score is the median
distance of 64 training starts from their exact ends. Half of them train the predictor. Prints Kendall's tau
on the other half, over all and as the mean over the numbers of evaluations, for weights alone and with the
decisions as features, and for several seeds of schedules and fit; one thread.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from thalweg.diffusion.s3.predictor import FitConfig, fit_tokens, kendall_tau
from thalweg.diffusion.s3.tokens import token_batch
from thalweg.diffusion.schedules import NoiseSchedule
from thalweg.diffusion.solvers.sample import sample
from thalweg.diffusion.solvers.schedule import Node, SolverSchedule
from thalweg.diffusion.toy import GaussianMixture

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
from random_schedules import random_schedule

PROBLEM, STARTS = "gm16_vp_linear", 64
NFES = (5, 6, 7, 8)
BOOTSTRAPS = 200


def evaluate(folder: Path, count: int, seed: int) -> tuple[list[SolverSchedule], np.ndarray]:
    """Random schedules, and the distances of their results from the exact ends, (count, STARTS)."""
    problem = json.loads((folder / "search.json").read_text())["problems"][PROBLEM]
    arrays, toy = load_file(folder / "search.safetensors"), load_file(folder / "toy.safetensors")
    names = ("weights", "means", "covariances")
    exact = GaussianMixture.from_dict({n: toy[f"mix.{problem['mixture']}.{n}"] for n in names})
    starts, ends = (arrays[name][:STARTS] for name in problem["train"])
    noise = NoiseSchedule.from_dict(problem["schedule"])
    rng = np.random.default_rng(seed)
    schedules = [random_schedule(noise, NFES[i % len(NFES)], rng) for i in range(count)]

    def denoise(x: torch.Tensor, node: Node) -> torch.Tensor:
        return exact.data(x, node.alpha, node.sigma)

    return schedules, np.stack(
        [(sample(s, denoise, starts)[-1] - ends).norm(dim=1).numpy() for s in schedules]
    )


def bootstrap_noise(errors: np.ndarray, seed: int) -> np.ndarray:
    """Standard deviation of the median of each row."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, errors.shape[1], (BOOTSTRAPS, errors.shape[1]))
    return np.std([np.median(errors[:, columns], 1) for columns in drawn], axis=0)


def compare(schedules: list[SolverSchedule], errors: np.ndarray, seed: int) -> None:
    """Fit to the first half and rank the second."""
    scores, noise = np.median(errors, 1), bootstrap_noise(errors, seed)
    half = len(scores) // 2
    evaluations = np.array([s.nfe for s in schedules])[half:]
    for decisions in (False, True):
        begin = time.perf_counter()
        features, mask = token_batch(schedules, decisions=decisions)
        reading = (time.perf_counter() - begin) / len(schedules)
        config = FitConfig(decisions=decisions, seed=seed)
        begin = time.perf_counter()
        ensemble = fit_tokens(features[:half], mask[:half], scores[:half], noise[:half], config)
        fitting = time.perf_counter() - begin
        many = [np.resize(a, (4096, *a.shape[1:])) for a in (features, mask)]
        begin = time.perf_counter()
        ensemble.predict_tokens(*many)
        rate = 4096 / (time.perf_counter() - begin)
        guess, spread = ensemble.predict_tokens(features[half:], mask[half:])
        true = scores[half:]
        within = [kendall_tau(guess[evaluations == n], true[evaluations == n]) for n in NFES]
        off = kendall_tau(spread, np.abs(guess - np.log(true)))
        print(
            f"seed {seed}  {'weights, decisions' if decisions else 'weights':18}"
            f"  tau {kendall_tau(guess, true):.3f}"
            f"  per NFE {np.mean(within):.3f}  spread against error {off:.2f}  fit {fitting:.1f} s"
            f"  read {1e3 * reading:.2f} ms a schedule  predict {rate:.0f} /s",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("oracles", type=Path)
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed in options.seed:
        compare(*evaluate(options.oracles, options.count, seed), seed)


if __name__ == "__main__":
    main()
