"""Loss of scOT: relative p-norm errors of physical quantities, as ratios of batch means.

Shapes: B batch, C channels, H/W space. All fields are normalised.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

_TINY = 1e-10


def apply_mask(pred_BCHW: Tensor, labels_BCHW: Tensor | None, pixel_mask: Tensor | None) -> Tensor:
    """Prediction with masked values replaced by the labels, so that they carry neither error nor gradient.

    Args:
        pred_BCHW: prediction; left untouched.
        labels_BCHW: targets, required with a mask.
        pixel_mask: bool, (B, C) for whole channels or (B, C, H, W), True where masked.

    Raises:
        ValueError: if the mask comes without labels or does not fit.
    """
    if pixel_mask is None:
        return pred_BCHW
    if labels_BCHW is None:
        raise ValueError("pixel_mask takes its values from labels: pass labels with it")
    if pixel_mask.shape not in (pred_BCHW.shape, pred_BCHW.shape[:2]):
        shape = tuple(pred_BCHW.shape)
        raise ValueError(f"pixel_mask has shape {tuple(pixel_mask.shape)}, expected {shape[:2]} or {shape}")
    if pixel_mask.ndim == 2:
        pixel_mask = pixel_mask[:, :, None, None]
    return torch.where(pixel_mask.bool(), labels_BCHW.to(pred_BCHW.dtype), pred_BCHW)


def operator_loss(
    pred: Tensor,
    labels: Tensor,
    channel_slices: Sequence[int] | None,
    p: int = 1,
    pixel_mask: Tensor | None = None,
) -> Tensor:
    """Mean over channel groups of  mean|pred - labels|^p / (mean|labels|^p + 1e-10).

    The means run over the whole batch, the channels of the group and all points (Poseidon, arXiv 2405.19101,
    appendix on training; the tiny constant is part of the published loss). Masked groups count with error 0.

    Args:
        pred: prediction (B, C, H, W).
        labels: targets of the same shape.
        channel_slices: group boundaries such as (0, 1, 3, 4); None for the plain mean of |pred - labels|^p.
        p: 1 or 2.
        pixel_mask: see :func:`apply_mask`.

    Raises:
        ValueError: if shapes differ or p is neither 1 nor 2.
    """
    if pred.shape != labels.shape:
        raise ValueError(f"prediction {tuple(pred.shape)} and labels {tuple(labels.shape)} differ in shape")
    if p not in (1, 2):
        raise ValueError(f"p must be 1 or 2, got {p}")
    wide = torch.promote_types(pred.dtype, torch.float32)
    pred, labels = apply_mask(pred, labels, pixel_mask).to(wide), labels.to(wide)
    error, size = (_power(pred - labels, p), _power(labels, p))
    if channel_slices is None:
        return error.mean()
    ratios = [error[:, a:b].mean() / (size[:, a:b].mean() + _TINY) for a, b in pairwise(channel_slices)]
    return torch.stack(ratios).mean()


def _power(x: Tensor, p: int) -> Tensor:
    return x.abs() if p == 1 else x.square()
