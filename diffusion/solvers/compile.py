"""From solver decisions to coefficients.

Every state of a schedule is linear in the start x_T and the data predictions, so that a schedule is a lower
triangular matrix: x_i = A_i x_T + sum_{j<i} C_ij x0_j. The coefficients are computed once, in float64.

Shapes: N steps, so N + 1 nodes. A row holds 2 + N numbers: factor of x_T, factors of x0_0 .. x0_{N-1}, and a
constant, which is zero but for the biases of v3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from thalweg.diffusion.solvers.phi import bh_scale, phi
from thalweg.diffusion.solvers.schedule import Derivative, Node, Scale, SolverSchedule, Step
from thalweg.diffusion.solvers.v3 import V3, V3Tables

Row = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Compiled:
    """Coefficients of a schedule; see the module for their meaning."""

    A: Row
    """Factor of x_T in each state after correction, shape (N+1,)."""
    C: Row
    """Factors of the data predictions in each state after correction, shape (N+1, N)."""
    A_pred: Row
    """The same before correction: what the network sees, and the result."""
    C_pred: Row
    """The same before correction."""
    B: Row | None = None
    """Constant in each state after correction, shape (N+1,); None for no constants."""
    B_pred: Row | None = None
    """The same before correction."""

    def steps(self) -> tuple[Row, Row]:
        """The same sampler step by step: x_{i+1} = r_i x_i + sum_{j<=i} W_ij x0_j, uncorrected states.

        Returns:
            r of shape (N,) and W of shape (N, N).
        """
        r = self.A_pred[1:] / self.A_pred[:-1]
        return r, self.C_pred[1:] - r[:, None] * self.C_pred[:-1]

    def biases(self) -> Row:
        """Constants that the steps add, shape (N,)."""
        if self.B_pred is None:
            return np.zeros(len(self.A_pred) - 1)
        return self.B_pred[1:] - self.A_pred[1:] / self.A_pred[:-1] * self.B_pred[:-1]


def compile_schedule(schedule: SolverSchedule, *, second_derivative: float = 1.0) -> Compiled:
    """Coefficients of a schedule.

    Args:
        schedule: What to compile.
        second_derivative: Factor of every second derivative; 0.5 is the fault that diffusers has at order 3.

    Raises:
        ValueError: If nodes are too close for their derivative estimates to be finite, or channels have
            coefficients of their own.
    """
    if isinstance(schedule.v3, V3Tables) and schedule.v3.channels is not None:
        raise ValueError(f"{schedule.v3.channels} channels have coefficients of their own: by_channel()")
    count = len(schedule.steps)
    predicted, corrected = np.zeros((count + 1, count + 2)), np.zeros((count + 1, count + 2))
    predicted[0, 0] = corrected[0, 0] = 1
    for i, step in enumerate(schedule.steps):
        rows = (schedule, predicted, corrected, second_derivative)
        predicted[i + 1] = _advance(step, step.order, step.derivatives, i, *rows)
        corrected[i + 1] = predicted[i + 1]
        if step.corrector is not None:
            again = (step.corrector.order, step.corrector.derivatives)
            corrected[i + 1] = _advance(step, *again, i, *rows)
    if not (np.isfinite(predicted).all() and np.isfinite(corrected).all()):
        bad = int(np.argmin(np.isfinite(corrected).all(1) & np.isfinite(predicted).all(1)))
        raise ValueError(f"step {bad - 1}: coefficients are not finite; its nodes lie too close together")
    biased = bool(predicted[:, -1].any() or corrected[:, -1].any())
    return Compiled(
        A=corrected[:, 0],
        C=corrected[:, 1:-1],
        A_pred=predicted[:, 0],
        C_pred=predicted[:, 1:-1],
        B=corrected[:, -1] if biased else None,
        B_pred=predicted[:, -1] if biased else None,
    )


def _advance(
    step: Step,
    order: int,
    derivatives: tuple[Derivative, ...],
    i: int,
    schedule: SolverSchedule,
    predicted: Row,
    corrected: Row,
    second_derivative: float,
) -> Row:
    """Row of node i + 1: exact for the Taylor polynomial of the prediction at the start of the step."""
    nodes, v3 = schedule.nodes, schedule.v3
    start, end = nodes[step.start], nodes[i + 1]
    values = {step.start, *(p for d in derivatives for p in d.nodes)}
    plain, v3 = _closed(step, v3)
    forms = {p: _prediction(plain, p, nodes, predicted, v3) for p in values}
    factor, weights = taylor(plain, start, end, order, v3)
    if factor == math.inf:  # from alpha = 0: the state is pure noise, its data part is the prediction
        row, weights = end.alpha * _unit(step.start, predicted), [end.sigma]
    else:
        row = factor * corrected[step.start]
    terms = [forms[step.start], *(_derivative(d, step, i, nodes, forms) for d in derivatives)]
    for k, (weight, term) in enumerate(zip(weights, terms, strict=True)):
        if term is not None:
            row = row + weight * (second_derivative if k == 2 else 1) * term
    if plain.prediction == "v3" and v3 is not None:
        _, constant = v3.integrals(start.lam, end.lam, 0)
        row[-1] -= end.alpha * math.exp(-v3.exponents(start.lam, end.lam)[0]) * constant
    return row


def _closed(step: Step, v3: V3 | V3Tables | None) -> tuple[Step, V3 | V3Tables | None]:
    """The step as one of data or noise where its v3 is one of these, and v3 in its simplest form."""
    if step.prediction != "v3" or v3 is None:
        return step, None
    v3 = v3.simplified() if isinstance(v3, V3Tables) else v3
    closed = v3.closed if isinstance(v3, V3) else None
    return (step if closed is None else replace(step, prediction=closed)), v3


def taylor(
    step: Step, start: Node, end: Node, order: int, v3: V3 | V3Tables | None = None
) -> tuple[float, list[float]]:
    """Factor of the state at the start and of the derivatives 0 .. order - 1 of the prediction."""
    if step.prediction == "velocity":
        delta = end.sigma - start.sigma
        return 1.0, [delta ** (k + 1) / math.factorial(k + 1) for k in range(order)]
    h = end.lam - start.lam
    if step.prediction == "data":
        factor = end.sigma / start.sigma
        # The first weight in a form that stays finite at both ends: alpha_t (1 - e^-h).
        first = end.alpha - start.alpha * factor
        return factor, [first, *(end.alpha * h ** (k + 1) * phi(k + 1, -h) for k in range(1, order))]
    if step.prediction == "noise":
        if start.alpha == 0:
            return math.inf, [end.sigma]
        factor = end.alpha / start.alpha
        first = end.sigma - start.sigma * factor
        return factor, [first, *(-end.sigma * h ** (k + 1) * phi(k + 1, h) for k in range(1, order))]
    assert v3 is not None
    decay = math.exp(-v3.exponents(start.lam, end.lam)[0])
    integrals, _ = v3.integrals(start.lam, end.lam, order)
    return end.alpha / start.alpha * decay, [-end.alpha * decay * e for e in integrals]


def _unit(p: int, rows: Row) -> Row:
    unit = np.zeros(rows.shape[1])
    unit[1 + p] = 1
    return unit


def _prediction(step: Step, p: int, nodes: Sequence[Node], predicted: Row, v3: V3 | V3Tables | None) -> Row:
    """What a step extrapolates, at node p, as a row; from the state before correction."""
    node, data = nodes[p], _unit(p, predicted)
    if step.prediction == "data":
        return data
    noise = (predicted[p] - node.alpha * data) / node.sigma
    if step.prediction == "noise":
        return noise
    if step.prediction == "velocity":
        return noise - data
    assert v3 is not None
    start = nodes[step.start].lam
    relative = math.exp(-v3.exponents(start, node.lam)[1])
    row = relative * (node.sigma * noise - v3.linear(node.lam) * predicted[p]) / node.alpha
    row[-1] -= v3.bias(start, node.lam)
    return row


def _derivative(
    d: Derivative, step: Step, i: int, nodes: tuple[Node, ...], forms: dict[int, Row]
) -> Row | None:
    """D_k = R sum_p a_p (F_p - F_s) as a row; None where no node is near enough to say anything."""
    weights = derivative_weights(d, step, nodes)
    if not weights:
        return None
    h = nodes[i + 1].lam - nodes[step.start].lam
    scale = scale_factor(d.scale, step.prediction, h)
    base = forms[step.start]
    return scale * sum((a * (forms[p] - base) for p, a in weights.items()), np.zeros_like(base))


def derivative_weights(d: Derivative, step: Step, nodes: tuple[Node, ...]) -> dict[int, float]:
    """Weights a_p with sum_p a_p Delta_p^j / j! = [j = k], j = 1 .. m, for the m active nodes.

    A node at infinite distance (alpha = 0 at the start of a flow) has weight 0 in the limit; the k-th
    derivative then needs k others.
    """
    start = nodes[step.start]
    if step.prediction == "velocity":
        distance = {p: nodes[p].sigma - start.sigma for p in d.nodes}
    else:
        distance = {p: nodes[p].lam - start.lam for p in d.nodes}
    active = [p for p in d.nodes if math.isfinite(distance[p])]
    if len(active) < d.k or (not math.isfinite(start.lam) and step.prediction != "velocity"):
        return {}
    powers = np.arange(1, len(active) + 1)
    delta = np.array([distance[p] for p in active])
    unit = np.abs(delta).max()
    system = (delta[None, :] / unit) ** powers[:, None]
    target = np.zeros(len(active))
    target[d.k - 1] = math.factorial(d.k) / unit**d.k
    return dict(zip(active, np.linalg.solve(system, target).tolist(), strict=True))


def scale_factor(scale: Scale, prediction: str, h: float) -> float:
    """R(h) of the first derivative; z = -h for data prediction and h otherwise, linear always takes h."""
    z = -h if prediction == "data" else h
    if scale.kind == "none":
        return 1.0
    if scale.kind == "linear":
        return 1 + scale.c * h
    if scale.kind == "exp":
        return 1 + scale.c * math.expm1(z)
    return bh_scale(scale.kind, z)
