"""Host time of a scheduler step, and error in bfloat16, against the schedulers of diffusers, in alternation.

    python benchmarks/diffusion_scheduler.py

One thread; the network is left out. Prints microseconds per step and ratios; below 1 is faster. The large
state depends on how a process finds its memory, theirs by a factor of two and more: run it several times.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

from thalweg.diffusion.schedules import VPDiscrete
from thalweg.diffusion.solvers.named import named
from thalweg.diffusion.solvers.schedule import Node
from thalweg.diffusion.solvers.scheduler import SearchedScheduler

STEPS = 20
ROUNDS = 15
NOISE = VPDiscrete()


def known(solver: str, order: int, times: np.ndarray) -> SearchedScheduler:
    """A known solver as a schedule on given times."""
    nodes = [
        Node(alpha=float(NOISE.alpha(t)), sigma=float(NOISE.sigma(t)), label=float(NOISE.label(t)))
        for t in times
    ]
    schedule = named(solver, [*nodes, Node(alpha=1.0, sigma=0.0)], order=order)
    return SearchedScheduler.from_schedules([schedule])


def seconds_per_step(scheduler: Any, x: torch.Tensor, output: torch.Tensor) -> float:
    """Mean over the steps of one run, set-up left out."""
    scheduler.set_timesteps(STEPS)
    labels = scheduler.timesteps
    start = time.perf_counter()
    for label in labels:
        x = scheduler.step(output, label, x, return_dict=False)[0]
    return (time.perf_counter() - start) / len(labels)


def host_time() -> None:
    """Compare the same solvers: DPM-Solver++ of second order, UniPC of third with its corrector."""
    times = np.linspace(1, 0.002, STEPS)
    pairs = {
        "DPM-Solver++, order 2": (known("dpmpp", 2, times), DPMSolverMultistepScheduler()),
        "UniPC, order 3": (known("unipc", 3, times), UniPCMultistepScheduler(solver_order=3)),
    }
    for shape in ((4, 16, 64, 64), (1, 4, 8, 8)):
        x, output = torch.randn(2, *shape)
        for name, (mine, theirs) in pairs.items():
            rows = [
                (seconds_per_step(mine, x, output), seconds_per_step(theirs, x, output))
                for _ in range(ROUNDS)
            ]
            a, b = (1e6 * statistics.median(column[2:]) for column in zip(*rows, strict=True))
            print(f"{shape!s:18} {name:22} {a:7.1f} us {b:8.1f} us  ratio {a / b:.3f}")


def error_in_bfloat16() -> None:
    """Median distance of a bfloat16 run from the same scheduler in float64, on Gaussian data."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 4, 8, 8, generator=generator).bfloat16()
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    theirs = {
        "DPMSolverMultistep": DPMSolverMultistepScheduler(**betas),
        "UniPCMultistep": UniPCMultistepScheduler(**betas),
    }
    theirs["DPMSolverMultistep"].set_timesteps(STEPS)
    times = (theirs["DPMSolverMultistep"].timesteps.double().numpy() + 1) / NOISE.n
    all_schedulers = {"ours": known("dpmpp", 2, times), **theirs}
    errors = {name: rounding(scheduler, x) for name, scheduler in all_schedulers.items()}
    for name, error in errors.items():
        print(f"median error in bfloat16, {name:20} {error:.5f}  ours / it {errors['ours'] / error:.2f}")


def rounding(scheduler: Any, x: torch.Tensor) -> float:
    """Median over samples of the distance between a run in bfloat16 and one in float64."""
    results = []
    for start in (x, x.double()):
        state = start
        scheduler.set_timesteps(STEPS)
        for label in scheduler.timesteps:
            t = (float(label) + 1) / NOISE.n
            alpha, sigma = float(NOISE.alpha(t)), float(NOISE.sigma(t))
            # Exact noise of N(0.5, 0.3) data; the network rounds its output to the precision of its input.
            noise = sigma * (state.double() - 0.5 * alpha) / (0.3 * alpha**2 + sigma**2)
            state = scheduler.step(noise.to(state.dtype), label, state, return_dict=False)[0]
        results.append(state.double())
    return float((results[0] - results[1]).flatten(1).norm(dim=1).median())


if __name__ == "__main__":
    torch.set_num_threads(1)
    with torch.no_grad():
        host_time()
        error_in_bfloat16()
