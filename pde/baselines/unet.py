"""Residual U-Net conditioned on the lead time: the convolutional baseline.

Ronneberger et al. 2015, "U-Net"; blocks and conditioning (scale and shift after group norm) as in Gupta &
Brandstetter 2022, "Towards Multi-spatiotemporal-scale Generalized PDE Modeling".

Shapes: B batch, C channels, D embedding, H/W space.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from thalweg.pde.baselines.operator import BaselineOperator, OperatorConfig

Padding = Literal["zeros", "circular"]


@dataclass(frozen=True, kw_only=True, slots=True)
class UNetConfig(OperatorConfig):
    """Size of the U-Net."""

    width: int = 32
    """Channels of the finest level."""
    multipliers: tuple[int, ...] = (1, 2, 4, 8)
    """Channels of each level over ``width``, fine to coarse; the grid halves between levels."""
    blocks: int = 2
    """Residual blocks per level, on the way down and on the way up."""
    padding: Padding = "zeros"
    """Padding of the convolutions; circular for periodic domains."""


class UNetOperator(BaselineOperator):
    """U-Net with the calling conventions of scOT."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config: UNetConfig = config
        widths = [config.width * m for m in config.multipliers]
        embedding = 4 * config.width
        self.time = LeadTimeEmbedding(embedding) if config.use_conditioning else None

        def block(inputs: int, outputs: int) -> ResidualBlock:
            return ResidualBlock(inputs, outputs, embedding if config.use_conditioning else 0, config.padding)

        self.stem = _conv(config.num_channels, widths[0], config.padding)
        self.down, self.shrink = nn.ModuleList(), nn.ModuleList()
        self.up, self.grow = nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(widths):
            first = widths[max(level - 1, 0)]
            if level:
                self.shrink.append(_conv(first, first, config.padding, stride=2))
            sizes = [first, *[width] * config.blocks]
            self.down.append(nn.ModuleList(block(a, b) for a, b in pairwise(sizes)))
        for level in reversed(range(len(widths) - 1)):
            width, below = widths[level], widths[level + 1]
            self.grow.append(_conv(below, width, config.padding))
            sizes = [2 * width, *[width] * config.blocks]
            self.up.append(nn.ModuleList(block(a, b) for a, b in pairwise(sizes)))
        self.norm = _norm(widths[0])
        self.head = _conv(widths[0], config.num_out_channels, config.padding)

    def predict(self, x_BCHW: Tensor, time_B: Tensor) -> Tensor:
        """Encoder, decoder and skip connections.

        Raises:
            ValueError: If the grid cannot be halved as often as there are levels.
        """
        factor = 2 ** (len(self.config.multipliers) - 1)
        if any(n % factor for n in x_BCHW.shape[-2:]):
            raise ValueError(f"the U-Net needs sides divisible by {factor}, not {tuple(x_BCHW.shape[-2:])}")
        time_BD = None if self.time is None else self.time(time_B.to(x_BCHW))
        x, skips = self.stem(x_BCHW), []
        for level, blocks in enumerate(self.down):
            if level:
                skips.append(x)
                x = self.shrink[level - 1](x)
            x = self._run(blocks, x, time_BD)
        for grow, blocks in zip(self.grow, self.up, strict=True):
            x = grow(F.interpolate(x, scale_factor=2.0, mode="nearest"))
            x = self._run(blocks, torch.cat([x, skips.pop()], dim=1), time_BD)
        output: Tensor = self.head(F.silu(self.norm(x)))
        return output

    def wrap_modules(self) -> list[nn.Module]:
        """The residual blocks."""
        return [m for m in self.modules() if isinstance(m, ResidualBlock)]

    def _run(self, blocks: nn.Module, x: Tensor, time_BD: Tensor | None) -> Tensor:
        """Apply the blocks of a level, recomputing them backwards if asked to."""
        for block in blocks.children():
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, time_BD, use_reentrant=False)
            else:
                x = block(x, time_BD)
        return x


class ResidualBlock(nn.Module):
    """Two convolutions; the lead time scales and shifts between them."""

    def __init__(self, inputs: int, outputs: int, embedding: int, padding: Padding) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(inputs), _conv(inputs, outputs, padding)
        self.norm2, self.conv2 = _norm(outputs), _conv(outputs, outputs, padding)
        self.modulation = nn.Linear(embedding, 2 * outputs) if embedding else None
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x_BCHW: Tensor, time_BD: Tensor | None) -> Tensor:
        """Input plus correction, shape (B, outputs, H, W)."""
        h = self.norm2(self.conv1(F.silu(self.norm1(x_BCHW))))
        if self.modulation is not None:
            scale, shift = self.modulation(time_BD)[..., None, None].chunk(2, dim=1)
            h = h * (1 + scale) + shift
        output: Tensor = self.skip(x_BCHW) + self.conv2(F.silu(h))
        return output


class LeadTimeEmbedding(nn.Module):
    """Fourier features of the lead time, half to sixteen periods per unit, and a small network."""

    frequencies: Tensor

    def __init__(self, width: int, features: int = 32) -> None:
        super().__init__()
        frequencies = math.pi * torch.logspace(0, 5, features // 2, base=2.0)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.layers = nn.Sequential(nn.Linear(features + 1, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, time_B: Tensor) -> Tensor:
        """Embedding of shape (B, D)."""
        angle = time_B[:, None] * self.frequencies
        embedding: Tensor = F.silu(self.layers(torch.cat([time_B[:, None], angle.sin(), angle.cos()], dim=1)))
        return embedding


def _conv(inputs: int, outputs: int, padding: Padding, stride: int = 1) -> nn.Conv2d:
    """3 x 3 convolution that keeps (or halves) the grid."""
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, padding_mode=padding)


def _norm(channels: int) -> nn.GroupNorm:
    """Group norm with up to eight groups."""
    return nn.GroupNorm(math.gcd(8, channels), channels)
