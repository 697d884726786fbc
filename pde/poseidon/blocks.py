"""Blocks of scOT: Swin v2 on the levels, ConvNeXt or ResNet on the skip connections.

Shapes: B batch, R/S token rows and columns, D width. Tokens stay on their grid (B R S D), which is the
channels-last layout of a convolution.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thalweg.pde.poseidon.attention import CosineAttention
from thalweg.pde.poseidon.config import ScOTConfig
from thalweg.pde.poseidon.fused import (
    depthwise_convolution,
    gelu_mlp,
    is_plain_linear,
    linear,
    runs_eagerly_on_cpu,
)
from thalweg.pde.poseidon.layers import ACTIVATIONS, DropPath, make_norm
from thalweg.pde.poseidon.windows import Windows


class Dense(nn.Module):
    """A linear layer under the name ``dense``, followed by dropout."""

    def __init__(self, features_in: int, features_out: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dense = nn.Linear(features_in, features_out)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Last dimension from features_in to features_out."""
        return self.dropout(linear(self.dense, x))


class WindowAttention(nn.Module):
    """Cut the grid into windows, attend within them, project, put the grid together again."""

    def __init__(self, config: ScOTConfig, level: int, windows: Windows) -> None:
        super().__init__()
        width, dropout = config.widths[level], config.attention_probs_dropout_prob
        trained = (config.pretrained_window_sizes or (0,) * config.num_levels)[level]
        attention = CosineAttention(
            width,
            config.num_heads[level],
            windows,
            scaled_by=(trained, trained) if trained else windows.window,
            qkv_bias=config.qkv_bias,
            dropout=dropout,
        )
        self.windows = windows
        self.add_module("self", attention)
        self.output = Dense(width, width, dropout)

    def forward(self, x_BRSD: Tensor) -> Tensor:
        """Shape kept."""
        if self.windows.shifted and runs_eagerly_on_cpu(x_BRSD) and self.self.separates():
            x_BND = self.windows.split_tiles(x_BRSD)
            return self.windows.join_tiles(self.output(self.self(x_BND, tiled=True)))
        x_XND = self.windows.split(x_BRSD)
        return self.windows.join(self.output(self.self(x_XND)))


class SwinBlock(nn.Module):
    """Swin v2 block with norms after the branches (arXiv 2111.09883, figure 1), conditioned on the lead time.

    x <- x + norm(attention(x), t);  x <- x + norm(mlp(x), t)
    """

    def __init__(self, config: ScOTConfig, level: int, *, shifted: bool, drop_path: float) -> None:
        super().__init__()
        width, hidden = config.widths[level], int(config.mlp_ratio * config.widths[level])
        norm = {"conditioned": config.use_conditioning, "eps": config.layer_norm_eps}
        shift = config.shifts[level] if shifted else (0, 0)
        windows = Windows(grid=config.grids[level], window=config.windows[level], shift=shift)
        self.attention = WindowAttention(config, level, windows)
        self.layernorm_before = make_norm(width, **norm)
        self.intermediate = Dense(width, hidden)
        self.activation = ACTIVATIONS[config.hidden_act]
        self.output = Dense(hidden, width, config.hidden_dropout_prob)
        self.layernorm_after = make_norm(width, **norm)
        self.drop_path = DropPath(drop_path)

    def forward(self, x_BRSD: Tensor, time_B: Tensor) -> Tensor:
        """Shape kept."""
        x_BRSD = self._add(x_BRSD, self.layernorm_before, self.attention(x_BRSD), time_B)
        return self._add(x_BRSD, self.layernorm_after, self._mlp(x_BRSD), time_B)

    def _add(self, x_BRSD: Tensor, norm: nn.Module, branch_BRSD: Tensor, time_B: Tensor) -> Tensor:
        if self.drop_path.active:
            return x_BRSD + self.drop_path(norm(branch_BRSD, time_B))
        return norm(branch_BRSD, time_B, x_BRSD)

    def _mlp(self, x_BRSD: Tensor) -> Tensor:
        first, second = self.intermediate.dense, self.output.dense
        return self.output.dropout(_feed_forward(x_BRSD, first, self.activation, second))


def _feed_forward(
    x: Tensor, first: nn.Module, activation: Callable[[Tensor], Tensor], second: nn.Module
) -> Tensor:
    # Replaced layers (adapters, quantisation) and hooks are called as modules.
    if activation is F.gelu and is_plain_linear(first) and is_plain_linear(second):
        return gelu_mlp(x, first.weight, first.bias, second.weight, second.bias)
    return linear(second, activation(linear(first, x)))


class ConvNeXtBlock(nn.Module):
    """ConvNeXt block (arXiv 2201.03545) with a conditioned norm; the layer scale is called ``weight``."""

    def __init__(self, width: int, *, conditioned: bool, eps: float) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = make_norm(width, conditioned=conditioned, eps=eps)
        self.pwconv1 = nn.Linear(width, 4 * width)
        self.pwconv2 = nn.Linear(4 * width, width)
        self.weight = nn.Parameter(torch.full((width,), 1e-6))

    def forward(self, x_BRSD: Tensor, time_B: Tensor) -> Tensor:
        """Shape kept."""
        x = depthwise_convolution(x_BRSD, self.dwconv)
        x = _feed_forward(self.norm(x, time_B), self.pwconv1, F.gelu, self.pwconv2)
        return torch.addcmul(x_BRSD, x, self.weight)


class ResNetBlock(nn.Module):
    """Two convolutions with batch norms (arXiv 1512.03385); ignores the lead time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(width)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x_BRSD: Tensor, time_B: Tensor) -> Tensor:
        """Shape kept."""
        x = F.leaky_relu(self.bn1(self.conv1(x_BRSD.permute(0, 3, 1, 2))))
        return x_BRSD + self.bn2(self.conv2(x)).permute(0, 2, 3, 1)
