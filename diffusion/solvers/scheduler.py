"""Solver schedules behind the scheduler interface of diffusers.

``pipe.scheduler = SearchedScheduler.from_pretrained(folder)`` samples any pipeline with a searched schedule.

Shapes: B batch, C channels, ... space; N steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config

# A pipeline that reloads a class of another package looks for SchedulerMixin in the module of that class.
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from torch import Tensor

from thalweg.diffusion.solvers.levels import level_of_label
from thalweg.diffusion.solvers.linear import LinearSchedule
from thalweg.diffusion.solvers.plan import ChannelRun, Plan, Run, start_run
from thalweg.diffusion.solvers.schedule import SolverSchedule
from thalweg.diffusion.solvers.tail import from_node

OUTPUTS = ("epsilon", "sample", "v_prediction", "flow_prediction")


class SearchedScheduler(SchedulerMixin, ConfigMixin):
    """Runs solver schedules, one for each number of network evaluations.

    The state and the predictions are kept in float32 (or wider), whatever the network computes in. A step is
    one addition and one product of a matrix with a vector; nothing is read back from the device.

    Args:
        schedules: Solver schedules in their JSON form, by number of evaluations.
        prediction_type: What the network returns: ``epsilon``, ``sample``, ``v_prediction``, or
            ``flow_prediction`` (noise minus data).
        num_train_timesteps: Scale of the labels, for pipelines that ask.
        noise_schedule: The network's noise schedule (``NoiseSchedule.to_dict()``), to add noise at labels
            that are not nodes.
        clip_data: Bound of the predicted data's magnitude, for pixels in [-1, 1].
    """

    order = 1
    _compatibles: list[str] = []  # noqa: RUF012 - diffusers reads it from the class

    @register_to_config
    def __init__(
        self,
        schedules: dict[str, dict[str, Any]] | None = None,
        prediction_type: str = "epsilon",
        num_train_timesteps: int = 1000,
        noise_schedule: dict[str, Any] | None = None,
        clip_data: float | None = None,
    ) -> None:
        if prediction_type not in OUTPUTS:
            raise ValueError(f"prediction_type is {prediction_type!r}, allowed: {', '.join(OUTPUTS)}")
        self._schedules = {int(n): SolverSchedule.from_dict(s) for n, s in (schedules or {}).items()}
        for n, schedule in self._schedules.items():
            if schedule.nfe != n:
                raise ValueError(f"the schedule for {n} evaluations has {schedule.nfe}")
        self._plans: dict[tuple[int, int], list[Plan]] = {}
        self._nfe: int | None = None
        self.timesteps = torch.zeros(0)
        self._labels: list[float] = []
        self._begin_index: int | None = None
        self._last: Run | ChannelRun | None = None
        self._reset()
        if self._schedules:
            self.set_timesteps(max(self._schedules))

    @classmethod
    def from_schedules(
        cls, schedules: Sequence[SolverSchedule | LinearSchedule], **options: Any
    ) -> SearchedScheduler:
        """Make a scheduler of schedules, one for each number of evaluations.

        Raises:
            ValueError: If two have the same number of evaluations.
        """
        found: dict[str, dict[str, Any]] = {}
        for schedule in schedules:
            if str(schedule.nfe) in found:
                raise ValueError(f"two schedules have {schedule.nfe} evaluations")
            found[str(schedule.nfe)] = schedule.to_dict()
        return cls(schedules=found, **options)

    @property
    def schedules(self) -> Mapping[int, SolverSchedule | LinearSchedule]:
        """Schedules by number of evaluations."""
        return self._schedules

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the first state, of data with unit variance."""
        if self._nfe is None:
            return 1.0
        node = self._schedules[self._nfe].nodes[0]
        return float((node.alpha**2 + node.sigma**2) ** 0.5) if node.alpha and node.sigma > 1 else 1.0

    @property
    def step_index(self) -> int | None:
        """Node of the next step; None before the first."""
        return None if self._run is None else self._run.index

    @property
    def begin_index(self) -> int | None:
        """First node of the run, other than 0 for image to image."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at a later node; estimates that would need earlier ones are lowered in order."""
        self._begin_index = begin_index
        self._reset()

    def _reset(self) -> None:
        self._run: Run | ChannelRun | None = None

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: str | torch.device | None = None
    ) -> None:
        """Choose the schedule with this number of evaluations.

        Raises:
            ValueError: If there is none; the message lists those there are.
        """
        if num_inference_steps is None and len(self._schedules) == 1:
            num_inference_steps = next(iter(self._schedules))
        if num_inference_steps not in self._schedules:
            known = ", ".join(map(str, sorted(self._schedules))) or "none"
            raise ValueError(f"no schedule for {num_inference_steps} evaluations; there are: {known}")
        schedule = self._schedules[num_inference_steps]
        if schedule.first != "network":
            raise ValueError(
                f"the schedule for {num_inference_steps} evaluations replaces its first evaluation, but a "
                "pipeline always makes it; sample it with thalweg.diffusion.solvers.sample"
            )
        self._nfe = num_inference_steps
        labels = [node.t if node.label is None else node.label for node in schedule.nodes[:-1]]
        if None in labels:
            raise ValueError(f"node {labels.index(None)} has neither a label nor a time to tell the network")
        self.timesteps = torch.tensor(labels, dtype=torch.float32, device=device)
        self._labels = [float(np.float32(label)) for label in labels]
        self._begin_index = None
        self._reset()

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float | None = None) -> Tensor:
        """The network takes the state as it is."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """Next state.

        Args:
            model_output: What the network returned, shape (B, C, ...); a second half of channels (a learned
                variance) is left aside.
            timestep: Label of the node; used to find the first step of a run, and only if it is not on a GPU.
            sample: State of the node, shape (B, C, ...). Another one than was returned last is honoured.
            generator: Not used; the sampler is deterministic.
            return_dict: Return an object with ``prev_sample``, or a tuple.

        Raises:
            ValueError: Before ``set_timesteps`` and after the last step.
        """
        run = self._run
        if run is None:
            run = self._run = self._start(timestep, sample)
        if run.index >= run.end:
            raise ValueError(f"all {self._nfe} steps are done; set_timesteps starts again")
        channels = sample.shape[1]
        if model_output.shape[1] == 2 * channels:
            model_output = model_output[:, :channels]
        result = run.step(model_output, sample)
        return SchedulerOutput(prev_sample=result) if return_dict else (result,)

    def _start(self, timestep: Tensor | float, sample: Tensor) -> Run | ChannelRun:
        if self._nfe is None:
            raise ValueError("call set_timesteps before step")
        begin = self._first_index(timestep)
        if (self._nfe, begin) not in self._plans:
            schedule = from_node(self._schedules[self._nfe], begin)
            options = (self.config.prediction_type, self.config.clip_data)
            self._plans[self._nfe, begin] = [Plan.of(part, *options) for part in schedule.by_channel()]
        self._last = start_run(self._plans[self._nfe, begin], sample, begin, self._last)
        return self._last

    def _first_index(self, timestep: Tensor | float) -> int:
        if self._begin_index is not None:
            return self._begin_index
        if isinstance(timestep, Tensor) and timestep.device.type != "cpu":
            return 0  # looking at it would wait for the device
        label = float(timestep)
        distance = [abs(known - label) for known in self._labels]
        nearest = min(distance)
        return distance.index(nearest) if nearest < 1e-3 else 0

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """States alpha x0 + sigma noise at the labels ``timesteps``, shape (B,) or a single one.

        Raises:
            ValueError: If a label is no node and there is no noise schedule.
        """
        levels = [self._level(label) for label in timesteps.reshape(-1).tolist()]
        shape = (-1,) + (1,) * (original_samples.ndim - 1)
        alpha, sigma = (
            torch.tensor(values, dtype=original_samples.dtype, device=original_samples.device).view(shape)
            for values in zip(*levels, strict=True)
        )
        return alpha * original_samples + sigma * noise

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """The same under the name and argument order of flow-matching pipelines."""
        return self.add_noise(sample, noise, timestep)

    def _level(self, label: float) -> tuple[float, float]:
        if self._nfe is not None:
            for node in self._schedules[self._nfe].nodes[:-1]:
                known = node.t if node.label is None else node.label
                if known is not None and abs(known - label) < 1e-3:
                    return node.alpha, node.sigma
        if self.config.noise_schedule is None:
            raise ValueError(
                f"label {label} is no node, and the scheduler has no noise_schedule to look it up"
            )
        return level_of_label(self.config.noise_schedule, label)

    def __len__(self) -> int:
        """Number of labels that the network knows."""
        return int(self.config.num_train_timesteps)
