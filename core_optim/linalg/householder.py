"""The orthogonal factor of a square matrix by blocked Householder reflections.

For single matrices on a CPU: all work but that of narrow panels is matrix products, which are faster than the
LAPACK routines behind ``torch.linalg.qr``.  Each panel of reflections is kept as I - V T Vᵀ (Schreiber and
Van Loan 1989).
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST = 384
"""Side below which LAPACK is as fast."""
PANEL = 64
"""Columns per panel; 128 from 2048 columns on."""


def orthogonal_factor(a: Tensor) -> Tensor:
    """Q of A = Q R for square matrices (D, D) or batches of them, up to the signs of its columns."""
    if a.ndim == 3 and a.shape[0] == 1:
        return orthogonal_factor(a[0])[None]
    if a.ndim == 3 or a.device.type != "cpu" or a.shape[-1] < SMALLEST:
        return torch.linalg.qr(a)[0]
    side = a.shape[-1]
    panels = _reduce(a.clone(), PANEL if side < 2048 else 2 * PANEL)
    return _accumulate(panels, a)


def _reduce(a: Tensor, width: int) -> list[tuple[int, Tensor, Tensor]]:
    """First row, V and V T of each panel; destroys the matrix, whose upper factor nobody needs."""
    side, panels = a.shape[-1], []
    for start in range(0, side, width):
        stop = min(start + width, side)
        packed, tau = torch.geqrf(a[start:, start:stop])
        v = packed.tril(-1)
        v.diagonal().fill_(1.0)
        v *= tau != 0  # a reflection that does nothing
        inverse = (v.mT @ v).triu(1)
        inverse.diagonal().copy_(torch.where(tau != 0, 1.0 / tau, 1.0))
        identity = torch.eye(stop - start, dtype=a.dtype)
        vt = v @ torch.linalg.solve_triangular(inverse, identity, upper=True)
        if stop < side:
            a[stop:, stop:].addmm_(v[stop - start :], vt.mT @ a[start:, stop:], alpha=-1.0)
        panels.append((start, v, vt))
    return panels


def _accumulate(panels: list[tuple[int, Tensor, Tensor]], like: Tensor) -> Tensor:
    """Product of the reflections, from the last panel back."""
    side = like.shape[-1]
    q = like.new_empty(side, side)
    for start, v, vt in reversed(panels):
        width = v.shape[1]
        stop = start + width
        q[start:, start:stop] = -(vt @ v[:width].mT)
        q.diagonal()[start:stop] += 1.0
        if stop < side:
            x = v[width:].mT @ q[stop:, stop:]
            q[stop:, stop:].addmm_(vt[width:], x, alpha=-1.0)
            q[start:stop, stop:] = -(vt[:width] @ x)
    return q
