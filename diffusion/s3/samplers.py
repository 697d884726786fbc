"""Samples of a pipeline on fixed noises and classes or prompts, and what scores the samples of a schedule."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from thalweg.diffusion.library import LibraryScheduler
from thalweg.diffusion.s3.fit import Path as TeacherPath
from thalweg.diffusion.s3.fit import is_wanted
from thalweg.diffusion.s3.image_model import TEACHER_STEPS, ImageSampler
from thalweg.diffusion.s3.objective import HOPELESS, Schedule, Score
from thalweg.diffusion.s3.pipeline_model import Output, PipelineSampler
from thalweg.diffusion.s3.pool import ObjectiveRef
from thalweg.diffusion.solvers.linear import LinearSchedule

FITTED = f"{__name__}:fitted"
"""The function that makes an objective with fitted weights, as ``module:function``."""


class Sampler(Protocol):
    """Draws with schedules, from the same noises each time."""

    def __len__(self) -> int:
        """Number of samples."""

    @property
    def shown(self) -> list[int | str | None]:
        """Class or prompt of each sample."""

    def teacher(self, steps: int = TEACHER_STEPS) -> Schedule:
        """A schedule that leaves next to no error."""

    def draw(self, schedule: Any, count: int | None = None) -> Tensor:
        """End states of the first ``count`` samples, (count, ...)."""

    @property
    def config(self) -> Mapping[str, Any]:
        """Configuration of the network's own scheduler."""

    def draw_library(
        self, entry: LibraryScheduler, nfe: int, count: int | None = None, seed: int = 0
    ) -> Tensor:
        """End states of the first ``count`` samples with a scheduler of diffusers, (count, ...)."""

    def fit(
        self, schedule: Any, count: int | None = None, steps: int = TEACHER_STEPS
    ) -> tuple[LinearSchedule, Tensor]:
        """The nodes of a schedule with weights that follow the teacher, and its end states (count, ...)."""

    def path(self, steps: int = TEACHER_STEPS) -> TeacherPath:
        """States and predictions of the teacher, of the first samples or all."""

    def images(self, states: Tensor) -> Tensor:
        """End states as images from 0 to 1, (B, C, H, W)."""


class SampleObjective:
    """Scores the samples of a schedule.

    Args:
        sampler: Draws them.
        judge: Score of the first so many end states.
        target: End states of the teacher, for those that compare with it.
    """

    def __init__(
        self, sampler: Sampler, judge: Callable[[Tensor], Score], target: Tensor | None = None
    ) -> None:
        self.sampler = sampler
        self.judge = judge
        self.target = target
        self.evaluations = 0

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.sampler)

    def __call__(self, schedule: Schedule, count: int | None = None) -> Score:
        """Score on the first ``count`` samples; hopeless if one is not finite."""
        states = self.sampler.draw(schedule, count)
        self.evaluations += len(states) * schedule.nfe
        return self.judge(states)


class FittedObjective:
    """Scores the samples of a schedule, or those of its nodes with weights that are fitted to the teacher.

    Which of both is said by the schedule, see :func:`thalweg.diffusion.s3.fit.is_wanted`.

    Args:
        objective: Draws samples and scores them.
        steps: Evaluations of the teacher per sample.
    """

    def __init__(self, objective: SampleObjective, steps: int = TEACHER_STEPS) -> None:
        self.objective = objective
        self.steps = steps

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.objective)

    def __call__(self, schedule: Schedule, count: int | None = None) -> Score:
        """Score on the first ``count`` samples, with the weights if they were fitted."""
        if not is_wanted(schedule):
            return self.objective(schedule, count)
        found, states = self.objective.sampler.fit(schedule, count, self.steps)
        self.objective.evaluations += len(states) * schedule.nfe
        return replace(self.objective.judge(states), weights=found.weights)


def fitted(device: str, objective: str, **options: Any) -> FittedObjective:
    """Any objective, with fitted weights for schedules that want them.

    Args:
        device: Where the network runs.
        objective: ``module:function`` that makes the objective.
        options: Its arguments; ``teacher_steps``, if there, are those of the path as well.

    Raises:
        ValueError: If the objective does not score samples.
    """
    made = ObjectiveRef(function=objective, options=options).make(device)
    if not isinstance(made, SampleObjective):
        raise ValueError(f"objective {objective!r} is not one of samples, whose weights can be fitted")
    return FittedObjective(made, options.get("teacher_steps", TEACHER_STEPS))


def open_sampler(
    device: str,
    folder: str,
    count: int = 64,
    seed: int = 0,
    guidance_scale: float | None = 1.0,
    batch: int = 64,
    prompts: Sequence[str] | None = None,
    classes: Sequence[int | str] | None = None,
    output: Output = "latent",
    dtype: str = "float32",
) -> Sampler:
    """Draws from a pipeline: of pixels directly, of others as a black box.

    Args:
        device: Where the network runs.
        folder: Folder of a pipeline, or its name on the Hub.
        count: Samples.
        seed: Seed of the noises.
        guidance_scale: Of classifier-free guidance; 1 for none, None for the pipeline's default.
        batch: Samples at once.
        prompts: Texts, for pipelines that take them; sample i has the one number i, in turn.
        classes: Classes in the same way; all by default.
        output: What is asked of a black box: ``latent`` for the end state, ``image`` for images.
        dtype: Precision of the network, such as ``bfloat16``; states are kept in single precision.

    Raises:
        ValueError: If there is no such pipeline, or prompts and classes are not for it.
    """
    if draws_pixels(folder) and prompts is None and classes is None:
        scale = 1.0 if guidance_scale is None else guidance_scale
        return ImageSampler(device, folder, count, seed, scale, batch, dtype)
    return PipelineSampler(
        device,
        folder,
        count,
        seed,
        guidance_scale,
        batch,
        prompts=prompts,
        classes=classes,
        output=output,
        dtype=dtype,
    )


def draws_pixels(folder: str | Path) -> bool:
    """Whether a folder holds a pipeline that denoises pixels, whose network is called directly.

    Networks of EDM, whose states are scaled, are called through their pipelines.
    """
    index = Path(folder) / "model_index.json"
    if not index.is_file():
        return False
    found = json.loads(index.read_text())
    name, scheduler = found.get("_class_name"), found.get("scheduler", [None, ""])[1]
    name = name[-1] if isinstance(name, list) else name
    return name in ("ClassImagePipeline", "DDPMPipeline") and not str(scheduler).startswith("EDM")


def finite(judge: Callable[[Tensor], Score]) -> Callable[[Tensor], Score]:
    """The judge of states that are all finite; others are hopeless."""
    return lambda states: judge(states) if torch.isfinite(states).all() else hopeless(len(states))


def hopeless(count: int) -> Score:
    """Score of samples that are not finite."""
    return Score(value=HOPELESS, noise=0.0, count=count)
