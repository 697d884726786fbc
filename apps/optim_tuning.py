"""Choice of a learning rate and a weight decay within a budget of runs, the same for every optimizer.

Learning rates are the rule's default times 10^(k/4) for whole k. The search starts with steps of a factor of
10, goes on in the direction that helps until the best has worse neighbours on both sides, halves the step
twice, and tries the other decays at the best rate in between. It spends its whole budget.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

Point = tuple[int, float]
"""Quarter decades k above the default learning rate, and weight decay."""
WIDEST = 20
"""Largest |k|: a factor of 10^5."""


def best(scores: Mapping[Point, float]) -> Point:
    """The point with the lowest score; of runs that all diverged that with the lowest rate."""
    return min(scores, key=lambda point: (_finite(scores[point]), abs(point[0]), point[1]))


def next_point(scores: Mapping[Point, float], decays: Sequence[float], budget: int) -> Point | None:
    """The next run, or None when the budget is spent.

    Args:
        scores: Scores so far, lower is better; infinity or NaN for a run that diverged.
        decays: Weight decays to try, the first one while the learning rate is searched.
        budget: Number of runs.
    """
    if len(scores) >= budget:
        return None
    for point in _wanted(scores, decays):
        if point not in scores and abs(point[0]) <= WIDEST:
            return point
    return None


def at_edge(scores: Mapping[Point, float], point: Point) -> bool:
    """Whether no worse learning rate was seen on one side, so that the best may lie beyond."""
    rates = [k for k, _ in scores]
    return point[0] in (min(rates), max(rates))


def _wanted(scores: Mapping[Point, float], decays: Sequence[float]) -> Iterable[Point]:
    first = decays[0]
    yield from ((0, first), (-4, first), (4, first))
    if all(_finite(score) == math.inf for score in scores.values()):
        yield from ((k, first) for k in range(-8, -WIDEST - 1, -4))
        return
    k, decay = best({point: score for point, score in scores.items() if point[1] == first})
    yield from ((k - 4, first), (k + 4, first))
    yield from ((k - 2, first), (k + 2, first))
    yield from ((best(scores)[0], other) for other in decays[1:])
    k, decay = best(scores)
    yield from ((k + step, decay) for step in (-1, 1, -2, 2, -3, 3))
    nearest = sorted(range(-2 * WIDEST, 2 * WIDEST + 1), key=abs)
    yield from ((k + step, other) for step in nearest for other in decays)


def _finite(score: float) -> float:
    return score if math.isfinite(score) else math.inf
