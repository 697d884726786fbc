"""Row normalisation and whitening of gradients, as in SWAN.

Shapes: M rows, N columns, M <= N, one matrix or a batch (B, M, N).  Whitening is (G Gᵀ)^-1/2 G by the coupled
Newton-Schulz iteration; with beta = 1/2 it converges to the polar factor U Vᵀ, with beta = 0.8 the singular
values stay within [0.56, 1.60].  Source: Ma et al. 2024, arXiv:2412.13148 (SWAN); no official code exists,
and its settings are those of independent reimplementations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from thalweg.core_optim.linalg.symmetric import symmetric_product

VARIANTS = ("full", "diagonal")
"""Names of the option ``variant``."""


def normalise_rows(g: Tensor, eps: float, *, centre: bool = False) -> Tensor:
    """Rows divided by their root mean square, sqrt(mean(g²) + eps); zero rows stay zero.

    Args:
        g: Matrices.
        eps: Added to the mean square.
        centre: Subtract the mean of each row first. A square matrix is then never of full rank.
    """
    if centre:
        g = g - g.mean(-1, keepdim=True)
    return g / (g.square().mean(-1, keepdim=True) + eps).sqrt()


def whiten(g: Tensor, steps: int, beta: float, variant: str = "full") -> Tensor:
    """Nearly orthogonal rows, rescaled to the Frobenius norm sqrt(M N).

    With X = G / ‖G‖_F, Y = X Xᵀ, Z = I, ``full`` repeats  R = 3 I - Z Y,  Y <- beta Y R,  Z <- beta R Z;
    ``diagonal`` puts the diagonals z and y in the place of Z and Y where that avoids products,
    Y <- beta Y diag(3 - z y),  Z <- beta (3 I - diag(z) Y) diag(z).  The result is a multiple of Z X.

    Args:
        g: Matrices with M <= N; zero ones stay zero.
        steps: Number of iterations.
        beta: Factor of the iteration.
        variant: ``full`` or ``diagonal``.

    Raises:
        ValueError: For another variant.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant is {variant!r}, allowed: {', '.join(VARIANTS)}")
    tiny = torch.finfo(g.dtype).tiny
    x = g / torch.linalg.vector_norm(g, dim=(-2, -1), keepdim=True).clamp_min(tiny)
    y = symmetric_product(x, x.mT)
    z = (_full if variant == "full" else _diagonal)(y, steps, beta)
    out = x if z is None else z @ x
    size = (g.shape[-2] * g.shape[-1]) ** 0.5
    return out / torch.linalg.vector_norm(out, dim=(-2, -1), keepdim=True).clamp_min(tiny) * size


def _full(y: Tensor, steps: int, beta: float) -> Tensor | None:
    z: Tensor | None = None
    for step in range(steps):
        r = -(y if z is None else symmetric_product(z, y))
        r.diagonal(dim1=-2, dim2=-1).add_(3.0)
        z = beta * (r if z is None else symmetric_product(r, z))
        if step + 1 < steps:
            y = symmetric_product(y, r).mul_(beta)
    return z


def _diagonal(y: Tensor, steps: int, beta: float) -> Tensor | None:
    z: Tensor | None = None
    for _ in range(steps):
        row = y.diagonal(dim1=-2, dim2=-1)
        scale = torch.ones_like(row) if z is None else z.diagonal(dim1=-2, dim2=-1)
        z = -(scale[..., :, None] * y)
        z.diagonal(dim1=-2, dim2=-1).add_(3.0)
        z = beta * z * scale[..., None, :]
        y = beta * y * (3.0 - scale * row)[..., None, :]
    return z
