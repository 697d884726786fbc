"""Objectives that a worker process can make."""

import os
from pathlib import Path

import torch
from torch import Tensor

from thalweg.diffusion.s3.genes import Genes, StepGenes
from thalweg.diffusion.s3.objective import Score, TeacherError
from thalweg.diffusion.s3.pool import Objective, Schedule
from thalweg.diffusion.s3.space import SearchSpace
from thalweg.diffusion.schedules import VPLinear
from thalweg.diffusion.solvers.sample import sample
from thalweg.diffusion.solvers.schedule import Node, SolverSchedule


def denoise(x: Tensor, node: Node) -> Tensor:
    """Two clusters at +1 and -1 of width 0.2 in each dimension."""
    variance = 0.04 * node.alpha**2 + node.sigma**2
    mean = torch.tanh(node.alpha * x / variance)
    return mean + 0.04 * node.alpha * (x - node.alpha * mean) / variance


def objective(device: str = "cpu", count: int = 64) -> TeacherError:
    """Distance to a hundred steps of third order."""
    x = torch.randn(count, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(device)
    space = SearchSpace(noise=VPLinear(), nfe=100, min_gap=1e-3)
    times = space.repair(space.grid("uniform_lambda", 1e-3))
    fine = Genes(times=times, steps=(StepGenes(order=3, corrector=True),) * 100)
    return TeacherError(denoise, x, sample(space.schedule(fine), denoise, x)[-1])


def deadly(device: str, mark: str, order: int, always: bool) -> Objective:
    """The same, but the process dies at schedules whose last but one step has this order: once, or always."""
    error = objective(device)

    def evaluate(schedule: Schedule, count: int | None = None) -> Score:
        assert isinstance(schedule, SolverSchedule)
        if schedule.steps[-2].order == order:
            if always or not Path(mark).exists():
                Path(mark).touch()
                os._exit(9)
            if order == 3:
                raise RuntimeError("out of memory")
        return error(schedule, count)

    return evaluate


def stillborn(device: str) -> Objective:
    """Ends its process in place of an objective."""
    os._exit(9)
