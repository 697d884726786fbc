"""A searched scheduler against the schedulers of diffusers: same noises, same teacher, same evaluations."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thalweg.apps.search import Schedule
    from thalweg.apps.search_task import Task

SCREEN = 20
"""Samples on which the variants of a class are compared."""
LATENT_VARIANTS = 4
"""Most variants of a class for pipelines that are black boxes, which take long, unless more are asked for."""


def compare_all(
    task: Task, schedules: Sequence[Schedule], device: str, variants: int | None
) -> dict[str, dict[str, Any]]:
    """Teacher errors of ours and of the best variant of every class of diffusers, by evaluations.

    Variants that are not limited are limited to LATENT_VARIANTS of a class where the pipeline is a black box.
    """
    from rich.progress import Progress

    from thalweg.apps.search_task import TEST
    from thalweg.diffusion.s3.compare import rivals
    from thalweg.diffusion.s3.objectives import teacher
    from thalweg.diffusion.s3.samplers import draws_pixels, open_sampler

    known = {"teacher_steps", *inspect.signature(open_sampler).parameters}
    options = {name: value for name, value in task.options.items() if name in known}
    objective = teacher(device, **options, count=task.fresh, seed=task.seed + TEST)
    if variants is None and not draws_pixels(task.model):
        variants = LATENT_VARIANTS
    found = {}
    with Progress() as bar:
        job = bar.add_task("schedulers of diffusers", total=None)

        def told(nfe: int) -> Callable[[str], None]:
            return lambda family: bar.update(job, description=f"{nfe} evaluations: {family}")

        for schedule in schedules:
            score = objective(schedule)
            others = rivals(
                objective,
                schedule.nfe,
                screen=min(SCREEN, task.fresh),
                most=variants,
                report=told(schedule.nfe),
            )
            found[str(schedule.nfe)] = {
                "error": score.value,
                "noise": score.noise,
                "rivals": [
                    {
                        "family": rival.family,
                        "name": rival.name,
                        "error": rival.score.value,
                        "noise": rival.score.noise,
                        "variants": rival.variants,
                    }
                    for rival in others
                ],
            }
        bar.update(job, description="schedulers of diffusers", total=1, completed=1)
    return found
