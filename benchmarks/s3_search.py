"""Search without gradients on the two toy problems of the golden search data, and what its parts save.

    python benchmarks/s3_search.py ORACLES [--nfe 4 5 6 8 10] [--problems ...] [--fit 100] [--budget 160]
    python benchmarks/s3_search.py ORACLES --compare [--plain-budget 800] [--seeds 0 1 2]

ORACLES is the folder with search.json, search.safetensors and toy.safetensors. A search first evaluates times
whose weights are fitted to a teacher's path (60 evaluations, run once), then, from the best of them,
decisions and weights with a predictor. It sees the 256 training starts, and its best candidate there is the
result; the table's medians are over the 512 test starts, after the first part and at the end. The bar is the
best known solver over all grids, stored with the problem (tuned on the test starts, so slightly too good).

``--compare`` runs plain evolution of decisions and weights from known and random schedules, and prints at
which number of evaluated schedules the same with a predictor is as good, and the whole search; what the
teacher's run costs is counted, in schedules of the same number of evaluations. One thread, float64.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import load_file

from thalweg.diffusion.s3.evolution import Evolution, EvolutionConfig
from thalweg.diffusion.s3.fit import record
from thalweg.diffusion.s3.guide import Train, predictor_train
from thalweg.diffusion.s3.image_model import teacher_schedule
from thalweg.diffusion.s3.objective import TeacherError
from thalweg.diffusion.s3.pool import InlinePool
from thalweg.diffusion.s3.predictor import FitConfig
from thalweg.diffusion.s3.process import process_train
from thalweg.diffusion.s3.search import run_search
from thalweg.diffusion.s3.seeds import grid_seeds
from thalweg.diffusion.s3.space import SearchSpace
from thalweg.diffusion.schedules import NoiseSchedule
from thalweg.diffusion.solvers.linear import Compilable
from thalweg.diffusion.solvers.schedule import Node
from thalweg.diffusion.toy import GaussianMixture

TEACHER_STEPS = 60
TIMES = EvolutionConfig(num_random=8, batch=8, parents=8)
WEIGHTS = EvolutionConfig(
    num_random=4,
    num_seeds=12,
    parents=16,
    batch=16,
    width=0.1,
    min_width=0.005,
    guided_generations=1,
    guided_pool=64,
)
PLAIN = EvolutionConfig(num_random=48, num_seeds=144, parents=16, batch=32)
GUIDED = replace(PLAIN, batch=16, guided_generations=1, guided_pool=64)
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


@dataclass(kw_only=True)
class Trace:
    """What was best after how many schedules."""

    evolution: Evolution
    best: list[tuple[int, float]]
    seconds: float

    def when(self, goal: float) -> int | None:
        """Schedules after which the best was as good as the goal."""
        return next((count for count, value in self.best if value <= goal), None)


def load(folder: Path, name: str, nfe: int) -> Problem:
    """A stored problem."""
    values = json.loads((folder / "search.json").read_text())["problems"][name]
    arrays, toy = load_file(folder / "search.safetensors"), load_file(folder / "toy.safetensors")
    names = ("weights", "means", "covariances")
    exact = GaussianMixture.from_dict({n: toy[f"mix.{values['mixture']}.{n}"] for n in names})
    noise = NoiseSchedule.from_dict(values["schedule"])

    def denoiser(x: torch.Tensor, node: Node) -> torch.Tensor:
        return exact.data(x, node.alpha, node.sigma)

    train, test = ((arrays[x_T], arrays[target]) for x_T, target in (values["train"], values["test"]))
    flow = ("velocity",) if noise.kind == "flow" else ()
    space = SearchSpace(
        noise=noise, nfe=nfe, predictions=("noise", "data", *flow), t_end=(1e-3, 0.2), free_weights=0.5
    )
    return Problem(
        space=space,
        train=TeacherError(
            denoiser, *train, path=record(teacher_schedule(noise, TEACHER_STEPS), denoiser, train[0])
        ),
        test=TeacherError(denoiser, *test),
        bar=values["nfe"][str(nfe)]["bar"]["beat_baseline"],
    )


def run(evolution: Evolution, problem: Problem, budget: int, before: int = 0) -> Trace:
    """A search, with the count of its schedules begun at ``before``."""
    begun, best = time.perf_counter(), list[tuple[int, float]]()
    run_search(
        evolution,
        InlinePool(problem.train),
        budget,
        report=lambda progress: best.append((before + progress.evaluated, progress.best)),
    )
    return Trace(evolution=evolution, best=best, seconds=time.perf_counter() - begun)


def whole_search(problem: Problem, options: argparse.Namespace, seed: int) -> tuple[Trace, Trace]:
    """Times with fitted weights, then decisions and weights from the best of them.

    Counted in schedules, the teacher's run costs its evaluations over those of a schedule.
    """
    space = replace(problem.space, only_times=True)
    teacher = -(-TEACHER_STEPS // space.nfe)
    first = Evolution(space, replace(TIMES, seed=seed), seeds=grid_seeds(space))
    times = run(first, problem, options.fit, teacher)
    search = Evolution(
        problem.space,
        replace(WEIGHTS, seed=seed),
        PREDICTORS[options.predictor],
        seeds=times.evolution.fitted(16),
    )
    spent = teacher + len(times.evolution.scores)
    weights = run(search, problem, max(0, options.budget - len(times.evolution.scores)), spent)
    return times, weights


def table(options: argparse.Namespace) -> None:
    """Searches against the best known solver."""
    print(
        "       problem nfe seed     bar  fitted  ratio     end  ratio schedules network evaluations seconds"
    )
    for name, nfe, seed in product(options.problems, options.nfe, options.seeds):
        problem = load(options.oracles, name, nfe)
        parts = whole_search(problem, options, seed)
        ends = [problem.test(best_of(part.evolution)).value for part in parts]
        tried = sum(len(part.evolution.scores) for part in parts)
        network = sum(part.evolution.network_evaluations for part in parts)
        network += TEACHER_STEPS * len(problem.train)
        cells = " ".join(f"{end:7.4f} {end / problem.bar:6.3f}" for end in ends)
        seconds = sum(part.seconds for part in parts)
        row = f"{name:>14} {nfe:3d} {seed:4d} {problem.bar:7.4f} {cells}"
        print(f"{row} {tried:9d} {network:19,d} {seconds:7.1f}", flush=True)


def best_of(evolution: Evolution) -> Compilable:
    """The best schedule of a search."""
    return evolution.schedule(evolution.ranked()[0])


def compare(options: argparse.Namespace) -> None:
    """Plain evolution against a search with a predictor, and against the whole."""
    print("       problem nfe seed   plain schedules  with a predictor  part  whole  part")
    parts: dict[str, list[float]] = {"predictor": [], "whole": []}
    for name, nfe, seed in product(options.problems, options.nfe, options.seeds):
        problem = load(options.oracles, name, nfe)
        seeds = grid_seeds(problem.space, ("dmn",))[:8]
        plain = run(
            Evolution(problem.space, replace(PLAIN, seed=seed), None, seeds), problem, options.plain_budget
        )
        goal, whole = plain.best[-1][1], len(plain.evolution.scores)
        predictor = PREDICTORS[options.predictor]
        guided = run(Evolution(problem.space, replace(GUIDED, seed=seed), predictor, seeds), problem, whole)
        times, weights = whole_search(problem, options, seed)
        reached = [guided.when(goal), times.when(goal) or weights.when(goal)]
        cells = []
        for found, values in zip(reached, parts.values(), strict=True):
            values.append(found / whole if found else float("inf"))
            cells.append(f"{found or 'not'!s:>5} {values[-1]:5.2f}")
        print(f"{name:>14} {nfe:3d} {seed:4d} {goal:7.4f} {whole:9d} {'  '.join(cells)}", flush=True)
    print("median part of plain evolution's schedules:", {n: round(median(v), 3) for n, v in parts.items()})


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("oracles", type=Path)
    parser.add_argument("--nfe", type=int, nargs="+", default=[4, 5, 6, 8, 10])
    parser.add_argument("--problems", nargs="+", default=["gm16_vp_linear", "gm16_flow"])
    parser.add_argument("--fit", type=int, default=100)
    parser.add_argument("--budget", type=int, default=160)
    parser.add_argument("--plain-budget", type=int, default=800)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--predictor", choices=tuple(PREDICTORS), default="process")
    parser.add_argument("--compare", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    (compare if options.compare else table)(options)


if __name__ == "__main__":
    main()
