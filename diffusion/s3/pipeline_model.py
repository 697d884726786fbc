"""Samples of any diffusers pipeline as a black box: fixed prompts or classes, fixed noises, any schedule.

Shapes: B samples, ... what the pipeline's latents are.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from thalweg.diffusion.draw import (
    contents,
    dtype_of,
    network,
    open_pipeline,
    scheduler_of,
    set_scheduler,
    takes,
)
from thalweg.diffusion.from_diffusers import network_of
from thalweg.diffusion.library import LibraryScheduler
from thalweg.diffusion.loading import call_options
from thalweg.diffusion.s3.fit import Path, WeightFit
from thalweg.diffusion.s3.image_model import TEACHER_STEPS, teacher_schedule
from thalweg.diffusion.solvers.linear import Compilable, LinearSchedule
from thalweg.diffusion.solvers.plan import data_of_output
from thalweg.diffusion.solvers.schedule import SolverSchedule

See = Callable[[Tensor, Tensor], Tensor | None]
"""Told of a state and the data prediction there; may say what the next state is to be."""
Output = Literal["latent", "image"]
WORDS = {"prompts": "prompt", "classes": "class_labels"}


class PipelineSampler:
    """Draws with solver schedules through the pipeline itself.

    Sample i has the generator of ``seed + i`` and the prompt or class number i, in turn, so that all
    schedules see the same noises, and the first samples are the same for any count.

    Args:
        device: Where the pipeline runs.
        folder: Folder of a pipeline, or its name on the Hub.
        count: Samples.
        seed: Seed of the first sample.
        guidance_scale: Of classifier-free guidance; the pipeline's default if None.
        batch: Samples at once.
        prompts: Texts, for pipelines that take them.
        classes: Labels or names of classes; all, if they are few, by default.
        output: ``latent`` for what the last step gives, where the pipeline can; ``image`` for images.
        options: More arguments of the pipeline, such as height and width.
        dtype: Precision of the network.

    Raises:
        ValueError: If there is no such pipeline, or prompts, classes and options are not for it.
    """

    def __init__(
        self,
        device: str,
        folder: str,
        count: int = 64,
        seed: int = 0,
        guidance_scale: float | None = 1.0,
        batch: int = 16,
        prompts: Sequence[str] | None = None,
        classes: Sequence[int | str] | None = None,
        output: Output = "latent",
        options: Mapping[str, Any] | None = None,
        dtype: str = "float32",
    ) -> None:
        if count < 1 or batch < 1:
            raise ValueError(f"count is {count} and batch {batch}, allowed: 1 and more")
        self.pipe: Any = open_pipeline(folder, dtype_of(dtype)).to(device)
        network(self.pipe).requires_grad_(False)
        self.config = dict(self.pipe.scheduler.config)
        self.noise, _ = network_of(self.config)
        each = contents(self.pipe, classes, prompts)
        self.shown = [each[i % len(each)] for i in range(count)]
        self.seed, self.batch = seed, batch
        self._paths: dict[int, Path] = {}
        self.options = {"guidance_scale": guidance_scale, **call_options(self.pipe), **(options or {})}
        known = inspect.signature(self.pipe.__call__).parameters
        if "guidance_scale" not in known or guidance_scale is None:
            del self.options["guidance_scale"]
        for name in self.options:
            if name not in known:
                raise ValueError(f"{type(self.pipe).__name__} has no option {name}")
        self.output = self._output(output)

    def _output(self, output: Output) -> str:
        """The output type of the pipeline that loses least."""
        source = inspect.getsource(type(self.pipe).__call__)
        if output == "latent" and '"latent"' in source:
            return "latent"
        # Those without a processor of images give arrays for all types but "pil".
        return "pt" if hasattr(self.pipe, "image_processor") or '"pt"' in source else "np"

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.shown)

    def teacher(self, steps: int = TEACHER_STEPS) -> SolverSchedule:
        """A schedule that leaves next to no error."""
        return teacher_schedule(self.noise, steps)

    def draw(self, schedule: Any, count: int | None = None) -> Tensor:
        """Latents, or images from 0 to 1, of the first ``count`` samples, (count, ...), on the CPU.

        Raises:
            ValueError: If the schedule is for another network.
        """
        count = len(self) if count is None else min(count, len(self))
        self.pipe.scheduler = scheduler_of(self.config, [schedule])
        with torch.no_grad():
            parts = [
                self._batch(start, min(start + self.batch, count), schedule.nfe)
                for start in range(0, count, self.batch)
            ]
        return torch.cat(parts)

    def draw_library(
        self, entry: LibraryScheduler, nfe: int, count: int | None = None, seed: int = 0
    ) -> Tensor:
        """The same with a scheduler of diffusers; stochastic ones draw from the generators of the samples.

        Args:
            entry: The scheduler.
            nfe: Network evaluations per sample.
            count: Samples; all by default.
            seed: Not used.

        Raises:
            ValueError: If it cannot do with so many evaluations, or in this pipeline.
            ArithmeticError: If a result is not finite.
        """
        count = len(self) if count is None else min(count, len(self))
        steps, parts = entry.steps(nfe), []
        with torch.no_grad():
            for start in range(0, count, self.batch):
                set_scheduler(self.pipe, entry.make())
                parts.append(self._batch(start, min(start + self.batch, count), steps))
        states = torch.cat(parts)
        if not torch.isfinite(states).all():
            raise ArithmeticError(f"{entry.name} with {nfe} evaluations gives values that are not finite")
        return states

    def fit(
        self, schedule: Any, count: int | None = None, steps: int = TEACHER_STEPS
    ) -> tuple[LinearSchedule, Tensor]:
        """The nodes of a schedule with the weights that follow the teacher best on the first batch.

        The scheduler that the pipeline is given looks at each output, and chooses the weights then.

        Args:
            schedule: Tells the nodes.
            count: Samples; all by default.
            steps: Evaluations of the teacher per sample; it runs once.

        Returns:
            The schedule, and latents or images from 0 to 1, (count, ...), on the CPU.

        Raises:
            ValueError: If the schedule is for another network, or the first step is none of the network.
        """
        count = len(self) if count is None else min(count, len(self))
        rows = min(count, self.batch)
        run = WeightFit(schedule.nodes, self.path(steps).first(rows))
        self.pipe.scheduler = watched(scheduler_of(self.config, [schedule]), schedule, run.step)
        with torch.no_grad():
            found = [self._batch(0, rows, schedule.nfe)]
        fitted = run.schedule()
        self.pipe.scheduler = scheduler_of(self.config, [fitted])
        with torch.no_grad():
            for start in range(rows, count, self.batch):
                found.append(self._batch(start, min(start + self.batch, count), fitted.nfe))
        return fitted, torch.cat(found)

    def path(self, steps: int = TEACHER_STEPS) -> Path:
        """The teacher's path of the first batch; it runs once."""
        if steps not in self._paths:
            self._paths[steps] = self._record(steps)
        return self._paths[steps]

    def _record(self, steps: int) -> Path:
        teacher, path, rows = self.teacher(steps), Path(), min(len(self), self.batch)
        seen = iter(teacher.nodes)

        def see(state: Tensor, data: Tensor) -> None:
            # DiTPipeline gives its scheduler the guided states twice.
            path.see(next(seen), state[:rows], data[:rows])

        self.pipe.scheduler = watched(scheduler_of(self.config, [teacher]), teacher, see)
        with torch.no_grad():
            self._batch(0, rows, teacher.nfe)
        return path

    def _batch(self, start: int, stop: int, nfe: int) -> Tensor:
        kind, part = takes(self.pipe), self.shown[start:stop]
        subject = {"batch_size": len(part)} if kind == "neither" else {WORDS[kind]: list(part)}
        found = self.pipe(
            **{**self.options, **subject},
            num_inference_steps=nfe,
            generator=[torch.Generator().manual_seed(self.seed + i) for i in range(start, stop)],
            output_type=self.output,
        ).images
        if self.output == "np":
            return torch.from_numpy(found).permute(0, 3, 1, 2)
        return found.float().cpu()

    def images(self, states: Tensor) -> Tensor:
        """Images from 0 to 1.

        Raises:
            ValueError: If the samples are latents.
        """
        if self.output == "latent":
            raise ValueError("these samples are latents; images need a PipelineSampler with output='image'")
        return states


def watched(scheduler: Any, schedule: Compilable, see: See) -> Any:
    """A scheduler of one schedule, with ``see`` called at every step of a run from its first node."""
    step, nodes = scheduler.step, enumerate(schedule.nodes)
    output = scheduler.config.prediction_type

    @functools.wraps(step)
    def watching(model_output: Tensor, timestep: Any, sample: Tensor, **options: Any) -> Any:
        i, node = next(nodes)
        a, b = data_of_output(node, output, i)
        state = sample.to(torch.promote_types(sample.dtype, torch.float32))
        told = model_output[:, : sample.shape[1]].to(state.dtype)  # without a learned variance
        following = see(state, a * state + b * told)
        if following is None:
            return step(model_output, timestep, sample, **options)
        if i + 2 == len(schedule.nodes):
            following = scheduler.end_scale * following
        found = SchedulerOutput(prev_sample=following.to(sample.dtype))
        return found if options.get("return_dict", True) else (found.prev_sample,)

    scheduler.step = watching
    return scheduler
