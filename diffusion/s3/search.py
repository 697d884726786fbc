"""The search loop: ask, evaluate, tell, save; until the budget is spent."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from thalweg.diffusion.s3.evolution import Evolution
from thalweg.diffusion.s3.pool import Pool


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """Where a search stands."""

    evaluated: int
    """Candidates with a score."""
    budget: int
    """Candidates to evaluate in all."""
    round: int
    """Rounds begun."""
    best: float
    """Best score."""
    network_evaluations: int
    """Samples put through the network."""
    tau: float | None
    """Kendall's tau of the predictor's last guesses with what they turned out to be."""


def run_search(
    evolution: Evolution,
    pool: Pool,
    budget: int,
    state: Path | None = None,
    report: Callable[[Progress], None] | None = None,
    save_every: float = 5.0,
) -> None:
    """Go on with a search until ``budget`` candidates have a score; rounds are finished.

    Args:
        evolution: The search; continues from ``state`` if that file exists.
        pool: Evaluates candidates.
        budget: Candidates to evaluate in all, those of earlier runs included.
        state: File for the search's state, written every ``save_every`` seconds and after each round.
        report: Called after every score.
        save_every: Seconds.
    """
    if state is not None and state.is_file():
        evolution.load(state)
    saved = time.monotonic()
    while True:
        if len(evolution.scores) >= budget and not evolution.pending:
            return
        asked = evolution.ask()
        tasks = [(c.number, evolution.space.schedule(c.genes)) for c in asked]
        for number, score in pool.scores(tasks, count=asked[0].count):
            evolution.tell({number: score})
            if state is not None and time.monotonic() - saved > save_every:
                evolution.save(state)
                saved = time.monotonic()
            if report is not None:
                report(_progress(evolution, budget))
        if state is not None:
            evolution.save(state)


def _progress(evolution: Evolution, budget: int) -> Progress:
    ((_, best),) = evolution.best()
    return Progress(
        evaluated=len(evolution.scores),
        budget=budget,
        round=evolution.round,
        best=best.value,
        network_evaluations=evolution.network_evaluations,
        tau=next((tau for tau in reversed(evolution.taus) if tau is not None), None),
    )
