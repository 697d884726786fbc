"""Pieces of scOT around its blocks: conditional norms, patches to tokens and back, changes of resolution.

Shapes: B batch, C channels, H/W space, R/S token rows and columns, D width. Tokens stay on a grid (B R S D).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thalweg.pde.poseidon.fused import linear, modulated_norm
from thalweg.pde.poseidon.windows import crop

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


class ConditionalLayerNorm(nn.Module):
    """Layer norm whose gain and shift are affine in the lead time (Poseidon, arXiv 2405.19101, Eq. 6).

    The parameters belong to two linear maps of one scalar, called ``weight`` and ``bias``.
    """

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Linear(1, width)
        self.bias = nn.Linear(1, width)

    def forward(self, x_BRSD: Tensor, time_B: Tensor, residual_BRSD: Tensor | None = None) -> Tensor:
        """Normalise over the width and modulate, in float32 at least; returned in the parameters' dtype.

        The residual, if given, is added to the result.
        """
        x = x_BRSD.to(torch.promote_types(x_BRSD.dtype, torch.float32))
        gain, shift = _affine(self.weight, time_B).to(x.dtype), _affine(self.bias, time_B).to(x.dtype)
        if residual_BRSD is not None and residual_BRSD.dtype == x.dtype == self.weight.weight.dtype:
            return modulated_norm(x, gain, shift, self.eps, residual_BRSD)
        out = modulated_norm(x, gain, shift, self.eps).to(self.weight.weight.dtype)
        return out if residual_BRSD is None else residual_BRSD + out


def _affine(linear: nn.Linear, time_B: Tensor) -> Tensor:
    """Value of a map of one scalar, shape (B, 1, 1, D); written out so that autocast leaves it alone."""
    return torch.addcmul(linear.bias, time_B.view(-1, 1, 1, 1), linear.weight.squeeze(1))


class PlainLayerNorm(nn.LayerNorm):
    """Layer norm of a network without conditioning: takes the lead time and ignores it."""

    def forward(self, x_BRSD: Tensor, time_B: Tensor, residual_BRSD: Tensor | None = None) -> Tensor:
        """Normalise over the width; the residual, if given, is added to the result."""
        out = super().forward(x_BRSD)
        return out if residual_BRSD is None else residual_BRSD + out


def make_norm(width: int, *, conditioned: bool, eps: float = 1e-5) -> ConditionalLayerNorm | PlainLayerNorm:
    """Norm over the width, with or without conditioning on the lead time."""
    return ConditionalLayerNorm(width, eps) if conditioned else PlainLayerNorm(width, eps)


class DropPath(nn.Module):
    """Drop a residual branch for whole samples (stochastic depth, arXiv 1603.09382)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    @property
    def active(self) -> bool:
        """Whether anything is dropped."""
        return self.rate > 0.0 and self.training

    def forward(self, x: Tensor) -> Tensor:
        """Zero the branch of a sample with the given rate and rescale the others."""
        if not self.active:
            return x
        kept = x.new_empty(x.shape[:1] + (1,) * (x.ndim - 1)).bernoulli_(1 - self.rate)
        return x * kept / (1 - self.rate)


class PatchProjection(nn.Module):
    """Patches to tokens: a convolution with stride equal to its kernel, done as one matrix product."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.projection = nn.Conv2d(channels, width, patch, patch)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Tokens (B, R, S, D); incomplete patches are filled with zeros."""
        n, (height, width) = self.patch, x_BCHW.shape[-2:]
        x = F.pad(x_BCHW, (0, -width % n, 0, -height % n))
        patches = x.unflatten(3, (-1, n)).unflatten(2, (-1, n)).permute(0, 2, 4, 1, 3, 5).flatten(3)
        return F.linear(patches, self.projection.weight.flatten(1), self.projection.bias)


