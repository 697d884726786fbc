"""What a search varies: times and, per step, the decisions of a multistep solver, and free weights if wanted.

Free weights start from what the decisions say. Row i of the weights W of a schedule is its fixed sum times
differences of a sequence that ends at 1 (see :mod:`thalweg.diffusion.s3.parameters`); shifts are added to the
i entries of that sequence before its end, so that the sum stays right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from thalweg.diffusion.schedules import NoiseSchedule
from thalweg.diffusion.solvers.linear import Compilable, LinearSchedule, totals
from thalweg.diffusion.solvers.schedule import Corrector, Derivative, Node, Scale, SolverSchedule, Step


@dataclass(frozen=True, kw_only=True, slots=True)
class StepGenes:
    """Decisions of one step. What does not fit its place is lowered when they are read, not refused."""

    prediction: Literal["noise", "data", "velocity"] = "data"
    """What is extrapolated."""
    order: int = 1
    """Taylor order; at most one more than there are earlier nodes."""
    near: int = 0
    """Nodes of the first derivative's estimate; 0 for as many as the order brings."""
    c: float = 0.0
    """Linear scaling 1 + c h of the first derivative."""
    corrector: bool = False
    """Correct the end of the step with the prediction there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Genes:
    """A candidate."""

    times: tuple[float, ...]
    """Falling times of the evaluations, and of the end where it is searched as well."""
    steps: tuple[StepGenes, ...]
    """One per evaluation."""
    shifts: tuple[tuple[float, ...], ...] = ()
    """Shifts of the weights, row i of i; empty for the weights that the decisions give."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        values: dict[str, Any] = {"times": list(self.times), "steps": [asdict(step) for step in self.steps]}
        return values | ({"shifts": [list(row) for row in self.shifts]} if self.shifts else {})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Genes:
        """Read what :meth:`to_dict` gives."""
        steps = tuple(StepGenes(**step) for step in values["steps"])
        shifts = tuple(tuple(row) for row in values.get("shifts", ()))
        return cls(times=tuple(values["times"]), steps=steps, shifts=shifts)


def node_at(noise: NoiseSchedule, t: float) -> Node:
    """The node of a time."""
    alpha, sigma, label = (float(f(t)) for f in (noise.alpha, noise.sigma, noise.label))
    return Node(alpha=alpha, sigma=sigma, t=float(t), label=label)


@lru_cache(maxsize=8192)  # a search asks several times: whether it is valid, what it scores
def decode(genes: Genes, noise: NoiseSchedule) -> SolverSchedule | LinearSchedule:
    """The schedule that genes stand for; with as many times as steps it ends at sigma = 0.

    Genes with shifts give the weights of a schedule, those without its decisions.

    Raises:
        ValueError: If the times are not falling.
    """
    nodes = [node_at(noise, t) for t in genes.times]
    to_zero = len(genes.times) == len(genes.steps)
    if to_zero:
        nodes.append(Node(alpha=1.0, sigma=0.0, t=0.0))
    count = len(genes.steps)
    steps = [
        _last_step(i) if to_zero and i == count - 1 else _step(gene, i, i == count - 1, nodes)
        for i, gene in enumerate(genes.steps)
    ]
    schedule = SolverSchedule(nodes=tuple(nodes), steps=tuple(steps))
    return _shifted(schedule, genes.shifts) if any(map(any, genes.shifts)) else schedule


def _shifted(schedule: SolverSchedule, shifts: Sequence[Sequence[float]]) -> LinearSchedule:
    sums = totals(schedule.nodes)
    rows = []
    for i, (row, shift) in enumerate(zip(schedule.compile().steps()[1], shifts, strict=True)):
        moved = row[: i + 1] + sums[i] * np.diff([0.0, *shift, 0.0])
        rows.append(tuple(moved.tolist()))
    return LinearSchedule(nodes=schedule.nodes, weights=tuple(rows))


def _last_step(i: int) -> Step:
    return Step(start=i, prediction="data", order=1)


def _step(gene: StepGenes, i: int, last: bool, nodes: list[Node]) -> Step:
    prediction = gene.prediction
    order = min(gene.order, i + 1)
    if nodes[i].alpha == 0 and prediction == "noise":
        prediction = "data"  # at pure noise the two are the same step, and this one is finite at every order
    earlier = tuple(range(i - 1, i - order, -1))
    corrector = None
    if gene.corrector and not last:
        active = (i + 1, *earlier)
        corrector = Corrector(
            order=order + 1, derivatives=tuple(Derivative(k=k, nodes=active) for k in range(1, order + 1))
        )
    return Step(
        start=i,
        prediction=prediction,
        order=order,
        derivatives=_derivatives(gene, order, earlier),
        corrector=corrector,
    )


def _derivatives(gene: StepGenes, order: int, earlier: tuple[int, ...]) -> tuple[Derivative, ...]:
    if order == 1:
        return ()
    near = min(gene.near or order - 1, order - 1)
    scale = Scale(kind="linear", c=gene.c) if gene.c else Scale()
    first = Derivative(k=1, nodes=earlier[:near], scale=scale)
    return (first, *(Derivative(k=k, nodes=earlier) for k in range(2, order)))


def shares_of(schedule: Compilable) -> list[NDArray[np.float64]]:
    """Cumulative weights of each step over their sum, without the last, which is 1: row i has i of them."""
    sums, rows = totals(schedule.nodes), schedule.compile().steps()[1]
    return [np.cumsum(row[:i]) / sums[i] if sums[i] else np.zeros(i) for i, row in enumerate(rows)]


def with_weights(genes: Genes, schedule: Compilable) -> Genes:
    """The times of a candidate, steps of DDIM, and the shifts that make of them the weights of a schedule."""
    shifts = tuple(tuple(share.tolist()) for share in shares_of(schedule))
    return Genes(times=genes.times, steps=(StepGenes(),) * len(genes.steps), shifts=shifts)


def weight_of(schedule: Compilable) -> float:
    """Largest coefficient of a data prediction in any state: how much a schedule amplifies errors."""
    return float(np.abs(schedule.compile().C_pred).max())
