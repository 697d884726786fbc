"""Products of matrices that are known to be symmetric, at little more than half the multiplications.

Shapes: B batch, M and N rows and columns.  A product is ``alpha a b + beta c``.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST = 256
"""Side below which blocks cost more than they save."""


def multiply_add(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """``alpha a b + beta c``, or a b without c, of matrices (M, N) or batches (B, M, N) in one call."""
    if c is None:
        assert alpha == 1.0
        return torch.matmul(a, b, out=out)
    fused = torch.addmm if a.ndim == 2 else torch.baddbmm
    return fused(c, a, b, alpha=alpha, beta=beta, out=out)


def stripe_height(a: Tensor) -> int | None:
    """Rows per stripe for a product with ``a``, or None where the whole product is faster.

    Only single matrices on a CPU gain: a GPU is at its best with the whole product at once, and batched
    products of transposed slices are slow on CPUs.
    """
    side = a.shape[-2]
    if a.ndim != 2 or a.device.type != "cpu" or side < SMALLEST:
        return None
    return max(128, -(-side // 8))


def symmetric_product(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """``alpha a b + beta c`` where a b and c are symmetric, as for b = aᵀ or two polynomials of one matrix.

    Large single matrices on a CPU are computed in stripes of rows from the diagonal on and mirrored: with k
    stripes that is (k + 1) / 2k of the multiplications. ``out`` must be none of the factors.
    """
    height = stripe_height(a)
    if height is None:
        return multiply_add(a, b, c, alpha=alpha, beta=beta, out=out)
    side = a.shape[-2]
    out = a.new_empty(side, side) if out is None else out
    for start in range(0, side, height):
        stop = min(start + height, side)
        known = None if c is None else c[start:stop, start:]
        stripe = multiply_add(a[start:stop], b[:, start:], known, alpha=alpha, beta=beta)
        out[start:stop, start:] = stripe
        out[stop:, start:stop] = stripe[:, stop - start :].mT
    return out


def mix_outer_(average: Tensor, x: Tensor, weight: float) -> Tensor:
    """``average <- (1 - weight) average + weight x xᵀ`` in place, above the diagonal at least.

    Large single matrices on a CPU are updated in stripes of rows from the diagonal on; what lies below goes
    stale until `mirror_`.

    Args:
        average: Symmetric, (M, M) or (B, M, M).
        x: (M, N) or (B, M, N).
        weight: Share of the new product.
    """
    height = stripe_height(x)
    if height is None:
        fused = average.addmm_ if x.ndim == 2 else average.baddbmm_
        return fused(x, x.mT, alpha=weight, beta=1.0 - weight)
    side = x.shape[-2]
    for start in range(0, side, height):
        rows = slice(start, min(start + height, side))
        average[rows, start:].addmm_(x[rows], x[start:].mT, alpha=weight, beta=1.0 - weight)
    return average


def mirror_(average: Tensor) -> Tensor:
    """Copy what `mix_outer_` keeps above the diagonal below it, in place, for (M, M) or (B, M, M)."""
    one = average[0] if average.ndim == 3 and average.shape[0] == 1 else average
    height = stripe_height(one)
    if height is None:
        return average.copy_(average.triu() + average.triu(1).mT)
    for start in range(0, one.shape[-1], height):
        stop = start + height
        one[stop:, start:stop] = one[start:stop, stop:].mT
        inner = one[start:stop, start:stop]
        inner.copy_(inner.triu() + inner.triu(1).mT)
    return average
