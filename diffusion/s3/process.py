"""A Gaussian process that guesses the score of schedules with one number of steps.

A search keeps the number of evaluations, so that nodes and weights of its schedules make vectors of one
length. A Gaussian process learns from a few hundred of them, and knows how unsure it is. Its kernel is
Matern 5/2 with a length for every number,

    k(r) = a (1 + sqrt(5) r + 5 r^2 / 3) exp(-sqrt(5) r),    r^2 = sum_d (x_d - y_d)^2 / l_d^2,

whose lengths, size and noise maximise the likelihood of the archive (Rasmussen and Williams 2006, ch. 5).

Shapes: B schedules, D numbers of each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from thalweg.diffusion.s3.genes import shares_of
from thalweg.diffusion.s3.guide import Guess, Train, training_scores
from thalweg.diffusion.s3.objective import Score
from thalweg.diffusion.solvers.linear import Compilable

Array = NDArray[np.float64]

MAX_LAM = 8.0
"""Bound of lambda = ln(alpha / sigma)."""
MAX_SHARE = 10.0
"""Bound of a cumulative share of the weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessConfig:
    """How the process is fitted.

    Raises:
        ValueError: For a number out of range.
    """

    steps: int = 60
    """Steps of Adam on the kernel's numbers."""
    lr: float = 0.1
    """Its learning rate."""
    rows: int = 120
    """Best schedules on which the kernel's numbers are fitted."""
    keep: int = 120
    """Best schedules that the guesses rest on; bad ones say little about where the best are."""
    worst: float = 0.75
    """Quantile of the scores that stands for all above it."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("steps", "rows", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, allowed: 1 or more")
        if not 0 < self.worst <= 1:
            raise ValueError(f"worst is {self.worst}, allowed: above 0, up to 1")


def numbers_of(schedule: Compilable) -> Array:
    """Lambda of the nodes evaluated, and cumulative shares of the weights of each step, D."""
    lam = [min(max(node.lam, -MAX_LAM), MAX_LAM) for node in schedule.nodes]
    return np.concatenate([lam, *(share.clip(-MAX_SHARE, MAX_SHARE) for share in shares_of(schedule))])


class Process:
    """A fitted process.

    Args:
        x_BD: Numbers of the schedules.
        y_B: What is to be guessed.
        config: How.
    """

    def __init__(self, x_BD: Array, y_B: Array, config: ProcessConfig) -> None:
        spread = x_BD.std(0)
        self.mean, self.scale = x_BD.mean(0), np.where(spread > 1e-9, spread, 1.0)
        self.center, self.size = float(y_B.mean()), float(y_B.std()) or 1.0
        self.x_BD = self._scaled(x_BD)
        y = torch.from_numpy((y_B - self.center) / self.size)
        self.logs = _fitted(self.x_BD[: config.rows], y[: config.rows], config)
        self.root = torch.linalg.cholesky(_covariance(self.x_BD, self.logs))
        self.solved = torch.cholesky_solve(y[:, None], self.root)

    def _scaled(self, x_BD: Array) -> Tensor:
        return torch.from_numpy((x_BD - self.mean) / self.scale)

    def predict(self, x_BD: Array) -> tuple[Array, Array]:
        """Means and standard deviations (B,)."""
        cross = _kernel(self._scaled(x_BD), self.x_BD, self.logs)
        mean = (cross @ self.solved)[:, 0]
        known = torch.linalg.solve_triangular(self.root, cross.T, upper=False).square().sum(0)
        sd = (self.logs[-2].exp() - known).clamp_min(1e-12).sqrt()
        return self.center + self.size * mean.numpy(), self.size * sd.numpy()


def _kernel(x: Tensor, y: Tensor, logs: Tensor) -> Tensor:
    length = logs[:-2].exp()
    r = (5 * ((x / length)[:, None] - (y / length)[None]).square().sum(-1) + 1e-12).sqrt()
    return logs[-2].exp() * (1 + r + r**2 / 3) * torch.exp(-r)


def _covariance(x: Tensor, logs: Tensor) -> Tensor:
    return _kernel(x, x, logs) + (logs[-1].exp() + 1e-6) * torch.eye(len(x), dtype=x.dtype)


def _fitted(x: Tensor, y: Tensor, config: ProcessConfig) -> Tensor:
    """Logarithms of the lengths, of the kernel's size and of the noise: D + 2."""
    start = torch.full((x.shape[1],), 0.5 * math.log(x.shape[1]), dtype=x.dtype)
    logs = torch.cat([start, torch.tensor([0.0, math.log(1e-2)], dtype=x.dtype)]).requires_grad_()
    optimizer = torch.optim.Adam([logs], lr=config.lr)
    for _ in range(config.steps):
        root = torch.linalg.cholesky(_covariance(x, logs))
        fit = 0.5 * torch.linalg.solve_triangular(root, y[:, None], upper=False).square().sum()
        loss = fit + root.diagonal().log().sum() + 0.5 * (logs[:-2] - start).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            logs[-1].clamp_(min=math.log(1e-5))
    return logs.detach()


def process_train(config: ProcessConfig | None = None) -> Train:
    """Fit a process to the archive of a search; it guesses logarithms of scores.

    Failures are as bad as the worst. Like any predictor it depends on the archive alone.
    """
    config = config or ProcessConfig()

    def train(schedules: Sequence[Compilable], scores: Sequence[Score]) -> Guess:
        values = training_scores(scores, config.worst)[0]
        values = np.log(np.minimum(values, values[np.isfinite(values)].max()))
        order = np.argsort(values, kind="stable")[: config.keep]
        process = Process(np.stack([numbers_of(schedules[i]) for i in order]), values[order], config)
        return lambda found: process.predict(np.stack([numbers_of(schedule) for schedule in found]))

    return train
