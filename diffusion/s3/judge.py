"""The last word on a search: its best candidates on starts that it has not seen.

The best of many scores is too good, since luck was chosen with it; so the few best are scored once more on
fresh starts, with the best known solver beside them.
"""

from __future__ import annotations

from dataclasses import dataclass

from thalweg.diffusion.s3.evolution import Evolution
from thalweg.diffusion.s3.genes import Genes
from thalweg.diffusion.s3.objective import Score
from thalweg.diffusion.s3.pool import Pool, Schedule


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """A candidate on fresh starts."""

    number: int
    """Its place in the archive."""
    genes: Genes
    """What it is made of."""
    schedule: Schedule
    """What it does."""
    searched: Score
    """Score that the search saw."""
    fresh: Score
    """Score on fresh starts."""
    known: bool
    """Whether it is a known solver on a known grid, as the search was given them."""


def rerank(
    evolution: Evolution, fresh: Pool, top: int = 8, count: int | None = None
) -> tuple[Judged, tuple[Judged, ...]]:
    """Score the best candidates of a search, and its best known solver, on fresh starts.

    Args:
        evolution: The search.
        fresh: Scores on starts that the search has not seen.
        top: How many of the best.
        count: Starts; all by default.

    Returns:
        The winner, and all that were judged, best first.

    Raises:
        ValueError: If nothing has a score.
    """
    ranked = evolution.ranked()
    if not ranked or top < 1:
        raise ValueError(f"nothing to judge: {len(ranked)} candidates have a score, top is {top}")
    given = {genes for genes in (*evolution.seeds, *evolution.space.seeds()) if not genes.shifts}
    known = [n for n in ranked if evolution.archive[n] in given]
    numbers = list(dict.fromkeys([*ranked[:top], *known[:1]]))
    schedules = {n: evolution.schedule(n) for n in numbers}
    found = dict(fresh.scores(list(schedules.items()), count=count))
    table = [
        Judged(
            number=n,
            genes=evolution.archive[n],
            schedule=schedules[n],
            searched=evolution.scores[n],
            fresh=found[n],
            known=evolution.archive[n] in given,
        )
        for n in sorted(numbers, key=lambda n: (found[n].value, n))
    ]
    return table[0], tuple(table)
