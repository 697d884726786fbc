"""Score an operator network on whole trajectories: direct predictions and rollouts, in both unit systems.

Predictions are made batch by batch and handed to metrics (which keep one number per sample) and to sinks such
as a file writer; nothing holds them all.

Shapes: B samples, F scored frames, S rollout steps, C channels, H/W space.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from thalweg.pde.data.normalize import Normalizer
from thalweg.pde.data.pair_dataset import STEADY_LEAD_TIME
from thalweg.pde.data.trajectories import TrajectoryReader, pixel_mask
from thalweg.pde.poseidon.rollout import rollout
from thalweg.pde.problem import ProblemSpec
from thalweg.pde.scores import Scores

Mode = Literal["direct", "autoregressive", "accumulation"]
Sink = Callable[[Sequence[int], Tensor, Tensor], None]
"""Takes sample numbers and predicted and true fields in physical units, both (B, F, C, H, W)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """How predictions are made and which frames are scored; times are snapshot indices."""

    mode: Mode
    """``direct`` predicts every frame from the first; ``autoregressive`` feeds predictions back and scores
    the last one; ``accumulation`` scores every state on the way."""
    initial: int
    """Snapshot that the network starts from."""
    frames: tuple[int, ...]
    """Scored snapshots, increasing; the last one is the final time."""
    steps: tuple[float, ...] = ()
    """Lengths of the rollout's steps in snapshots; empty for direct predictions."""
    static: Literal["truth", "predicted"] = "truth"
    """What a rollout feeds back in channels that do not evolve."""

    @property
    def final(self) -> int:
        """Last scored snapshot."""
        return self.frames[-1]


def plan(
    spec: ProblemSpec,
    num_frames: int,
    *,
    mode: Mode = "direct",
    initial: int | None = None,
    final: int | None = None,
    steps: int | Sequence[float] | None = None,
    static: Literal["truth", "predicted"] = "truth",
    horizon: bool = True,
) -> Protocol:
    """Protocol for a problem, with the paper's times unless told otherwise.

    Args:
        spec: The problem.
        num_frames: Snapshots per trajectory in the file.
        mode: See :class:`Protocol`.
        initial: First snapshot, 0 by default.
        final: Last snapshot; by default the last one of the problem's training pairs.
        steps: A number of equal steps, or their lengths in snapshots; for rollouts only. By default as many
            steps of the problem's stride as fit.
        static: See :class:`Protocol`.
        horizon: Let direct predictions score every snapshot of the problem's stride, not just the last.

    Raises:
        ValueError: If times lie outside the file or the mode does not apply to the problem.
    """
    if spec.steady:
        if mode != "direct" or initial or final:
            raise ValueError(f"{spec.name} is steady: it knows no times and mode 'direct' only, not {mode!r}")
        return Protocol(mode="direct", initial=0, frames=(0,))
    stride = spec.time_step_size
    start = 0 if initial is None else initial
    end = min(spec.max_num_time_steps * stride, num_frames - 1) if final is None else final
    if not 0 <= start < end < num_frames:
        raise ValueError(
            f"times must satisfy 0 <= initial < final < {num_frames} (snapshots in the file of {spec.name}),"
            f" got initial {start} and final {end}"
        )
    if mode == "direct":
        if steps is not None:
            raise ValueError("steps belong to mode 'autoregressive' or 'accumulation', not to 'direct'")
        frames = tuple(range(end, start, -stride))[::-1] if horizon else (end,)
        return Protocol(mode=mode, initial=start, frames=frames)
    lengths = _step_lengths(end - start, stride, steps)
    reached = (start + np.cumsum(lengths)).tolist()
    if mode == "autoregressive":
        return Protocol(mode=mode, initial=start, frames=(end,), steps=lengths, static=static)
    between = [time for time in reached if abs(time - round(time)) > 1e-9]
    if between:
        raise ValueError(
            f"accumulation compares every state with a snapshot, but {between[0]:g} lies between two;"
            " choose steps of whole snapshots"
        )
    frames = tuple(round(time) for time in reached)
    return Protocol(mode=mode, initial=start, frames=frames, steps=lengths, static=static)


