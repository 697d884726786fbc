"""A schedule as numbers ready for the device, and one run of it.

With o the network's output at node k, the data prediction is x0 = a x + b o. A row of history holds
x0 / b = o + (a / b) x, made by one addition; b is folded into the weights, so that the next state is
r x + w rows, one product of a matrix with a vector. Rows lie in a ring as long as the schedule looks back.

Shapes: N steps, M rows of the ring, state (B, C, ...), flat (F,) with F = B C ...
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from thalweg.diffusion.solvers.compile import Row
from thalweg.diffusion.solvers.linear import Compilable
from thalweg.diffusion.solvers.sample import check_channels
from thalweg.diffusion.solvers.schedule import Node


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Numbers of all steps of a run."""

    ratio: tuple[float, ...]
    """r, factor of the state in the next one."""
    mix: tuple[float, ...]
    """a / b, factor of the state beside the output in a row."""
    scale: tuple[float, ...]
    """b; used where rows hold the data prediction itself, because it is clipped."""
    weights: tuple[tuple[float, ...], ...]
    """w, weights of the M rows of the ring; row j mod M belongs to node j."""
    spans: tuple[tuple[int, int], ...]
    """First row of the ring with a weight in the step, and the one after the last."""
    clip: float | None
    """Bound of the data prediction."""
    bias: tuple[float, ...]
    """Constants that the steps add."""

    @classmethod
    def of(cls, schedule: Compilable, output: str, clip: float | None, end_scale: float = 1.0) -> Plan:
        """Compile a schedule for a network with a kind of output.

        Args:
            schedule: What to do. A first step without the network is one whose output is the data itself.
            output: What the network predicts.
            clip: Bound of the data prediction.
            end_scale: Factor of the result.

        Raises:
            ValueError: If the output says nothing about the data at a node.
        """
        compiled = schedule.compile()
        ratio, weights = compiled.steps()
        bias = compiled.biases()
        for values in (ratio, weights, bias):
            values[-1] *= end_scale
        kinds = ["sample" if i == 0 and schedule.first != "network" else output for i in range(len(ratio))]
        pairs = zip(schedule.nodes, kinds, strict=False)
        a, b = np.array([data_of_output(node, kind, i) for i, (node, kind) in enumerate(pairs)]).T
        if clip is None:
            weights = weights * b
        count = len(ratio)
        used = np.abs(weights) > 1e-13 * np.abs(weights).max(1, keepdims=True)
        size = max(k - int(np.argmax(used[k])) + 1 for k in range(count))
        ring = np.zeros((count, size))
        for k in range(count):
            for j in range(max(0, k - size + 1), k + 1):
                ring[k, j % size] = weights[k, j]
        return cls(
            ratio=tuple(ratio.tolist()),
            mix=tuple((a / b).tolist()),
            scale=tuple(b.tolist()),
            weights=tuple(map(tuple, ring.tolist())),
            spans=tuple(_span(row, k % size) for k, row in enumerate(ring)),
            clip=clip,
            bias=tuple(bias.tolist()),
        )


class Run:
    """State and history of one run; both in float32 at least.

    Args:
        plan: Numbers of the schedule.
        sample: First state, for shape, precision and device.
        begin: Node at which the run begins.
    """

    def __init__(self, plan: Plan, sample: Tensor, begin: int) -> None:
        self.plan, self.begin, self.kind = plan, begin, _kind(sample)
        self.dtype = torch.promote_types(sample.dtype, torch.float32)
        self.shape = sample.shape
        options = {"dtype": self.dtype, "device": sample.device}
        size = len(plan.weights[0])
        # Not cleared: a step reads no row without a weight unless it lies between rows that are written.
        ring = torch.empty((size, *sample.shape), **options)
        self.rows = ring.unbind()
        matrix, spans = ring.view(size, -1).t(), [slice(*span) for span in plan.spans]
        vectors = torch.tensor(plan.weights, **options).unbind()
        self.parts = [(matrix[:, span], row[span]) for span, row in zip(spans, vectors, strict=True)]
        self.end = begin + len(plan.ratio)
        self.restart(sample)

    def fits(self, plan: Plan, sample: Tensor) -> bool:
        """Whether it can begin again with a plan and a first state."""
        return plan is self.plan and _kind(sample) == self.kind

    def restart(self, sample: Tensor) -> None:
        """Begin again, in the memory there is."""
        self.index = self.begin
        self.given: Tensor | None = None
        self.version: int | None = None
        self.flat = self.state = sample

    def step(self, output: Tensor, sample: Tensor) -> Tensor:
        """Next state from the network's output at this one, in the precision of ``sample``."""
        plan, k = self.plan, self.index - self.begin
        if sample is not self.given or self.version is None or sample._version != self.version:
            # Not what was returned last: the first state, or one that the pipeline has changed.
            self.state = sample.to(self.dtype)
            self.flat = self.state.reshape(-1)
        row = self.rows[k % len(self.rows)]
        torch.add(output, self.state, alpha=plan.mix[k], out=row)
        if plan.clip is not None:
            row.mul_(plan.scale[k]).clamp_(-plan.clip, plan.clip)
        self.flat = torch.addmv(self.flat, *self.parts[k], beta=plan.ratio[k])
        if plan.bias[k]:
            self.flat.add_(plan.bias[k])
        self.state = self.flat.view(self.shape)
        result = self.state if sample.dtype == self.dtype else self.state.to(sample.dtype)
        self.given, self.version = result, _version(result)
        self.index += 1
        return result


