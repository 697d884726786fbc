"""Tables of a suite: means by task and part, differences between two models on equal noises, their errors.

Pictures are taken as independent. The error of a mean of tasks is that of a mean of independent numbers.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from thalweg.diffusion.metrics.geneval import TAGS
from thalweg.diffusion.suites.pictures import Picture, Scores

MACRO = "mean of tasks"
"""Row of the mean of the tasks' means, GenEval's number."""
MICRO = "mean of pictures"
"""Row of the mean of all pictures."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One number of a table, or a pair of them."""

    metric: str
    """A reward, or ``reward/part``."""
    split: str
    """Part of the suite."""
    task: str
    """One of GenEval's, or a mean."""
    pictures: int
    """How many it is the mean of."""
    value: float
    """Mean."""
    error: float | None
    """Its standard error; None for a single picture."""
    before: float | None = None
    """Mean of the other model."""
    difference: float | None = None
    """Mean of the differences, on equal noises."""
    difference_error: float | None = None
    """Standard error of that."""


def cells(
    pictures: Sequence[Picture], scores: Sequence[Scores], before: Sequence[Scores] | None = None
) -> list[Cell]:
    """All numbers of a suite.

    Args:
        pictures: What was drawn.
        scores: Of each.
        before: Those of another model on the same noises; only what both have is compared.
    """
    metrics = list(dict.fromkeys(name for row in scores for name in row))
    splits = list(dict.fromkeys(picture.item.split for picture in pictures))
    found: list[Cell] = []
    for metric in metrics:
        for split in splits:
            rows = [
                (p.item.tag, value, None if before is None else before[i].get(metric))
                for i, p in enumerate(pictures)
                if p.item.split == split and (value := scores[i].get(metric)) is not None
            ]
            if rows:
                found += _block(metric, split, rows)
    return found


Row = tuple[str, float, float | None]


def _block(metric: str, split: str, rows: Sequence[Row]) -> list[Cell]:
    """Cells of one column: tasks, if there are several, and means over them and over pictures."""
    tags = [tag for _, tag in sorted({(_place(row[0]), row[0]) for row in rows})]
    by_task = [_cell(metric, split, tag, [row for row in rows if row[0] == tag]) for tag in tags]
    if len(tags) == 1:
        return by_task
    return [*by_task, _macro(by_task), _cell(metric, split, MICRO, rows)]


def _place(tag: str) -> int:
    return TAGS.index(tag) if tag in TAGS else len(TAGS)


def _cell(metric: str, split: str, task: str, rows: Sequence[Row]) -> Cell:
    values, others = [row[1] for row in rows], [row[2] for row in rows]
    pairs = [(v, o) for v, o in zip(values, others, strict=True) if o is not None]
    shared = bool(pairs) and len(pairs) == len(values)
    gaps = [value - other for value, other in pairs] if shared else []
    return Cell(
        metric=metric,
        split=split,
        task=task,
        pictures=len(values),
        value=math.fsum(values) / len(values),
        error=_error(values),
        before=math.fsum(other for _, other in pairs) / len(pairs) if shared else None,
        difference=math.fsum(gaps) / len(gaps) if shared else None,
        difference_error=_error(gaps) if shared else None,
    )


def _error(values: Sequence[float]) -> float | None:
    """Standard error of a mean."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def _macro(parts: Sequence[Cell]) -> Cell:
    def mean(name: str) -> float | None:
        values = [getattr(part, name) for part in parts]
        return None if None in values else math.fsum(values) / len(values)

    def error(name: str) -> float | None:
        values = [getattr(part, name) for part in parts]
        return None if None in values else math.hypot(*values) / len(values)

    value = mean("value")
    assert value is not None
    return Cell(
        metric=parts[0].metric,
        split=parts[0].split,
        task=MACRO,
        pictures=sum(part.pictures for part in parts),
        value=value,
        error=error("error"),
        before=mean("before"),
        difference=mean("difference"),
        difference_error=error("difference_error"),
    )


def table_of(found: Sequence[Cell]) -> Mapping[tuple[str, str, str], Cell]:
    """Cells by metric, split and task."""
    return {(cell.metric, cell.split, cell.task): cell for cell in found}
