"""A searched scheduler against the schedulers of diffusers: same noises, same teacher, same evaluations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thalweg.apps.search import Schedule
    from thalweg.apps.search_task import Task

SCREEN = 20
"""Samples on which the variants of a class are compared."""


def compare_all(
    task: Task, schedules: Sequence[Schedule], device: str, variants: int | None
) -> dict[str, dict[str, Any]]:
    """Teacher errors of ours and of the best variant of every class of diffusers, by evaluations.

    Nothing for pipelines that do not draw pixels: the known solvers on plain grids are the bar there.
    """
    from rich.progress import Progress

    from thalweg.apps.search_task import TEST
    from thalweg.diffusion.s3.compare import rivals
    from thalweg.diffusion.s3.image_model import image_objective
    from thalweg.diffusion.s3.samplers import draws_pixels

    if not draws_pixels(task.model):
        print("the schedulers of diffusers are compared for pipelines of pixels only")
        return {}
    scale = 1.0 if task.options["guidance_scale"] is None else task.options["guidance_scale"]
    steps = {k: v for k, v in task.options.items() if k == "teacher_steps"}
    objective = image_objective(
        device, task.model, count=task.fresh, seed=task.seed + TEST, guidance_scale=scale, **steps
    )
    found = {}
    with Progress() as bar:
        job = bar.add_task("schedulers of diffusers", total=None)

        def told(nfe: int) -> Callable[[str], None]:
            return lambda family: bar.update(job, description=f"{nfe} evaluations: {family}")

        for schedule in schedules:
            score = objective(schedule)
            others = rivals(
                objective.denoiser.pipeline,  # type: ignore[attr-defined]
                objective,
                schedule.nfe,
                guidance_scale=scale,
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
