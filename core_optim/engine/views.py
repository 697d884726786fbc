"""Flat and (rows, rest) views of parameters that share the memory, whatever its order.

Shapes: R rows (the first dimension), C the rest.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

View = Literal["flat", "rows"]


def as_real(x: Tensor) -> Tensor:
    """A complex tensor as real numbers with one more dimension of size 2; a real one as it is."""
    return torch.view_as_real(x) if x.is_complex() else x


def can_view(x: Tensor, view: View) -> bool:
    """Whether the elements lie without gaps, and for rows each row in one piece."""
    if x.is_contiguous():
        return True
    dense = _is_dense(x)
    if view == "flat" or not dense:
        return dense
    return x.shape[0] > 0 and x.stride(0) == math.prod(x.shape[1:])


def _is_dense(x: Tensor) -> bool:
    expected = 1
    for size, stride in sorted(zip(x.shape, x.stride()), key=lambda pair: pair[1]):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def shape_of(x: Tensor, view: View) -> tuple[int, ...]:
    """Shape of the view: (R C,) or (R, C); a scalar is one row."""
    if view == "flat":
        return (x.numel(),)
    rows = x.shape[0] if x.dim() else 1
    return (rows, math.prod(x.shape[1:]) if x.dim() else 1)


def viewed(x: Tensor, view: View) -> Tensor:
    """View of a tensor that ``can_view``."""
    shape = shape_of(x, view)
    if x.is_contiguous():
        return x.view(shape)
    strides = (1,) if view == "flat" else (shape[1], 1)
    return x.as_strided(shape, strides, x.storage_offset())


def like_order(x: Tensor, model: Tensor) -> Tensor:
    """The tensor, in the memory order of another of the same shape."""
    if x.stride() == model.stride() or (x.is_contiguous() and model.is_contiguous()):
        return x
    return torch.empty_strided(model.shape, model.stride(), dtype=x.dtype, device=x.device).copy_(x)
