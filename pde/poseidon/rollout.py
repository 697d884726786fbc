"""From one frame to a trajectory: direct prediction, equal steps, or any sequence of steps.

Works with every network that has scOT's forward signature.

Shapes: B batch, S steps, C channels, H/W space. All fields are normalised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Rollout(NamedTuple):
    """Predicted trajectory."""

    states: Tensor
    """Prediction after every step, (B, S, C, H, W)."""
    times: Tensor
    """Lead time reached after every step, (B, S)."""
    loss: Tensor | None = None
    """Mean of ``losses``."""
    losses: Tensor | None = None
    """Loss after every step, (S,), if labels were given."""

    @property
    def output(self) -> Tensor:
        """State after the last step, (B, C, H, W)."""
        return self.states[:, -1]


def step_fractions(steps: int | Sequence[float]) -> list[float]:
    """Fractions of the lead time per step: n equal ones for a number n, a sequence as it is.

    Raises:
        ValueError: if there is no step, or one that does not lead forward.
    """
    if isinstance(steps, int):
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        return [1.0 / steps] * steps
    fractions = [float(f) for f in steps]
    if not fractions or min(fractions) <= 0:
        raise ValueError(f"steps must be positive fractions of the lead time, got {list(steps)}")
    return fractions


def rollout(
    model: nn.Module,
    x: Tensor,
    lead_time: Tensor | float,
    steps: int | Sequence[float] = 1,
    *,
    static_channels: Sequence[int] = (),
    feed_static: str = "truth",
    truth: Callable[[int], Tensor] | None = None,
    pixel_mask: Tensor | None = None,
    labels: Tensor | None = None,
) -> Rollout:
    """Predict a trajectory by feeding predictions back (Poseidon, arXiv 2405.19101, section on inference).

    Gradients flow unless the caller disables them.

    Args:
        model: network with the signature of :meth:`ScOT.forward`.
        x: first frame (B, C_in, H, W). Input channels beyond the output channels are carried along unchanged.
        lead_time: total lead time, a number or one per sample.
        steps: 1 for a direct prediction, n for equal steps, or fractions of the lead time such as
            (0.25, 0.25, 0.5); fractions beyond a sum of 1 continue past the lead time.
        static_channels: output channels that do not evolve (wave speed, forcing, a constant density).
        feed_static: ``truth`` feeds static channels back from the first frame, so that they cannot drift;
            ``prediction`` feeds them back as predicted, as the published evaluation does.
        truth: fields (B, C, H, W) to take static channels from after step k = 0, 1, ...; for channels known
            in advance but not constant. The first frame if not given.
        pixel_mask: see ``ScOT.forward``; applied in every step.
        labels: targets (B, C, H, W) of the last step, used by every step as in the published evaluation, or
            (B, S, C, H, W) one per step.

    Raises:
        ValueError: if arguments contradict each other or the network cannot be iterated.
    """
    fractions = step_fractions(steps)
    _check(model, x, fractions, static_channels, feed_static, labels)
    time_B = torch.as_tensor(lead_time, dtype=x.dtype, device=x.device).expand(x.shape[0])
    static = list(static_channels) if feed_static == "truth" else []
    states, losses = [], []
    frame = x
    for k, fraction in enumerate(fractions):
        target = labels[:, k] if labels is not None and labels.ndim == 5 else labels
        result = model(frame, time_B * fraction, pixel_mask=pixel_mask, labels=target)
        states.append(result.output)
        losses.append(result.loss)
        if k + 1 < len(fractions):
            frame = _next_frame(result.output, x, static, truth(k) if truth is not None else x)
    times = torch.stack([time_B * f for f in _cumulated(fractions)], 1)
    if labels is None:
        return Rollout(torch.stack(states, 1), times)
    per_step = torch.stack(losses)
    return Rollout(torch.stack(states, 1), times, per_step.mean(), per_step)


def _next_frame(output: Tensor, first: Tensor, static: list[int], known: Tensor) -> Tensor:
    if first.shape[1] < output.shape[1]:
        raise ValueError(
            f"cannot feed {output.shape[1]} predicted channels into {first.shape[1]} input channels"
        )
    if static:
        output = output.clone()
        output[:, static] = known[:, static].to(output.dtype)
    return torch.cat([output, first[:, output.shape[1] :].to(output.dtype)], 1)


def _cumulated(fractions: list[float]) -> Iterator[float]:
    total = 0.0
    for fraction in fractions:
        total += fraction
        yield total


def _check(
    model: nn.Module,
    x: Tensor,
    fractions: list[float],
    static_channels: Sequence[int],
    feed_static: str,
    labels: Tensor | None,
) -> None:
    if feed_static not in ("truth", "prediction"):
        raise ValueError(f"feed_static is {feed_static!r}, allowed: truth, prediction")
    wrong = [c for c in static_channels if not 0 <= c < x.shape[1]]
    if wrong:
        raise ValueError(f"static channel {wrong[0]} does not exist among {x.shape[1]} channels")
    if len(fractions) > 1 and not getattr(getattr(model, "config", None), "use_conditioning", True):
        raise ValueError("a network without conditioning knows one lead time only: use steps=1")
    if labels is not None and labels.ndim == 5 and labels.shape[1] != len(fractions):
        raise ValueError(f"labels hold {labels.shape[1]} steps for a rollout of {len(fractions)}")