class ChannelRun:
    """A run whose channels have coefficients of their own: one run for each.

    Args:
        plans: Numbers of the schedule of each channel.
        sample: First state (B, K, ...).
        begin: Node at which the run begins.

    Raises:
        ValueError: If the state has other channels than there are plans.
    """

    def __init__(self, plans: Sequence[Plan], sample: Tensor, begin: int) -> None:
        check_channels(len(plans), sample)
        self.runs = [Run(plan, part, begin) for plan, part in zip(plans, sample.split(1, 1), strict=True)]
        self.end = self.runs[0].end
        self.given: Tensor | None = None
        self.version: int | None = None

    @property
    def index(self) -> int:
        """Node of the next step."""
        return self.runs[0].index

    def step(self, output: Tensor, sample: Tensor) -> Tensor:
        """Next state, as of one run."""
        same = sample is self.given and self.version is not None and sample._version == self.version
        states = [run.given for run in self.runs] if same else sample.split(1, 1)
        parts = zip(self.runs, output.split(1, 1), states, strict=True)
        result = torch.cat([run.step(one, state) for run, one, state in parts if state is not None], 1)
        self.given, self.version = result, _version(result)
        return result


def start_run(
    plans: Sequence[Plan], sample: Tensor, begin: int, last: Run | ChannelRun | None = None
) -> Run | ChannelRun:
    """One run for all channels, or for each; the last run again where it fits."""
    if isinstance(last, Run) and last.fits(plans[0], sample):
        last.restart(sample)
        return last
    return Run(plans[0], sample, begin) if len(plans) == 1 else ChannelRun(plans, sample, begin)


def _version(result: Tensor) -> int | None:
    """Number of changes in place so far; None where it is not counted, in inference mode."""
    return None if result.is_inference() else result._version


def _kind(sample: Tensor) -> tuple[object, ...]:
    """What the memory of a run depends on; what is made in inference mode cannot be written outside it."""
    return sample.shape, sample.dtype, sample.device, torch.is_inference_mode_enabled()


def _span(row: Row, newest: int) -> tuple[int, int]:
    """Where the weights of a step lie; the newest row alone if there is none."""
    used = np.flatnonzero(row)
    return (int(used[0]), int(used[-1]) + 1) if len(used) else (newest, newest + 1)


def data_of_output(node: Node, output: str, i: int) -> tuple[float, float]:
    """Numbers a, b of x0 = a x + b o.

    Raises:
        ValueError: For noise prediction at pure noise, which says nothing about the data.
    """
    alpha, sigma = node.alpha, node.sigma
    if output == "sample":
        return 0.0, 1.0
    if output == "v_prediction":
        return alpha / (alpha**2 + sigma**2), -sigma / (alpha**2 + sigma**2)
    if output == "edm":
        return alpha / (alpha**2 + sigma**2), sigma / (alpha**2 + sigma**2)
    if output == "flow_prediction":
        return 1 / (alpha + sigma), -sigma / (alpha + sigma)
    if alpha == 0:
        raise ValueError(f"node {i} is pure noise, where prediction_type epsilon says nothing about the data")
    return 1 / alpha, -sigma / alpha