class Embeddings(nn.Module):
    """Patch tokens, normalised, with optional mask token and absolute positions."""

    def __init__(
        self,
        channels: int,
        width: int,
        patch: int,
        *,
        conditioned: bool,
        num_positions: int = 0,
        mask_token: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.patch_embeddings = PatchProjection(channels, width, patch)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width)) if mask_token else None
        self.position_embeddings = (
            nn.Parameter(torch.zeros(1, num_positions, width)) if num_positions else None
        )
        self.norm = make_norm(width, conditioned=conditioned)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BCHW: Tensor, time_B: Tensor, masked_BN: Tensor | None = None) -> Tensor:
        """Tokens (B, R, S, D). ``masked_BN`` marks patches, row by row, that the mask token replaces."""
        x = self.norm(self.patch_embeddings(x_BCHW), time_B)
        if masked_BN is not None:
            if self.mask_token is None:
                raise ValueError("bool_masked_pos needs a network built with use_mask_token=True")
            masked = masked_BN.reshape(*x.shape[:3], 1)
            x = torch.where(masked.bool(), self.mask_token[:, None].to(x.dtype), x)
        if self.position_embeddings is not None:
            x = x + self.position_embeddings.view(1, *x.shape[1:])
        return self.dropout(x)


class PatchMerging(nn.Module):
    """Halve the grid: 2 x 2 tokens become one of twice the width."""

    def __init__(self, width: int, *, conditioned: bool) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)
        self.norm = make_norm(2 * width, conditioned=conditioned)

    def forward(self, x_BRSD: Tensor, time_B: Tensor) -> Tensor:
        """Shape (B, ceil(R/2), ceil(S/2), 2D). The four tokens are joined in column-major order."""
        x = F.pad(x_BRSD, (0, 0, 0, x_BRSD.shape[2] % 2, 0, x_BRSD.shape[1] % 2))
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2, 5).flatten(3)
        return self.norm(linear(self.reduction, x), time_B)


class PatchUnmerging(nn.Module):
    """Double the grid: one token becomes 2 x 2 of half the width, cropped to the finer level's grid."""

    def __init__(self, width: int, grid: tuple[int, int], *, conditioned: bool) -> None:
        super().__init__()
        self.grid = grid
        self.upsample = nn.Linear(width, 2 * width, bias=False)
        self.mixup = nn.Linear(width // 2, width // 2, bias=False)
        self.norm = make_norm(width // 2, conditioned=conditioned)

    def forward(self, x_BRSD: Tensor, time_B: Tensor) -> Tensor:
        """Shape (B, *grid, D/2)."""
        x = linear(self.upsample, x_BRSD).unflatten(-1, (2, 2, -1)).permute(0, 1, 3, 2, 4, 5)
        x = crop(x.flatten(3, 4).flatten(1, 2), self.grid)
        return linear(self.mixup, self.norm(x, time_B))


class PatchRecovery(nn.Module):
    """Tokens to fields: a transposed convolution with stride patch, then a 5 x 5 one across patches."""

    def __init__(self, width: int, channels: int, patch: int, image_shape: tuple[int, int]) -> None:
        super().__init__()
        self.image_shape = image_shape
        self.projection = nn.ConvTranspose2d(width, channels, patch, patch)
        self.mixup = nn.Conv2d(channels, channels, 5, padding=2, bias=False)

    def forward(self, x_BRSD: Tensor) -> Tensor:
        """Fields (B, C, H, W), cropped to the image."""
        weight_DCPP = self.projection.weight
        x = F.linear(x_BRSD, weight_DCPP.flatten(1).t()).unflatten(-1, weight_DCPP.shape[1:])
        x_BHWC = x.permute(0, 1, 4, 2, 5, 3).flatten(3, 4).flatten(1, 2)
        x_BHWC = crop(x_BHWC, self.image_shape) + self.projection.bias
        # Channels last, in which the backward pass of a convolution with few channels is twice as fast.
        return self.mixup(x_BHWC.permute(0, 3, 1, 2)).contiguous()
