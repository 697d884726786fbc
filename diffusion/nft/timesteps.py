"""Times of rollouts and of training.

Shapes: N noise levels of a rollout, B samples, T times that a sample is trained on.

A rollout evaluates the network at N levels sigma_0 > ... > sigma_{N-1} and ends at sigma_N = 0. Training
takes its times from the same N levels; the timestep that the network is told is 1000 sigma.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from thalweg.diffusion.schedules import Flow
from thalweg.diffusion.solvers.schedule import Node

Choice = Literal["subset", "stratified"]

TRAIN_STEPS = 1000
"""Scale of timesteps."""


def flow_match_sigmas(num_steps: int, shift: float = 3.0) -> list[float]:
    """Noise levels of diffusers' FlowMatchEulerDiscreteScheduler, N + 1 of them, the last one 0.

    Its smallest level is the shifted 1 / 1000, and its grid from 1 to there is shifted once more: for shift 3
    the last level before 0 is 0.0089, however many steps there are.

    Raises:
        ValueError: If there is no step, or the shift is not positive.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}, allowed: 1 and more")
    flow = Flow(shift=shift)
    levels = flow.sigma(np.linspace(1.0, float(flow.sigma(1 / TRAIN_STEPS)), num_steps))
    return [*np.asarray(levels, np.float64).tolist(), 0.0]


def flow_nodes(sigmas: list[float], *, whole_timesteps: bool = False) -> list[Node]:
    """Nodes of a rectified flow, alpha = 1 - sigma, for solver schedules of the suite.

    Args:
        sigmas: Noise levels.
        whole_timesteps: Truncate what the network is told to whole numbers, as the authors' rollouts do;
            their training does not.
    """
    labels = [TRAIN_STEPS * sigma for sigma in sigmas]
    told = [float(int(label)) for label in labels] if whole_timesteps else labels
    return [Node(alpha=1 - s, sigma=s, t=s, label=label) for s, label in zip(sigmas, told, strict=True)]


def train_count(num_steps: int, fraction: float) -> int:
    """Number T of times that a sample is trained on, num_steps times the fraction, rounded down."""
    return int(num_steps * fraction)


@dataclass(frozen=True, kw_only=True)
class TrainTimes:
    """Which noise levels of a rollout its samples are trained on.

    Raises:
        ValueError: For an unknown choice, a fraction outside (0, 1], or a count below 1.
    """

    choice: Choice = "subset"
    """subset: the first T of a random order; stratified: one of each of T equal parts of the grid, rounded
    to levels, so that every sample sees high and low noise. Orders are those of each sample."""
    fraction: float = 0.99
    """Part of the levels that is used; that of the paper leaves out one of 10, 25 or 40."""
    count: int | None = None
    """T itself, in place of the fraction."""

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.choice not in get_args(Choice):
            raise ValueError(f"choice is {self.choice!r}, allowed: {', '.join(get_args(Choice))}")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction is {self.fraction}, allowed: above 0 to 1")
        if self.count is not None and self.count < 1:
            raise ValueError(f"count is {self.count}, allowed: 1 and more")

    def of(self, num_steps: int) -> int:
        """Number T of times for a rollout of num_steps.

        Raises:
            ValueError: If there is none, or more than the rollout has levels.
        """
        count = train_count(num_steps, self.fraction) if self.count is None else self.count
        if not 1 <= count <= num_steps:
            found = f"count {self.count}" if self.count else f"fraction {self.fraction}"
            raise ValueError(
                f"{found} of {num_steps} steps leaves {count} times to train on, allowed: 1 to {num_steps}"
            )
        return count

    def draw(self, num_steps: int, batch: int, stream: torch.Generator) -> Tensor:
        """Indices of levels, (B, T), on the device of the generator.

        Raises:
            ValueError: As :meth:`of` does.
        """
        count = self.of(num_steps)
        if self.choice == "subset":
            return random_orders(num_steps, batch, stream)[:, :count]
        device = stream.device
        spread_BT = torch.rand(batch, count, generator=stream, device=device, dtype=torch.float64)
        parts_BT = (torch.arange(count, device=device) + spread_BT) * (num_steps / count)
        index_BT = parts_BT.long().clamp(max=num_steps - 1)
        return index_BT.gather(1, random_orders(count, batch, stream))


def random_orders(length: int, batch: int, stream: torch.Generator) -> Tensor:
    """Independent random permutations of 0 .. length - 1, one for each sample (B, length)."""
    keys = torch.rand(batch, length, generator=stream, device=stream.device, dtype=torch.float64)
    return keys.argsort(1)
