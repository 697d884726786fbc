"""Windows of tokens: cutting a grid into them, putting it together again, and the mask of shifted windows.

Shapes: B batch, H/W token grid, D width, M windows of one grid, N tokens of one window.
Everything is plain shape arithmetic, so nothing has to be stored, moved between devices or kept in step.

A shifted grid can also be cut into tiles: the parts of its windows that the mask keeps apart, which are
rectangles of the grid as it is. Attention within tiles needs no roll and no mask, and at 2 x 2 windows 0.56
of the products.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# The shift mask is -100 and the published network adds it twice.
SHIFT_PENALTY = -200.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Windows:
    """How one block cuts its token grid (Swin v2, arXiv 2111.09883; Swin, arXiv 2103.14030, section 3.2)."""

    grid: tuple[int, int]
    """Rows and columns of the token grid."""
    window: tuple[int, int]
    """Rows and columns of one window."""
    shift: tuple[int, int] = (0, 0)
    """Rows and columns by which the grid is rolled up and left before it is cut."""

    @property
    def counts(self) -> tuple[int, int]:
        """Windows along rows and columns; the grid is padded with zeros at the bottom and on the right."""
        return -(-self.grid[0] // self.window[0]), -(-self.grid[1] // self.window[1])

    @property
    def num_windows(self) -> int:
        """Windows in one grid."""
        return self.counts[0] * self.counts[1]

    @property
    def shifted(self) -> bool:
        """Whether the grid is rolled, so that a mask separates tokens that are not neighbours."""
        return self.shift != (0, 0)

    @property
    def tiles(self) -> Counter[tuple[int, int]]:
        """How many tiles there are of every shape (rows, columns), in the order of :meth:`split_tiles`."""
        return Counter(sorted((b - a, d - c) for a, b, c, d in _tiles(self)))

    def split(self, x_BHWD: Tensor) -> Tensor:
        """Tokens by window, shape (B*M, N, D), windows in row-major order."""
        (height, width), (rows, cols), (h, w) = self.grid, self.counts, self.window
        bottom, right = rows * h - height, cols * w - width
        if bottom or right:
            x_BHWD = F.pad(x_BHWD, (0, 0, 0, right, 0, bottom))
        if self.shifted:
            x_BHWD = x_BHWD.roll((-self.shift[0], -self.shift[1]), (1, 2))
        x = x_BHWD.reshape(-1, rows, h, cols, w, x_BHWD.shape[-1])
        return x.transpose(2, 3).reshape(-1, h * w, x_BHWD.shape[-1])

    def join(self, x_XND: Tensor) -> Tensor:
        """Inverse of :meth:`split`: tokens on the grid, shape (B, H, W, D), padding removed."""
        (rows, cols), (h, w) = self.counts, self.window
        x = x_XND.reshape(-1, rows, cols, h, w, x_XND.shape[-1]).transpose(2, 3)
        x_BHWD = x.reshape(-1, rows * h, cols * w, x_XND.shape[-1])
        if self.shifted:
            x_BHWD = x_BHWD.roll(self.shift, (1, 2))
        return crop(x_BHWD, self.grid)

    def split_tiles(self, x_BHWD: Tensor) -> Tensor:
        """Tokens (B, N', D) of the padded grid, one tile after the other, tiles of one shape together."""
        (height, width), (rows, cols), (h, w) = self.grid, self.counts, self.window
        bottom, right = rows * h - height, cols * w - width
        if bottom or right:
            x_BHWD = F.pad(x_BHWD, (0, 0, 0, right, 0, bottom))
        return _Reorder.apply(x_BHWD.flatten(1, 2), *_tile_order(self))

    def join_tiles(self, x_BND: Tensor) -> Tensor:
        """Inverse of :meth:`split_tiles`: tokens on the grid, shape (B, H, W, D), padding removed."""
        there, back = _tile_order(self)
        padded = [n * w for n, w in zip(self.counts, self.window)]
        return crop(_Reorder.apply(x_BND, back, there).unflatten(1, padded), self.grid)

    def shift_mask(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Logit offset (M, N, N): 0 between tokens that touch on the unrolled grid, a penalty otherwise.

        Rolling brings opposite edges of the padded grid together. Along each axis the rolled grid falls into
        three regions with the cuts -window and -shift; tokens of different regions must not see each other.
        """
        (rows, cols), (h, w) = self.counts, self.window
        region_R = _regions(rows * h, h, self.shift[0], device)
        region_C = _regions(cols * w, w, self.shift[1], device)
        label_HW = 3 * region_R[:, None] + region_C[None, :]
        label_MN = label_HW.reshape(rows, h, cols, w).transpose(1, 2).reshape(rows * cols, h * w)
        differs_MNN = label_MN[:, :, None] != label_MN[:, None, :]
        return differs_MNN.to(dtype) * SHIFT_PENALTY


def crop(x_BHWD: Tensor, grid: tuple[int, int]) -> Tensor:
    """Upper left part of a token grid; the tensor itself if nothing is cut, which spares autograd a copy."""
    return x_BHWD if x_BHWD.shape[1:3] == grid else x_BHWD[:, : grid[0], : grid[1]]


def _regions(size: int, window: int, shift: int, device: torch.device) -> Tensor:
    """Region number 0, 1 or 2 of every position along one axis; a single region if the axis is not rolled."""
    position = torch.arange(size, device=device)
    if shift == 0:
        return torch.zeros_like(position, dtype=torch.uint8)
    return (position >= size - window).byte() + (position >= size - shift).byte()


def _tiles(windows: Windows) -> list[tuple[int, int, int, int]]:
    """First and last row, first and last column of every tile (ends excluded)."""
    axes = []
    for count, window, shift in zip(windows.counts, windows.window, windows.shift):
        inner = range(shift, count * window, window)
        axes.append(list(pairwise(sorted({0, *inner, count * window}))))
    return [(*rows, *cols) for rows in axes[0] for cols in axes[1]]


@lru_cache(maxsize=64)
def _tile_order(windows: Windows) -> tuple[Tensor, Tensor]:
    """Index on the padded grid of every token in the order of tiles, and the inverse (on CPU)."""
    with torch.inference_mode(False):
        rows, cols = (n * w for n, w in zip(windows.counts, windows.window))
        index_HW = torch.arange(rows * cols, device="cpu").view(rows, cols)
        tiles = sorted(_tiles(windows), key=lambda t: (t[1] - t[0], t[3] - t[2]))
        there = torch.cat([index_HW[a:b, c:d].flatten() for a, b, c, d in tiles])
        return there, there.argsort()


class _Reorder(torch.autograd.Function):
    """Permute tokens; the gradient is gathered as well, where that of indexing would be scattered."""

    @staticmethod
    def forward(ctx: Any, x_BND: Tensor, order_N: Tensor, inverse_N: Tensor) -> Tensor:
        ctx.orders = order_N, inverse_N
        return x_BND.index_select(1, order_N)

    @staticmethod
    def backward(ctx: Any, grad_BND: Tensor) -> tuple[Tensor, None, None]:
        order_N, inverse_N = ctx.orders
        return _Reorder.apply(grad_BND, inverse_N, order_N), None, None
