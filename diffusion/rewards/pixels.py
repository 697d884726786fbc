"""Rewards that are simple functions of the pixels, to test a trainer with: any policy should raise them soon.

Shapes: B images, C = 3 channels, H x W pixels, floats from 0 to 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from thalweg.diffusion.rewards.base import Metadata, RewardResult


@dataclass(frozen=True)
class PixelReward:
    """A function of the images alone."""

    name: str
    """In logs."""
    function: Callable[[Tensor], Tensor]
    """From images (B, C, H, W) to scores (B,)."""

    def __call__(
        self, images_BCHW: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> RewardResult:
        """Scores; prompts do not matter."""
        return RewardResult(scores=self.function(images_BCHW.clamp(0, 1).double()))


def saturation(device: str = "cpu") -> PixelReward:
    """Mean of max - min over the channels, from 0 (grey) to 1."""
    return PixelReward("saturation", lambda x: (x.amax(dim=1) - x.amin(dim=1)).mean(dim=(1, 2)))


def smoothness(device: str = "cpu") -> PixelReward:
    """Minus the total variation: mean absolute differences of neighbours, added over both directions."""
    return PixelReward("smoothness", lambda x: -(_variation(x, 2) + _variation(x, 3)))


def _variation(x_BCHW: Tensor, dim: int) -> Tensor:
    return x_BCHW.diff(dim=dim).abs().mean(dim=(1, 2, 3))
