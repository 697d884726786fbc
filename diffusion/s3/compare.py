"""The schedulers of diffusers, judged as a search judges its candidates: same starts, same teacher.

Every class is represented by its best variant (order, grid, end), which is chosen on a few of the starts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from thalweg.diffusion.library import LibraryScheduler, library_schedulers
from thalweg.diffusion.s3.objective import Score
from thalweg.diffusion.s3.samplers import SampleObjective


@dataclass(frozen=True, kw_only=True, slots=True)
class Rival:
    """A scheduler of diffusers and its score."""

    family: str
    """Class without the word Scheduler."""
    name: str
    """Variant."""
    score: Score
    """Median distance to the teacher."""
    variants: int
    """Variants of the class that were tried."""


def rivals(
    objective: SampleObjective,
    nfe: int,
    *,
    screen: int = 20,
    families: Sequence[str] | None = None,
    most: int | None = None,
    report: Callable[[str], None] | None = None,
) -> list[Rival]:
    """Best variant of every class of scheduler at a number of evaluations, the best first.

    Args:
        objective: Draws samples and compares them with a teacher; see
            :func:`thalweg.diffusion.s3.objectives.teacher`.
        nfe: Network evaluations per sample; classes that cannot make so many are left out.
        screen: Samples on which the variants of a class are compared.
        families: Classes to try, without the word Scheduler; all by default.
        most: Variants of a class to try, at equal distances in their list; all by default.
        report: Called with the name of each class.

    Raises:
        ValueError: For an unknown class or a number of variants below 1.
    """
    found = []
    order = ranked(objective, nfe, screen=screen, families=families, most=most, report=report)
    for family, entries in order.items():
        end = ends(entries[0], objective, nfe)
        if end is not None:
            name, score = entries[0].name, objective.judge(end)
            found.append(Rival(family=family, name=name, score=score, variants=len(entries)))
    return sorted(found, key=lambda rival: rival.score.value)


def ranked(
    objective: SampleObjective,
    nfe: int,
    *,
    screen: int = 20,
    families: Sequence[str] | None = None,
    most: int | None = None,
    report: Callable[[str], None] | None = None,
) -> dict[str, list[LibraryScheduler]]:
    """Variants of every class that can make so many evaluations, by their error on a few samples, best first.

    The arguments are those of :func:`rivals`.
    """
    table: dict[str, list[LibraryScheduler]] = {}
    for entry in library_schedulers(objective.sampler.config).values():
        table.setdefault(entry.family.removesuffix("Scheduler"), []).append(entry)
    if unknown := set(families or ()) - set(table):
        raise ValueError(f"unknown scheduler {', '.join(sorted(unknown))}; allowed: {', '.join(table)}")
    if most is not None and most < 1:
        raise ValueError(f"variants is {most}, allowed: 1 and more")
    found = {}
    for family in families or table:
        if report is not None:
            report(family)
        scored = []
        for i, entry in enumerate(spread(table[family], most)):
            end = ends(entry, objective, nfe, screen)
            if end is not None:
                scored.append((objective.judge(end).value, i, entry))
        if scored:
            found[family] = [entry for _, _, entry in sorted(scored, key=lambda one: one[:2])]
    return found


def spread(entries: Sequence[LibraryScheduler], most: int | None) -> list[LibraryScheduler]:
    """At most so many of a list, at equal distances, its ends included."""
    if most is None or len(entries) <= most:
        return list(entries)
    if most == 1:
        return [entries[0]]
    return [entries[round(i * (len(entries) - 1) / (most - 1))] for i in range(most)]


def ends(
    entry: LibraryScheduler, objective: SampleObjective, nfe: int, count: int | None = None, seed: int = 0
) -> Tensor | None:
    """End states of the first samples; None where the scheduler cannot do it.

    Args:
        entry: The scheduler.
        objective: Draws samples.
        nfe: Network evaluations per sample.
        count: Samples; all by default.
        seed: Of the noise that stochastic schedulers add.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice of diffusers on options that it may drop
            return objective.sampler.draw_library(entry, nfe, count, seed)
    except (ValueError, ArithmeticError, IndexError):
        return None