def _step_lengths(span: int, stride: int, steps: int | Sequence[float] | None) -> tuple[float, ...]:
    """Step lengths that add up to the whole span."""
    if steps is None:
        steps = [float(stride)] * (span // stride) + ([float(span % stride)] if span % stride else [])
    if isinstance(steps, int):
        if steps < 1:
            raise ValueError(f"a rollout needs at least one step, not {steps}")
        return (span / steps,) * steps
    lengths = tuple(float(length) for length in steps)
    if min(lengths, default=0) <= 0 or abs(sum(lengths) - span) > 1e-9:
        raise ValueError(f"steps {list(steps)} must be positive and add up to {span} snapshots")
    return lengths


class Evaluator:
    """Predicts the trajectories of one reader with one network.

    Args:
        network: Network with scOT's forward signature.
        reader: Source of raw fields.
        normalizer: Constants of the network's units.
        protocol: What to predict.
        device: Where the network works.
        batch_size: Trajectories at a time.
    """

    def __init__(
        self,
        network: nn.Module,
        reader: TrajectoryReader,
        normalizer: Normalizer,
        protocol: Protocol,
        *,
        device: torch.device | str = "cpu",
        batch_size: int = 16,
    ) -> None:
        self.network = network.to(device).eval()
        self.reader, self.spec, self.normalizer = reader, reader.spec, normalizer
        self.protocol, self.device, self.batch_size = protocol, torch.device(device), batch_size
        self.static = [i for i, c in enumerate(self.spec.outputs) if c.role != "state"]

    def run(self, samples: Sequence[int], sinks: Sequence[Sink] = ()) -> Scores:
        """Score the given trajectories, passing their fields on to the sinks."""
        height, width = self.reader.grid
        scores = Scores(self.spec, height, width).to(self.device)
        for chosen in self.batches(samples):
            prediction, truth = self.predict(chosen)
            fields = [self.normalizer.denormalize_outputs(x) for x in (prediction, truth)]
            scores.update(prediction, truth, *fields)
            for sink in sinks:
                sink(chosen, *fields)
        return scores

    def batches(self, samples: Sequence[int]) -> Iterator[list[int]]:
        """Samples in batches."""
        for start in range(0, len(samples), self.batch_size):
            yield list(samples[start : start + self.batch_size])

    @torch.inference_mode()
    def predict(self, samples: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Normalised prediction and truth of some trajectories, both (B, F, C, H, W)."""
        raw_BCHW = self.reader.inputs(samples, self.protocol.initial)
        x_BCHW = self._tensor(self.normalizer.normalize_inputs(raw_BCHW))
        truth_BFCHW = self._truth(samples, self.protocol.frames)
        mask = pixel_mask(self.spec, raw_BCHW)
        mask_B = None if mask is None else torch.from_numpy(mask).to(self.device)
        if self.protocol.steps:
            return self._rollout(samples, x_BCHW, truth_BFCHW, mask_B), truth_BFCHW
        outputs = []
        for index, frame in enumerate(self.protocol.frames):
            time_B = x_BCHW.new_full((len(x_BCHW),), self._lead_time(frame - self.protocol.initial))
            labels = None if mask_B is None else truth_BFCHW[:, index]
            outputs.append(self.network(x_BCHW, time_B, pixel_mask=mask_B, labels=labels).output.float())
        return torch.stack(outputs, dim=1), truth_BFCHW

    def _rollout(
        self, samples: Sequence[int], x_BCHW: Tensor, truth_BFCHW: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Scored states of a rollout, (B, F, C, H, W)."""
        steps = self.protocol.steps
        span = sum(steps)
        per_step = len(self.protocol.frames) == len(steps)
        labels = None if mask is None else truth_BFCHW if per_step else truth_BFCHW[:, -1]
        states = rollout(
            self.network,
            x_BCHW,
            self._lead_time(span),
            [step / span for step in steps],
            static_channels=self.static,
            feed_static="truth" if self.protocol.static == "truth" else "prediction",
            pixel_mask=mask,
            labels=labels,
        ).states.float()
        return states if per_step else states[:, -1:]

    def _lead_time(self, snapshots: float) -> float:
        """Lead time as the network knows it."""
        return STEADY_LEAD_TIME if self.spec.steady else snapshots / self.spec.time_scale

    def _truth(self, samples: Sequence[int], frames: Sequence[int]) -> Tensor:
        """Normalised labels (B, F, C, H, W)."""
        return self._tensor(self.normalizer.normalize_outputs(self.reader.outputs(samples, frames)))

    def _tensor(self, values: NDArray[np.float32]) -> Tensor:
        return torch.from_numpy(values).to(self.device)
