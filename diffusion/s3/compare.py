"""The schedulers of diffusers, judged as a search judges its candidates: same starts, same teacher.

Every class is represented by its best variant (order, grid, end), which is chosen on a few of the starts.

Shapes: B samples, C channels, H = W pixels.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from thalweg.diffusion.library import LibraryScheduler, library_schedulers, run_library
from thalweg.diffusion.s3.objective import Score, TeacherError, summarise


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
    pipeline: Any,
    objective: TeacherError,
    nfe: int,
    *,
    guidance_scale: float = 1.0,
    screen: int = 20,
    families: Sequence[str] | None = None,
    most: int | None = None,
    report: Callable[[str], None] | None = None,
) -> list[Rival]:
    """Best variant of every class of scheduler at a number of evaluations, the best first.

    Args:
        pipeline: ``DDPMPipeline`` or our ``ClassImagePipeline``.
        objective: Starts and ends of the teacher; its denoiser may have ``labels``.
        nfe: Network evaluations per sample; classes that cannot make so many are left out.
        guidance_scale: Of classifier-free guidance.
        screen: Starts on which the variants of a class are compared.
        families: Classes to try, without the word Scheduler; all by default.
        most: Variants of a class to try, at equal distances in their list; all by default.
        report: Called with the name of each class.

    Raises:
        ValueError: For an unknown class or a number of variants below 1.
    """
    table: dict[str, list[LibraryScheduler]] = {}
    for entry in library_schedulers(pipeline.scheduler.config).values():
        table.setdefault(entry.family.removesuffix("Scheduler"), []).append(entry)
    if unknown := set(families or ()) - set(table):
        raise ValueError(f"unknown scheduler {', '.join(sorted(unknown))}; allowed: {', '.join(table)}")
    if most is not None and most < 1:
        raise ValueError(f"variants is {most}, allowed: 1 and more")
    found = []
    for family in families or table:
        entries = spread(table[family], most)
        if report is not None:
            report(family)

        def judge(entry: LibraryScheduler, count: int) -> Score | None:
            return _score(entry, pipeline, objective, nfe, guidance_scale, count)

        few = [(score.value, i) for i, e in enumerate(entries) if (score := judge(e, screen))]
        if not few:
            continue
        best = entries[min(few)[1]]
        score = judge(best, len(objective))
        if score is not None:
            found.append(Rival(family=family, name=best.name, score=score, variants=len(few)))
    return sorted(found, key=lambda rival: rival.score.value)


def spread(entries: Sequence[LibraryScheduler], most: int | None) -> list[LibraryScheduler]:
    """At most so many of a list, at equal distances, its ends included."""
    if most is None or len(entries) <= most:
        return list(entries)
    if most == 1:
        return [entries[0]]
    return [entries[round(i * (len(entries) - 1) / (most - 1))] for i in range(most)]


def _score(
    entry: LibraryScheduler,
    pipeline: Any,
    objective: TeacherError,
    nfe: int,
    guidance_scale: float,
    count: int,
) -> Score | None:
    """Score on the first samples; None where the scheduler cannot do it."""
    count = min(count, len(objective))
    labels: Tensor | None = getattr(objective.denoiser, "labels", None)
    labels = None if labels is None else labels[:count]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice of diffusers on options that it may drop
            end = run_library(
                entry,
                pipeline,
                objective.x_T[:count],
                labels,
                nfe=nfe,
                guidance_scale=guidance_scale,
                batch=objective.batch,
            )
    except (ValueError, ArithmeticError, IndexError):
        return None
    return summarise((end - objective.target[:count]).flatten(1).norm(dim=1))
