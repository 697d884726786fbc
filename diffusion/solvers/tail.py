"""The part of a schedule from a later node on, for image to image."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from thalweg.diffusion.solvers.linear import LinearSchedule
from thalweg.diffusion.solvers.schedule import Corrector, Derivative, SolverSchedule, Step

S = TypeVar("S", SolverSchedule, LinearSchedule)


def from_node(schedule: S, begin: int) -> S:
    """Steps from node ``begin``; estimates forget earlier nodes and lose the orders that needed them.

    Raises:
        ValueError: If there is no step from that node.
    """
    if isinstance(schedule, LinearSchedule):
        return schedule.from_node(begin)
    if begin == 0:
        return schedule
    if not 0 <= begin < len(schedule.steps):
        raise ValueError(f"begin index is {begin}, allowed: 0 to {len(schedule.steps) - 1}")
    steps = [_shifted(step, i, begin) for i, step in enumerate(schedule.steps) if i >= begin]
    return replace(schedule, nodes=schedule.nodes[begin:], steps=tuple(steps), first="network")


def _shifted(step: Step, i: int, begin: int) -> Step:
    start = step.start if step.start >= begin else begin
    order, derivatives = _remaining(step.derivatives, begin, start)
    corrector = step.corrector
    if corrector is not None:
        again, corrections = _remaining(corrector.derivatives, begin, start)
        corrector = Corrector(order=again, derivatives=corrections)
    return replace(step, start=start - begin, order=order, derivatives=derivatives, corrector=corrector)


def _remaining(
    derivatives: tuple[Derivative, ...], begin: int, start: int
) -> tuple[int, tuple[Derivative, ...]]:
    """Estimates that are left, renumbered, up to the first without enough nodes."""
    kept: list[Derivative] = []
    for derivative in derivatives:
        nodes = tuple(p - begin for p in derivative.nodes if p >= begin and p != start)
        if len(nodes) < derivative.k:
            break
        kept.append(replace(derivative, nodes=nodes))
    return len(kept) + 1, tuple(kept)
