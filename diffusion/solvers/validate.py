"""What makes a solver schedule one; every fault is one sentence that names its place."""

from __future__ import annotations

import math
from collections.abc import Sequence

from thalweg.diffusion.solvers.schedule import (
    FIRST_STEPS,
    PREDICTIONS,
    SCALES,
    Derivative,
    Node,
    SolverSchedule,
    Step,
)
from thalweg.diffusion.solvers.v3 import V3Tables


def check(schedule: SolverSchedule) -> None:
    """Raise for the first fault.

    Raises:
        ValueError: The fault.
    """
    nodes, steps = schedule.nodes, schedule.steps
    if not steps:
        raise ValueError("a schedule needs at least one step")
    if len(nodes) != len(steps) + 1:
        raise ValueError(f"{len(steps)} steps need {len(steps) + 1} nodes, found {len(nodes)}")
    _one_of("first", schedule.first, FIRST_STEPS)
    check_nodes(nodes)
    for i, step in enumerate(steps):
        check_step(step, i, nodes)
        if step.prediction == "v3":
            _check_v3(step, i, schedule)


def _check_v3(step: Step, i: int, schedule: SolverSchedule) -> None:
    if schedule.v3 is None:
        raise ValueError(f"step {i}: prediction v3 needs the schedule's v3 constants l and s")
    if not isinstance(schedule.v3, V3Tables):
        return
    again = () if step.corrector is None else step.corrector.derivatives
    for p in sorted({step.start, i + 1, *(p for d in (*step.derivatives, *again) for p in d.nodes)}):
        lam, table = schedule.nodes[p].lam, schedule.v3.lam
        if not schedule.v3.covers(lam):
            raise ValueError(
                f"step {i}: the v3 tables run over lambda from {table[0]:.6g} to {table[-1]:.6g}, "
                f"but node {p} has {lam:.6g}"
            )


def check_nodes(nodes: Sequence[Node]) -> None:
    """Noise must fall from node to node, and end at the last one if it ends.

    Raises:
        ValueError: The first fault.
    """
    for i, node in enumerate(nodes):
        if not (math.isfinite(node.alpha) and math.isfinite(node.sigma)):
            raise ValueError(f"node {i}: alpha {node.alpha} and sigma {node.sigma} must be finite")
        if node.alpha < 0 or node.sigma < 0 or node.alpha == node.sigma == 0:
            raise ValueError(
                f"node {i}: alpha {node.alpha} and sigma {node.sigma} must be 0 or more, not both 0"
            )
        if node.sigma == 0 and i < len(nodes) - 1:
            raise ValueError(f"node {i}: sigma 0 is allowed at the last node only")
        if node.alpha == 0 and i > 0:
            raise ValueError(f"node {i}: alpha 0 is allowed at the first node only")
        if i > 0 and node.lam <= nodes[i - 1].lam:
            raise ValueError(
                f"node {i}: noise must fall from node to node, but ln(alpha / sigma) is {node.lam:.6g} "
                f"after {nodes[i - 1].lam:.6g}"
            )


def check_step(step: Step, i: int, nodes: Sequence[Node]) -> None:
    """Check step i.

    Raises:
        ValueError: The first fault.
    """
    place, last = f"step {i}", i == len(nodes) - 2
    _one_of(f"{place}: prediction", step.prediction, PREDICTIONS)
    if not 0 <= step.start <= i:
        raise ValueError(f"{place}: start is {step.start}, allowed: 0 to {i}")
    check_order(step.order, step.derivatives, place, range(i + 1), step.start)
    from_noise = step.prediction == "noise" and nodes[step.start].alpha == 0
    if step.prediction == "velocity":
        used = {step.start, i + 1, *(p for d in step.derivatives for p in d.nodes)}
        if any(abs(nodes[p].alpha + nodes[p].sigma - 1) > 1e-9 for p in used):
            raise ValueError(f"{place}: prediction velocity needs a rectified flow, alpha + sigma = 1")
    elif step.order > 1 and (nodes[i + 1].sigma == 0 or from_noise):
        raise ValueError(f"{place}: order {step.order} over an infinite range of lambda, allowed: 1")
    if step.prediction == "v3" and (nodes[i + 1].sigma == 0 or nodes[step.start].alpha == 0):
        raise ValueError(f"{place}: prediction v3 over an infinite range of lambda")
    if step.corrector is not None:
        if last:
            raise ValueError(f"{place}: a corrector of the last step would cost an evaluation")
        corrector = step.corrector
        check_order(corrector.order, corrector.derivatives, f"{place}, corrector", range(i + 2), step.start)
        if corrector.order > 1 and from_noise:
            order = corrector.order
            raise ValueError(f"{place}, corrector: order {order} over an infinite range, allowed: 1")


def check_order(
    order: int, derivatives: Sequence[Derivative], place: str, allowed: range, start: int
) -> None:
    """Every derivative below the order needs one estimate from enough other nodes.

    Raises:
        ValueError: The first fault.
    """
    if order < 1:
        raise ValueError(f"{place}: order is {order}, allowed: 1 or more")
    if [d.k for d in derivatives] != list(range(1, order)):
        found, needed = [d.k for d in derivatives], list(range(1, order))
        raise ValueError(f"{place}: order {order} needs derivatives k = {needed}, found {found}")
    for d in derivatives:
        if len(set(d.nodes)) != len(d.nodes) or start in d.nodes or any(p not in allowed for p in d.nodes):
            raise ValueError(
                f"{place}: derivative {d.k} uses nodes {list(d.nodes)}, allowed: distinct ones of 0 to "
                f"{allowed[-1]} without the start {start}"
            )
        if len(d.nodes) < d.k:
            raise ValueError(f"{place}: derivative {d.k} needs {d.k} nodes or more, found {len(d.nodes)}")
        _one_of(f"{place}: scale", d.scale.kind, SCALES)
        if d.k > 1 and d.scale.kind != "none":
            raise ValueError(f"{place}: derivative {d.k} has a scale; only the first may")
        if not math.isfinite(d.scale.c):
            raise ValueError(f"{place}: scale constant is {d.scale.c}")


def _one_of(name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}, allowed: {', '.join(allowed)}")
