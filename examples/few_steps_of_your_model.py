"""Few-step schedules for a model of your own: no diffusers, no checkpoint, just a function.

    python examples/few_steps_of_your_model.py --nfe 4 6 --out runs/few_steps

The model here is the exact velocity of a rectified flow to eight clusters on a ring; put yours in its place.
Prints the median distance to a fine solver on noises that the search has not seen, for Euler, the best known
multistep solver that was tried, and the schedule that was found; writes the schedules as JSON, and a picture.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from thalweg.diffusion.s3.evolution import Evolution, EvolutionConfig
from thalweg.diffusion.s3.fit import record
from thalweg.diffusion.s3.image_model import teacher_schedule
from thalweg.diffusion.s3.objective import TeacherError
from thalweg.diffusion.s3.pool import InlinePool
from thalweg.diffusion.s3.search import run_search
from thalweg.diffusion.s3.space import SearchSpace
from thalweg.diffusion.schedules import Flow
from thalweg.diffusion.solvers.sample import sample
from thalweg.diffusion.solvers.schedule import Node

NOISE = Flow()
WIDTH = 0.05


def velocity(x: Tensor, t: float) -> Tensor:
    """Your model: the velocity noise - data at x = (1 - t) data + t noise, shape (B, 2)."""
    angles = torch.arange(8, dtype=x.dtype) * (math.pi / 4)
    centres = torch.stack([angles.cos(), angles.sin()], 1)
    variance = ((1 - t) * WIDTH) ** 2 + t**2
    away = x[:, None] - (1 - t) * centres
    share = torch.softmax(-away.square().sum(-1) / (2 * variance), 1)[..., None]
    data = (share * (centres + (1 - t) * WIDTH**2 / variance * away)).sum(1)
    return (x - data) / t


def denoise(x: Tensor, node: Node) -> Tensor:
    """What the search calls: the data prediction at a state of a noise level."""
    return x - node.sigma * velocity(x, node.sigma)


def objective(seed: int, count: int, fit: bool) -> TeacherError:
    """Distance to a fine solver from fixed noises; with its path, weights can be fitted."""
    x_T = torch.randn(count, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    path = record(teacher_schedule(NOISE, 100), denoise, x_T)
    assert path.end is not None
    return TeacherError(denoise, x_T, path.end, path=path if fit else None)


def draw(ends: dict[str, Tensor], file: Path) -> None:
    """The samples of each sampler."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * len(ends), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, x) in zip(figure.subplots(1, len(ends), squeeze=False)[0], ends.items(), strict=True):
        axes.scatter(*x.T.numpy(), s=2)
        axes.set(title=name, aspect="equal", xlim=(-1.5, 1.5), ylim=(-1.5, 1.5))
    figure.savefig(file, dpi=100)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nfe", type=int, nargs="+", default=[4, 6], help="network evaluations")
    parser.add_argument("--budget", type=int, default=48, help="schedules to try")
    parser.add_argument("--out", type=Path, default=Path("runs/few_steps"))
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    train, test = objective(0, 128, fit=True), objective(1, 1000, fit=False)

    for nfe in options.nfe:
        space = SearchSpace(
            noise=NOISE, nfe=nfe, predictions=("noise", "data", "velocity"), t_end=(1e-3, 0.2)
        )
        known = [space.schedule(genes) for genes in space.seeds()]
        best = min(known, key=lambda schedule: train(schedule, 32).value)
        euler = space.schedule(space.seeds_on(torch.linspace(1, 1 / nfe, nfe).tolist())[0])

        times = replace(space, only_times=True)
        search = Evolution(times, EvolutionConfig(num_random=4, batch=8, parents=8))
        run_search(search, InlinePool(train), options.budget)
        found = search.schedule(search.ranked()[0])
        found.save(options.out / f"{nfe}.json")

        samplers = {"Euler": euler, f"best of {len(known)} known": best, "found": found}
        words = ", ".join(f"{name} {test(schedule).value:.4f}" for name, schedule in samplers.items())
        print(f"{nfe} evaluations: {words}", flush=True)
        ends = {name: sample(schedule, denoise, test.x_T)[-1] for name, schedule in samplers.items()}
        draw({"fine solver": test.target, **ends}, options.out / f"{nfe}.png")


if __name__ == "__main__":
    main()
