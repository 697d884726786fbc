"""Search without gradients on the two toy problems of the golden search data, and what its predictor saves.

    python benchmarks/s3_search.py ORACLES [--nfe 4 5 6 8 10] [--problems ...] [--budget 400] [--seeds 0]
    python benchmarks/s3_search.py ORACLES --compare [--plain-budget 800] [--seeds 0 1 2]

ORACLES is the folder with search.json, search.safetensors and toy.safetensors. A search sees the 256 training
starts, and its best candidate there is the result; the table's medians are over the 512 test
starts. The bar is the best known solver over all grids,
stored with the problem (tuned on the test starts, so slightly too good).

``--compare`` runs plain evolution and a search with a predictor from the same kind of first round, and prints
at which number of evaluated schedules, and of samples put through the network, the latter is as good on all
training starts as plain evolution is at its end. One thread, float64.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from thalweg.diffusion.s3.evolution import Evolution, EvolutionConfig
from thalweg.diffusion.s3.guide import Train, predictor_train
from thalweg.diffusion.s3.objective import TeacherError
from thalweg.diffusion.s3.pool import InlinePool
from thalweg.diffusion.s3.predictor import FitConfig
from thalweg.diffusion.s3.process import process_train
from thalweg.diffusion.s3.search import Progress, run_search
from thalweg.diffusion.s3.seeds import grid_seeds
from thalweg.diffusion.s3.space import SearchSpace
from thalweg.diffusion.schedules import NoiseSchedule
from thalweg.diffusion.toy import GaussianMixture

FIRST = {"num_random": 16, "num_seeds": 64, "parents": 16}
GUIDED = EvolutionConfig(**FIRST, batch=16, guided_generations=8, explore=0.25)
PLAIN = EvolutionConfig(**FIRST, batch=16)
PREDICTORS: dict[str, Train] = {
    "process": process_train(),
    "ensemble": predictor_train(FitConfig(members=3, steps=100, batch=128, threshold=0.25), worst=0.75),
}


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A toy problem at a number of evaluations."""

    space: SearchSpace
    train: TeacherError
    test: TeacherError
    bar: float


def load(folder: Path, name: str, nfe: int) -> Problem:
    """A stored problem."""
    values = json.loads((folder / "search.json").read_text())["problems"][name]
    arrays, toy = load_file(folder / "search.safetensors"), load_file(folder / "toy.safetensors")
    names = ("weights", "means", "covariances")
    exact = GaussianMixture.from_dict({n: toy[f"mix.{values['mixture']}.{n}"] for n in names})
    noise = NoiseSchedule.from_dict(values["schedule"])
    train, test = (
        TeacherError(lambda x, node: exact.data(x, node.alpha, node.sigma), arrays[x_T], arrays[target])
        for x_T, target in (values["train"], values["test"])
    )
    flow = ("velocity",) if noise.kind == "flow" else ()
    space = SearchSpace(
        noise=noise, nfe=nfe, predictions=("noise", "data", *flow), t_end=(1e-3, 0.2), free_weights=0.5
    )
    return Problem(space=space, train=train, test=test, bar=values["nfe"][str(nfe)]["bar"]["beat_baseline"])


def search(
    problem: Problem, config: EvolutionConfig, train: Train | None, budget: int, goal: float = 0.0
) -> tuple[Evolution, Progress | None, float]:
    """A search; where it first reached the goal on all training starts; seconds."""
    begun = time.perf_counter()
    evolution = Evolution(problem.space, config, train, seeds=grid_seeds(problem.space, ("dmn",))[:8])
    reached: list[Progress] = []
    full = len(problem.train)

    def report(progress: Progress) -> None:
        if not reached and evolution.best()[0][1].count == full and progress.best <= goal:
            reached.append(progress)

    run_search(evolution, InlinePool(problem.train), budget, report=report)
    return evolution, reached[0] if reached else None, time.perf_counter() - begun


def table(options: argparse.Namespace) -> None:
    """Searches against the best known solver."""
    print("       problem nfe seed     bar   train    test  ratio schedules  network evaluations  seconds")
    for name, nfe, seed in product(options.problems, options.nfe, options.seeds):
        problem = load(options.oracles, name, nfe)
        config = replace(GUIDED, seed=seed, counts=tuple(options.counts))
        evolution, _, seconds = search(problem, config, PREDICTORS[options.predictor], options.budget)
        ((genes, score),) = evolution.best()
        found = problem.test(problem.space.schedule(genes)).value
        row = f"{name:>14} {nfe:3d} {seed:4d} {problem.bar:7.4f} {score.value:7.4f} {found:7.4f}"
        spent = f"{len(evolution.scores):9d} {evolution.network_evaluations:20,d} {seconds:8.1f}"
        print(f"{row} {found / problem.bar:6.3f} {spent}", flush=True)


def compare(options: argparse.Namespace) -> None:
    """Plain evolution against a search with a predictor."""
    print("       problem nfe seed   plain schedules seconds  guided reaches  part network part seconds tau")
    for name, nfe in product(options.problems, options.nfe):
        parts: list[tuple[float, float]] = []
        for seed in options.seeds:
            problem = load(options.oracles, name, nfe)
            plain, _, took = search(problem, replace(PLAIN, seed=seed), None, options.plain_budget)
            goal = plain.best()[0][1].value
            config = replace(GUIDED, seed=seed, counts=tuple(options.counts))
            train = PREDICTORS[options.predictor]
            guided, reached, seconds = search(problem, config, train, options.budget, goal)
            parts.append(parts_of(plain, reached))
            at = str(reached.evaluated) if reached else f"not in {len(guided.scores)}"
            taus = [tau for tau in guided.taus if tau is not None]
            print(
                f"{name:>14} {nfe:3d} {seed:4d} {goal:7.4f} {len(plain.scores):9d} {took:7.1f} {at:>20} "
                f"{parts[-1][0]:5.2f} {parts[-1][1]:12.2f} {seconds:7.1f} {statistics.mean(taus):5.2f}",
                flush=True,
            )
        middle = [statistics.median(column) for column in zip(*parts, strict=True)]
        print(f"{name:>14} {nfe:3d}  median part of schedules {middle[0]:.2f}, of network {middle[1]:.2f}")


def parts_of(plain: Evolution, reached: Any) -> tuple[float, float]:
    """What reaching the goal took, as parts of what plain evolution took."""
    if reached is None:
        return float("inf"), float("inf")
    whole = plain.network_evaluations
    return reached.evaluated / len(plain.scores), reached.network_evaluations / whole


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("oracles", type=Path)
    parser.add_argument("--nfe", type=int, nargs="+", default=[4, 5, 6, 8, 10])
    parser.add_argument("--problems", nargs="+", default=["gm16_vp_linear", "gm16_flow"])
    parser.add_argument("--budget", type=int, default=400)
    parser.add_argument("--plain-budget", type=int, default=800)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--counts", type=int, nargs="*", default=[])
    parser.add_argument("--predictor", choices=tuple(PREDICTORS), default="process")
    parser.add_argument("--compare", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    (compare if options.compare else table)(options)


if __name__ == "__main__":
    main()
