"""Solvers that collect samples, as solver schedules of the suite.

The deterministic ones are schedules like any other, so that a searched one can take their place. Those with
noise are in :mod:`thalweg.diffusion.nft.stochastic`; without it all three of them are Euler's method.

With FlowMatchEuler's grid the last level before 0 is far below the one before (0.278 and 0.0089 of 10 steps).
A second-order step between them extrapolates far beyond the two predictions that it has, so by default the
last two steps are of first order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from thalweg.diffusion.nft.timesteps import flow_nodes
from thalweg.diffusion.solvers.named import named
from thalweg.diffusion.solvers.schedule import SolverSchedule, Step

Deterministic = Literal["dpm1", "dpm2", "flow", "ddim", "dance"]

FINAL_FIRST_ORDER = 2
"""Steps of first order at the end of dpm2."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OdeSolver:
    """A deterministic solver of rollouts.

    Raises:
        ValueError: For an unknown solver, a negative number of steps, or two that contradict each other.
    """

    name: Deterministic = "dpm2"
    """dpm1, dpm2: DPM-Solver++ of order 1 and 2 (multistep, midpoint); flow, ddim, dance: Euler."""
    final_first_order_steps: int = FINAL_FIRST_ORDER
    """Steps of first order at the end of dpm2; the step to noise 0 always is one."""
    legacy_dpm2: bool = False
    """Only the step to noise 0 is of first order, as in the authors' program."""
    whole_timesteps: bool = False
    """Tell the network timesteps truncated to whole numbers, as the authors' program does."""

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.name not in get_args(Deterministic):
            raise ValueError(f"solver is {self.name!r}, allowed: {', '.join(get_args(Deterministic))}")
        if self.final_first_order_steps < 0:
            raise ValueError(
                f"final_first_order_steps is {self.final_first_order_steps}, allowed: 0 and more"
            )
        if self.legacy_dpm2 and self.final_first_order_steps not in (1, FINAL_FIRST_ORDER):
            raise ValueError(
                f"final_first_order_steps is {self.final_first_order_steps}, but legacy_dpm2 means 1"
            )

    def schedule(self, sigmas: Sequence[float]) -> SolverSchedule:
        """The schedule on noise levels, the last one 0 for clean samples.

        Raises:
            ValueError: If noise does not fall.
        """
        nodes = flow_nodes(list(sigmas), whole_timesteps=self.whole_timesteps)
        if self.name == "dpm1":
            found = named("ddim", nodes)
        elif self.name == "dpm2":
            found = named("dpmpp", nodes, order=2, lower_order_final=True)
        else:
            found = named("flow_euler", nodes)
        assert isinstance(found, SolverSchedule), "these solvers come as steps"
        if self.name == "dpm2" and not self.legacy_dpm2:
            found = first_order_tail(found, self.final_first_order_steps)
        return replace(found, info={"solver": self.name, "legacy_dpm2": self.legacy_dpm2})


def first_order_tail(schedule: SolverSchedule, count: int) -> SolverSchedule:
    """The schedule with its last steps of first order, of the same prediction as they were."""
    first = len(schedule.steps) - count
    steps = [
        Step(start=i, prediction=step.prediction, order=1) if i >= first else step
        for i, step in enumerate(schedule.steps)
    ]
    return replace(schedule, steps=tuple(steps))
