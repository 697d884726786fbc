"""Schedules given by the weights of their steps: what gradient refinement yields, and any other method.

With scalar coefficients every sampler that is exact for constant data is

    x_{i+1} = (sigma_{i+1} / sigma_i) x_i + sum_{j<=i} W_ij x0_j,
    sum_{j<=i} W_ij = alpha_{i+1} - alpha_i sigma_{i+1} / sigma_i,

so that nodes and the weights below the diagonal say everything. Shapes: N steps, so N + 1 nodes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from thalweg.checkpoints.atomic import write_text
from thalweg.diffusion.solvers.compile import Compiled, Row
from thalweg.diffusion.solvers.schedule import FIRST_STEPS, FirstStep, Node

TOLERANCE = 1e-6
"""Largest error of the sum of a step's weights, relative to the largest of them or 1."""


class Compilable(Protocol):
    """What can be sampled: a SolverSchedule or a LinearSchedule."""

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Nodes by falling noise."""

    @property
    def first(self) -> FirstStep:
        """What stands for the prediction at node 0."""

    @property
    def info(self) -> Mapping[str, Any]:
        """Where it comes from."""

    def by_channel(self) -> Sequence[Compilable]:
        """One sampler for each channel where channels have coefficients of their own; itself otherwise."""

    def compile(self) -> Compiled:
        """Coefficients of the states."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearSchedule:
    """A sampler: N + 1 nodes and the weights of N steps. It is used as a SolverSchedule is.

    Raises:
        ValueError: If noise rises, or the weights of a step are not finite, too few or too many, or have the
            wrong sum; the message names the step.
    """

    nodes: tuple[Node, ...]
    """Nodes by falling noise; a node may come twice (Heun)."""
    weights: tuple[tuple[float, ...], ...]
    """W; row i has the i + 1 weights of the data predictions at nodes 0 .. i."""
    first: FirstStep = "network"
    """What stands for the prediction at node 0: the network, no data, or the mean of the data."""
    info: Mapping[str, Any] = field(default_factory=dict)
    """Where it comes from, as JSON."""

    def __post_init__(self) -> None:
        """Check everything that a compiler relies on."""
        _check(self)

    @property
    def nfe(self) -> int:
        """Evaluations of the network."""
        return len(self.weights) - (self.first != "network")

    @classmethod
    def of(cls, schedule: Compilable) -> LinearSchedule:
        """The same sampler as weights.

        Raises:
            ValueError: If it is not exact for constant data, as the prediction v3 in general is not, or adds
                biases.
        """
        compiled = schedule.compile()
        if compiled.B_pred is not None:
            raise ValueError("the biases of v3 are no weights of data predictions")
        weights = compiled.steps()[1].tolist()
        rows = tuple(tuple(row[: i + 1]) for i, row in enumerate(weights))
        return cls(nodes=schedule.nodes, weights=rows, first=schedule.first, info=schedule.info)

    def by_channel(self) -> tuple[LinearSchedule, ...]:
        """Itself: the weights are those of all channels."""
        return (self,)

    def compile(self) -> Compiled:
        """Coefficients of the states over the start and the data predictions, in float64."""
        count = len(self.weights)
        sigma = np.array([node.sigma for node in self.nodes])
        c: Row = np.zeros((count + 1, count))
        for i, row in enumerate(self.weights):
            c[i + 1] = sigma[i + 1] / sigma[i] * c[i]
            c[i + 1, : i + 1] += row
        a = sigma / sigma[0]
        return Compiled(A=a, C=c, A_pred=a, C_pred=c)

    def from_node(self, begin: int) -> LinearSchedule:
        """Steps from a later node on. Weights of earlier predictions go to the first that is left.

        Raises:
            ValueError: If there is no step from that node.
        """
        if not 0 <= begin < len(self.weights):
            raise ValueError(f"begin index is {begin}, allowed: 0 to {len(self.weights) - 1}")
        if begin == 0:
            return self
        rows = tuple((sum(row[: begin + 1]), *row[begin + 1 :]) for row in self.weights[begin:])
        return LinearSchedule(nodes=self.nodes[begin:], weights=rows, info=self.info)

    def to_dict(self) -> dict[str, Any]:
        """The schedule as plain JSON values; defaults are left out."""
        from thalweg.diffusion.solvers.encoding import write_linear

        return write_linear(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LinearSchedule:
        """Read a schedule.

        Raises:
            ValueError: For a missing, unknown or malformed entry; the message gives its place.
        """
        from thalweg.diffusion.solvers.encoding import read_linear

        return read_linear(values)

    def save(self, path: str | Path) -> None:
        """Write a JSON file, whole or not at all; SolverSchedule.load reads it too."""
        write_text(Path(path), json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> LinearSchedule:
        """Read a JSON file.

        Raises:
            ValueError: If it is not such a schedule; the message names the file.
        """
        from thalweg.diffusion.solvers.schedule import SolverSchedule

        found = SolverSchedule.load(path)
        if not isinstance(found, cls):
            raise ValueError(f"{path} has steps in place of weights; SolverSchedule.load reads it")
        return found


def totals(nodes: Sequence[Node]) -> Row:
    """Sums of the weights of each step, alpha_{i+1} - alpha_i sigma_{i+1} / sigma_i."""
    alpha, sigma = np.array([(node.alpha, node.sigma) for node in nodes]).T
    return alpha[1:] - alpha[:-1] * sigma[1:] / sigma[:-1]


def _check(schedule: LinearSchedule) -> None:
    from thalweg.diffusion.solvers.validate import check_nodes

    nodes, weights = schedule.nodes, schedule.weights
    if not weights:
        raise ValueError("a schedule needs at least one step")
    if len(nodes) != len(weights) + 1:
        raise ValueError(f"{len(weights)} rows of weights need {len(weights) + 1} nodes, found {len(nodes)}")
    if schedule.first not in FIRST_STEPS:
        raise ValueError(f"first is {schedule.first!r}, allowed: {', '.join(FIRST_STEPS)}")
    if any(node.sigma == 0 for node in nodes[:-1]):
        raise ValueError("sigma 0 is allowed at the last node only")
    check_nodes([node for i, node in enumerate(nodes) if i == 0 or node.lam != nodes[i - 1].lam])
    for i, (row, total) in enumerate(zip(weights, totals(nodes).tolist(), strict=True)):
        if len(row) != i + 1:
            raise ValueError(f"step {i}: {len(row)} weights, needed: {i + 1}, one for each prediction so far")
        if not all(map(math.isfinite, row)):
            raise ValueError(f"step {i}: weights are {list(row)}, not finite")
        if abs(sum(row) - total) > TOLERANCE * max(1.0, *map(abs, row)):
            raise ValueError(
                f"step {i}: weights sum to {sum(row):.8g}, but its nodes ask for {total:.8g} "
                "= alpha' - alpha sigma' / sigma"
            )
