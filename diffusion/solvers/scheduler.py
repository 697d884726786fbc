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
from diffusers.schedulers.scheduling_utils import SchedulerMixin as SchedulerMixin
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from thalweg.diffusion.schedules import EDM
from thalweg.diffusion.solvers.levels import NEAR, levels_at
from thalweg.diffusion.solvers.linear import LinearSchedule
from thalweg.diffusion.solvers.plan import ChannelRun, Plan, Run, start_run
from thalweg.diffusion.solvers.sample import first_prediction
from thalweg.diffusion.solvers.schedule import SolverSchedule
from thalweg.diffusion.solvers.stored import StoredScheduler, plain_sigmas, read_noise, read_schedules
from thalweg.diffusion.solvers.tail import from_node

OUTPUTS = ("epsilon", "sample", "v_prediction", "flow_prediction", "edm")


class SearchedScheduler(StoredScheduler, ConfigMixin):
    """Runs solver schedules, one for each number of network evaluations.

    The state and the predictions are kept in float32 (or wider), whatever the network computes in. A step is
    one addition and one product of a matrix with a vector; nothing is read back from the device.

    A schedule whose first step does without the network has its evaluations at the nodes from 1 on. Pipelines
    that call ``scale_model_input`` start from noise as ever, the first call makes the step. To others give
    ``latents=scheduler.prepare_latents(noise)``.

    Under a noise schedule of EDM states are what the network is given (of unit variance), and the result is
    data.

    Args:
        schedules: Solver schedules in their JSON form, by number of evaluations.
        prediction_type: What the network returns: ``epsilon``, ``sample``, ``v_prediction``,
            ``flow_prediction`` (noise minus data), or ``edm``, what EDM networks do (minus v).
        num_train_timesteps: Scale of the labels, for pipelines that ask.
        noise_schedule: The network's noise schedule (``NoiseSchedule.to_dict()``), to add noise at labels
            that are not nodes, and for the units of EDM.
        clip_data: Bound of the predicted data's magnitude, for pixels in [-1, 1].
        mean: Mean of the data as nested lists that broadcast to (C, ...), for schedules that start from it.
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
        mean: list[Any] | float | None = None,
    ) -> None:
        if prediction_type not in OUTPUTS:
            raise ValueError(f"prediction_type is {prediction_type!r}, allowed: {', '.join(OUTPUTS)}")
        self._schedules = read_schedules(schedules)
        self._noise = read_noise(noise_schedule)
        if prediction_type == "edm" and not isinstance(self._noise, EDM):
            raise ValueError("prediction_type edm needs the noise_schedule of its network, of kind edm")
        self._prepared = False
        self._plans: dict[tuple[int, int], list[Plan]] = {}
        self._nfe: int | None = None
        self.timesteps = torch.zeros(0)
        self._labels: list[float] = []
        self._begin_index: int | None = None
        self._last: Run | ChannelRun | None = None
        self._noised = False
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
        if isinstance(self._noise, EDM):  # a deviation of sqrt(t^2 + 1), as diffusers has it, times c_in
            t = self._noise.sigma_data * node.sigma / node.alpha
            return float(((t**2 + 1) / (t**2 + self._noise.sigma_data**2)) ** 0.5)
        return float((node.alpha**2 + node.sigma**2) ** 0.5) if node.alpha and node.sigma > 1 else 1.0

    @property
    def end_scale(self) -> float:
        """What a result in the units of the network is multiplied by; 1 but for EDM."""
        if self._nfe is None or not isinstance(self._noise, EDM):
            return 1.0
        return float(self._noise.sigma_data / self._schedules[self._nfe].nodes[-1].alpha)

    @property
    def step_index(self) -> int | None:
        """Number of the next step's label; None before the first."""
        return None if self._run is None else self._run.index - self._skipped

    @property
    def begin_index(self) -> int | None:
        """Number of the run's first label, other than 0 for image to image."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at a later node; estimates that would need earlier ones are lowered in order."""
        self._begin_index = begin_index
        self._reset()

    def _reset(self) -> None:
        self._run: Run | ChannelRun | None = None
        self._entered: Tensor | None = None

    @property
    def _skipped(self) -> int:
        """Nodes without an evaluation at the start."""
        return 0 if self._nfe is None else int(self._schedules[self._nfe].first != "network")

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        *,
        sigmas: Sequence[float] | Tensor | None = None,
        mu: float | None = None,
    ) -> None:
        """Choose the schedule with this number of evaluations.

        Args:
            num_inference_steps: Evaluations.
            device: Where ``timesteps`` are to be.
            sigmas: The plain grid 1, 1 - 1/n, .. 1/n that some pipelines of flows always pass; it says n, and
                the times are the schedule's own.
            mu: Shift of pipelines with dynamic shifting; the times are not shifted again.

        Raises:
            ValueError: If there is no such schedule (the message lists those there are), or for other sigmas.
        """
        if sigmas is not None:
            num_inference_steps = plain_sigmas(sigmas)
        if num_inference_steps is None and len(self._schedules) == 1:
            num_inference_steps = next(iter(self._schedules))
        if num_inference_steps not in self._schedules:
            known = ", ".join(map(str, sorted(self._schedules))) or "none"
            raise ValueError(f"no schedule for {num_inference_steps} evaluations; there are: {known}")
        schedule = self._schedules[num_inference_steps]
        if schedule.first == "mean" and self.config.mean is None:
            raise ValueError(
                f"the schedule for {num_inference_steps} evaluations starts from the mean of the data: give "
                "the scheduler mean"
            )
        self._nfe = num_inference_steps
        self._noised = False
        nodes = schedule.nodes[self._skipped : -1]
        labels = [node.t if node.label is None else node.label for node in nodes]
        if None in labels:
            raise ValueError(f"node {labels.index(None)} has neither a label nor a time to tell the network")
        self.timesteps = torch.tensor(labels, dtype=torch.float32, device=device)
        self._labels = [float(np.float32(label)) for label in labels]
        self._begin_index = None
        self._reset()

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float | None = None) -> Tensor:
        """The state as it is; noise becomes that of the first evaluation if the first step has none."""
        if not self._skipped or self._run is not None or self._begin(timestep) != 0:
            return sample
        assert self._nfe is not None
        self._entered = self._enter(sample, self._nfe)
        return self._entered

    def prepare_latents(self, noise: Tensor, num_inference_steps: int | None = None) -> Tensor:
        """State of the first evaluation, for pipelines that do not call ``scale_model_input``.

        Args:
            noise: First state, shape (B, C, ...).
            num_inference_steps: Evaluations; those of the last ``set_timesteps`` by default.

        Returns:
            What to give a pipeline as ``latents``; the noise itself where the first step needs the network.
        """
        if num_inference_steps is not None or self._nfe is None:
            self.set_timesteps(num_inference_steps)
        assert self._nfe is not None
        self._prepared = True
        return self._enter(noise, self._nfe) if self._skipped else noise

    def _enter(self, noise: Tensor, nfe: int) -> Tensor:
        """The first step, which does without the network."""
        return start_run(self._plan(nfe, 0), noise, 0).step(self._first(noise, nfe), noise)

    def _first(self, noise: Tensor, nfe: int) -> Tensor:
        mean = None
        if self.config.mean is not None:
            scale = 1.0 if self._noise is None else self._noise.data_scale
            mean = torch.as_tensor(self.config.mean, dtype=noise.dtype, device=noise.device) / scale
        return first_prediction(self._schedules[nfe], noise, mean)

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
            run, sample = self._start(timestep, sample)
            self._run = run
        if run.index >= run.end:
            raise ValueError(f"all {self._nfe} steps are done; set_timesteps starts again")
        channels = sample.shape[1]
        if model_output.shape[1] == 2 * channels:
            model_output = model_output[:, :channels]
        result = run.step(model_output, sample)
        return SchedulerOutput(prev_sample=result) if return_dict else (result,)

    def _start(self, timestep: Tensor | float | None, sample: Tensor) -> tuple[Run | ChannelRun, Tensor]:
        """A run, and the state of its first evaluation."""
        if self._nfe is None:
            raise ValueError("call set_timesteps before step")
        begin = self._begin(timestep)
        run = self._last = start_run(self._plan(self._nfe, begin), sample, begin, self._last)
        if begin > 0 or not self._skipped:
            return run, sample
        if self._entered is None and not self._prepared:
            raise ValueError(
                f"the schedule for {self._nfe} evaluations does its first step without the network, but the "
                "network was given the noise as it is: pass latents=scheduler.prepare_latents(noise)"
            )
        state = run.step(self._first(sample, self._nfe), sample)
        # Noise is a step behind; what was prepared is not, nor what a pipeline keeps of scale_model_input.
        return run, sample if self._entered is None or sample is self._entered else state

    def _plan(self, nfe: int, begin: int) -> list[Plan]:
        """Numbers of a run from a node, for all channels or for each."""
        if (nfe, begin) not in self._plans:
            schedule = from_node(self._schedules[nfe], begin)
            clip = self.config.clip_data
            if clip is not None and self._noise is not None:
                clip /= self._noise.data_scale
            options = (self.config.prediction_type, clip, self.end_scale)
            self._plans[nfe, begin] = [Plan.of(part, *options) for part in schedule.by_channel()]
        return self._plans[nfe, begin]

    def _begin(self, timestep: Tensor | float | None) -> int:
        """Node at which a run begins: 0, or that of a label if noise was added to an image."""
        index = 0 if timestep is None else self._first_index(timestep)
        return index + self._skipped if index > 0 or self._noised else 0

    def _first_index(self, timestep: Tensor | float) -> int:
        if self._begin_index is not None:
            return self._begin_index
        if isinstance(timestep, Tensor) and timestep.device.type != "cpu":
            return 0  # looking at it would wait for the device
        label = float(timestep)
        distance = [abs(known - label) for known in self._labels]
        nearest = min(distance)
        return distance.index(nearest) if nearest < NEAR else 0

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """States alpha x0 + sigma noise at the labels ``timesteps``, shape (B,) or a single one.

        Raises:
            ValueError: If a label is no node and there is no noise schedule; on a device other than the CPU,
                which is not waited for, the state is NaN instead.
        """
        nodes = () if self._nfe is None else self._schedules[self._nfe].nodes[:-1]
        self._noised = True
        shape = (-1,) + (1,) * (original_samples.ndim - 1)
        alpha, sigma = (
            values.to(original_samples).view(shape) for values in levels_at(nodes, self._noise, timesteps)
        )
        data_scale = 1.0 if self._noise is None else self._noise.data_scale
        return alpha / data_scale * original_samples + sigma * noise

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """The same under the name and argument order of flow-matching pipelines."""
        return self.add_noise(sample, noise, timestep)

    def __len__(self) -> int:
        """Number of labels that the network knows."""
        return int(self.config.num_train_timesteps)
