"""The interface of rewards, and the checks that every result passes.

Shapes: B images, C = 3 channels, H x W pixels, floats from 0 to 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

Metadata = Mapping[str, Any]


class RewardError(ValueError):
    """A reward that cannot be had: no weights, no server, or a result that is no reward."""


@dataclass(frozen=True, kw_only=True)
class RewardResult:
    """Scores of a batch, more is better."""

    scores: Tensor
    """(B,), double precision, on the CPU, finite."""
    parts: dict[str, Tensor] = field(default_factory=dict)
    """What else is worth logging, (B,) each; NaN where it does not apply to an image."""


class Reward(Protocol):
    """Scores images by their prompts. An object of this kind is used by one thread at a time."""

    name: str
    """What it is called in logs and errors."""

    def __call__(
        self, images_BCHW: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> RewardResult:
        """Scores of images (B, C, H, W) from 0 to 1, with a prompt and its metadata for each."""
        ...


def evaluate(
    reward: Reward, images_BCHW: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
) -> RewardResult:
    """Call a reward without gradients, and make sure that there is one finite score for each image.

    Raises:
        RewardError: If images, prompts and metadata differ in number, or the result is none.
    """
    shape = tuple(images_BCHW.shape)
    if len(shape) != 4 or shape[1] != 3 or not images_BCHW.is_floating_point():
        raise RewardError(
            f"images {shape} of {images_BCHW.dtype}, needed: (B, 3, H, W) of floats from 0 to 1"
        )
    count = shape[0]
    if not len(prompts) == len(metadata) == count:
        raise RewardError(
            f"{count} images, {len(prompts)} prompts, {len(metadata)} metadata: not equally many"
        )
    with torch.no_grad():
        return checked(reward.name, reward(images_BCHW, prompts, metadata), prompts)


def checked(name: str, result: Any, prompts: Sequence[str]) -> RewardResult:
    """The result in double precision on the CPU.

    Raises:
        RewardError: If it is no result, has another number of scores or parts than there are prompts, or has
            scores that are not finite; a NaN would spoil the mean of its whole group.
    """
    if not isinstance(result, RewardResult):
        raise RewardError(f"reward {name!r} gave a {type(result).__name__}, needed: a RewardResult")
    scores = _vector(name, "scores", result.scores, len(prompts))
    bad = (~torch.isfinite(scores)).nonzero().flatten().tolist()
    if bad:
        raise RewardError(
            f"reward {name!r} gave {float(scores[bad[0]])} for {len(bad)} of {len(prompts)} images, "
            f"the first is image {bad[0]} of prompt {prompts[bad[0]]!r}"
        )
    parts = {key: _vector(name, f"part {key!r}", part, len(prompts)) for key, part in result.parts.items()}
    return RewardResult(scores=scores, parts=parts)


def as_bytes(images_BCHW: Tensor) -> np.ndarray:
    """Bytes (B, H, W, C) of images from 0 to 1: 255 x, rounded with ties to even, then clamped."""
    pixels = (images_BCHW.detach() * 255).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def _vector(name: str, what: str, values: Any, count: int) -> Tensor:
    vector = torch.as_tensor(values).detach().double().cpu()
    if vector.shape != (count,):
        shape = tuple(vector.shape)
        raise RewardError(
            f"reward {name!r} gave {what} of shape {shape} for {count} images, needed: ({count},)"
        )
    return vector
