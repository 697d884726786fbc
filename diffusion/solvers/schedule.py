"""Solver schedules: per step a solver of its own, as data (Liu et al. 2024, arXiv 2312.07243).

A schedule is a list of nodes, where the network is evaluated, and a list of steps, each with its own
prediction type, Taylor order, start, derivative estimates, scaling and corrector. It is read from and written
to JSON; nothing in it is code. :mod:`thalweg.diffusion.solvers.compile` turns it into coefficients.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from thalweg.checkpoints.atomic import write_text
from thalweg.diffusion.solvers.v3 import V3, V3Tables

if TYPE_CHECKING:
    from thalweg.diffusion.solvers.compile import Compiled
    from thalweg.diffusion.solvers.linear import LinearSchedule

Prediction = Literal["noise", "data", "velocity", "v3"]
ScaleKind = Literal["none", "linear", "bh1", "bh2", "exp"]
FirstStep = Literal["network", "zero", "mean"]

PREDICTIONS: tuple[str, ...] = get_args(Prediction)
SCALES: tuple[str, ...] = get_args(ScaleKind)
FIRST_STEPS: tuple[str, ...] = get_args(FirstStep)


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """A noise level at which the network is evaluated; the last node of a schedule is the result."""

    alpha: float
    """Factor of the data in x = alpha x0 + sigma eps."""
    sigma: float
    """Factor of the noise."""
    t: float | None = None
    """Time of the noise schedule, for people."""
    label: float | None = None
    """What the network is told; the time where it is missing."""

    @property
    def lam(self) -> float:
        """Half the logarithm of the signal-to-noise ratio, ln(alpha / sigma); infinite at the ends."""
        if self.sigma == 0:
            return math.inf
        return -math.inf if self.alpha == 0 else math.log(self.alpha / self.sigma)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """Factor R(h) of the first derivative, 1 + O(h)."""

    kind: ScaleKind = "none"
    """none: 1; linear: 1 + c h; exp: 1 + c (e^z - 1); bh1 and bh2: the two choices of UniPC."""
    c: float = 0.0
    """Constant of linear and exp."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Derivative:
    """Estimate of the k-th derivative of the prediction with respect to lambda at the start of a step."""

    k: int
    """Which derivative."""
    nodes: tuple[int, ...]
    """Nodes whose predictions are used beside that of the start; at least k."""
    scale: Scale = Scale()
    """Factor; first derivative only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Corrector:
    """The step done again when the prediction at its end is known, at no further evaluation."""

    order: int
    """Taylor order."""
    derivatives: tuple[Derivative, ...] = ()
    """Estimates for k = 1 .. order - 1; the end of the step may be among their nodes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """How step i reaches node i + 1."""

    start: int
    """Node it starts from: i for multistep methods, an earlier one for stages of singlestep methods."""
    prediction: Prediction
    """What is extrapolated: noise, data, velocity (rectified flow only), or v3."""
    order: int
    """Taylor order, the number of terms; 1 is DDIM."""
    derivatives: tuple[Derivative, ...] = ()
    """Estimates for k = 1 .. order - 1."""
    corrector: Corrector | None = None
    """Correction of node i + 1; none on the last step, where it would cost an evaluation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SolverSchedule:
    """A sampler: N + 1 nodes and N steps.

    Raises:
        ValueError: If the schedule is not one; the message names the step and what is allowed.
    """

    nodes: tuple[Node, ...]
    """Nodes by falling noise."""
    steps: tuple[Step, ...]
    """One step to each node but the first."""
    first: FirstStep = "network"
    """What stands for the prediction at node 0: the network, no data, or the mean of the data."""
    v3: V3 | V3Tables | None = None
    """Constants or tables of the steps with prediction v3."""
    info: Mapping[str, Any] = field(default_factory=dict)
    """Where it comes from, as JSON: noise schedule, model, objective, score."""

    def __post_init__(self) -> None:
        """Check everything that a compiler relies on."""
        from thalweg.diffusion.solvers.validate import check

        check(self)

    @property
    def nfe(self) -> int:
        """Evaluations of the network."""
        return len(self.steps) - (self.first != "network")

    def by_channel(self) -> tuple[SolverSchedule, ...]:
        """One schedule for each channel where the tables of v3 have channels; itself alone otherwise."""
        if not isinstance(self.v3, V3Tables) or self.v3.channels is None:
            return (self,)
        return tuple(replace(self, v3=self.v3.channel(k)) for k in range(self.v3.channels))

    def compile(self) -> Compiled:
        """Coefficients of the states over the start and the data predictions, in float64.

        Raises:
            ValueError: If channels have coefficients of their own; compile those of :meth:`by_channel`.
        """
        from thalweg.diffusion.solvers.compile import compile_schedule

        return compile_schedule(self)

    def to_dict(self) -> dict[str, Any]:
        """The schedule as plain JSON values; defaults are left out."""
        from thalweg.diffusion.solvers.encoding import write_schedule

        return write_schedule(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SolverSchedule | LinearSchedule:
        """Read a schedule; one with weights in place of steps comes as a LinearSchedule.

        Raises:
            ValueError: For a missing, unknown or malformed entry; the message gives its place.
        """
        from thalweg.diffusion.solvers.encoding import read_linear, read_schedule

        if isinstance(values, Mapping) and "weights" in values and "steps" not in values:
            return read_linear(values)
        return read_schedule(values)

    def save(self, path: str | Path) -> None:
        """Write a JSON file, whole or not at all."""
        write_text(Path(path), json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> SolverSchedule | LinearSchedule:
        """Read a JSON file of either form.

        Raises:
            ValueError: If it is not a schedule; the message names the file.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text()))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def multistep(order: int, i: int, count: int | None = None) -> Sequence[Derivative]:
    """Estimates of all derivatives of a multistep method at step i, from the nodes before it."""
    nodes = tuple(range(i - 1, i - 1 - (order - 1 if count is None else count), -1))
    return tuple(Derivative(k=k, nodes=nodes) for k in range(1, order))
