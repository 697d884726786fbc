"""Kronecker-factored preconditioner of PSGD, P = (Q_1^T Q_1) x ... x (Q_n^T Q_n), that whitens gradients.

Shapes: B tensors of one shape handled together, d_1 ... d_n their dimensions. A factor is a vector (B, d) for
a diagonal or an upper triangular (B, d, d). Source: Li 2018, arXiv:1512.04202; order of operations of
kron_torch 0.3.3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

NOISE = math.sqrt(torch.finfo(torch.float32).eps)
"""Relative size of the noise that keeps the fit away from exact zeros."""
MEMORY_MODES = (None, "one_diag", "smart_one_diag", "all_diag")
MERGES = (True, False, "square")


def merged_shape(shape: Sequence[int], merge: bool | str = True) -> tuple[int, ...]:
    """Shape in which a tensor is preconditioned; a scalar counts as a vector of one.

    Args:
        shape: Shape of the tensor.
        merge: `False` keeps every dimension. Otherwise more than two become a matrix, split before the last
            or after the first dimension: `True` takes the split with the smaller columns - rows (as the
            published code does), `"square"` the one closer to a square.

    Raises:
        ValueError: If `merge` is none of these.
    """
    if merge not in MERGES:
        raise ValueError(f"merge_dims is one of {MERGES}, not {merge!r}")
    shape = tuple(int(size) for size in shape) or (1,)
    if len(shape) < 3 or merge is False:
        return shape
    candidates = [(math.prod(shape[:-1]), shape[-1]), (shape[0], math.prod(shape[1:]))]
    if merge == "square":
        return min(candidates, key=lambda size: abs(size[1] - size[0]))
    return min(candidates, key=lambda size: size[1] - size[0])


def diagonal_modes(
    shape: Sequence[int], *, max_size: int = 8192, min_ndim: int = 2, memory_save_mode: str | None = None
) -> tuple[bool, ...]:
    """For every dimension, whether its factor is diagonal.

    Args:
        shape: Merged shape.
        max_size: Larger dimensions get a diagonal.
        min_ndim: Tensors of fewer dimensions get diagonals only.
        memory_save_mode: `"one_diag"` makes the largest dimension diagonal, `"smart_one_diag"` only when it
            is larger than the second largest, `"all_diag"` all of them.

    Raises:
        ValueError: If `memory_save_mode` is unknown.
    """
    if memory_save_mode not in MEMORY_MODES:
        raise ValueError(f"memory_save_mode is one of {MEMORY_MODES}, not {memory_save_mode!r}")
    order = sorted(range(len(shape)), key=lambda mode: shape[mode])
    largest = order[-1]
    single = memory_save_mode == "one_diag"
    if memory_save_mode == "smart_one_diag":
        single = len(shape) > 1 and shape[largest] > shape[order[-2]]
    everything = memory_save_mode == "all_diag" or len(shape) < min_ndim
    return tuple(
        everything or size == 1 or size > max_size or (single and mode == largest)
        for mode, size in enumerate(shape)
    )


def initial_factor(size: int, diagonal: bool, scale: float, modes: int, like: Tensor) -> Tensor:
    """Identity times scale^(1/modes), as a vector (d,) or a matrix (d, d)."""
    value = scale ** (1.0 / modes)
    if diagonal:
        return like.new_full((size,), value)
    return torch.eye(size, dtype=like.dtype, device=like.device) * value


def apply_factor(x: Tensor, factor: Tensor, mode: int, *, transpose: bool = False) -> Tensor:
    """Product of a factor, or its transpose, with dimension `mode` (from 0) of x (B, d_1, ...)."""
    moved = x.movedim(mode + 1, -1)
    if factor.ndim == 2:
        product = moved * factor.view(len(factor), *[1] * (moved.ndim - 2), -1)
    else:
        rows_BRd = moved.reshape(len(factor), -1, factor.shape[-1])
        product = (rows_BRd @ (factor if transpose else factor.mT)).reshape(moved.shape)
    return product.movedim(-1, mode + 1)


def apply_inverse_transpose(x: Tensor, factor: Tensor, mode: int) -> Tensor:
    """Product of the inverse transpose of a factor with dimension `mode` of x (B, d_1, ...)."""
    moved = x.movedim(mode + 1, -1)
    if factor.ndim == 2:
        solved = moved / factor.view(len(factor), *[1] * (moved.ndim - 2), -1)
    else:
        rows_BRd = moved.reshape(len(factor), -1, factor.shape[-1])
        solved = torch.linalg.solve_triangular(factor, rows_BRd, upper=True, left=False).reshape(moved.shape)
    return solved.movedim(-1, mode + 1)


def gram(x: Tensor, mode: int, diagonal: bool) -> Tensor:
    """X X^T of the unfolding of x (B, d_1, ...) along a dimension: (B, d, d), or its diagonal (B, d)."""
    rows_BRd = x.movedim(mode + 1, -1).reshape(len(x), -1, x.shape[mode + 1])
    if diagonal:
        return rows_BRd.square().sum(1)
    return rows_BRd.mT @ rows_BRd


def norm_lower_bound(a_Bdd: Tensor) -> Tensor:
    """Lower bound (B,) of spectral norms: one power step from the column of largest norm."""
    largest_B = a_Bdd.abs().amax((-2, -1))
    scaled = a_Bdd / torch.where(largest_B > 0, largest_B, 1.0)[:, None, None]
    index_B11 = scaled.square().sum(-2).argmax(-1)[:, None, None]
    column_B1d = scaled.gather(-1, index_B11.expand(-1, scaled.shape[-1], 1)).mT
    x_B1d = column_B1d @ scaled
    x_B1d = x_B1d / x_B1d.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(x_B1d.dtype).tiny)
    return (x_B1d @ scaled.mT).norm(dim=-1)[:, 0] * largest_B


def balance(factors: Sequence[Tensor]) -> list[Tensor]:
    """Factors whose largest entries are equal; their Kronecker product, and with it P, does not change."""
    norms = torch.stack([factor.abs().flatten(1).amax(1) for factor in factors])
    scales = norms.log().mean(0).exp() / norms
    return [
        factor * scale.view(-1, *[1] * (factor.ndim - 1))
        for factor, scale in zip(factors, scales, strict=True)
    ]


def add_noise(g: Tensor, probe: Tensor) -> Tensor:
    """Gradient (B, d_1, ...) plus a probe, small against the mean magnitude of each gradient."""
    mean = g.abs().flatten(1).mean(1)
    return g + NOISE * mean.view(-1, *[1] * (g.ndim - 1)) * probe


def update_factors(factors: Sequence[Tensor], g: Tensor, probe: Tensor, lr: float) -> list[Tensor]:
    r"""One step of the fit of the factors to a gradient.

    With A = (Q_1 x ... x Q_n) g and B = (Q_1 x ... x Q_n)^{-T} v:

        Q_k <- Q_k - lr triu(A_k A_k^T - B_k B_k^T) Q_k / lb(A_k A_k^T + B_k B_k^T),

    where A_k is the unfolding along dimension k and lb a lower bound of the spectral norm (the largest entry
    for a diagonal). A gradient that is zero everywhere says nothing and leaves the factors alone; without
    that they would grow by a factor 1 + lr with every such step.

    Args:
        factors: One per dimension, (B, d_k) or (B, d_k, d_k).
        g: Gradients (B, d_1, ..., d_n), with noise.
        probe: Standard normal numbers of the same shape.
        lr: Step of the fit.
    """
    a, b = g, probe
    for mode, factor in enumerate(factors):
        a = apply_factor(a, factor, mode)
        b = apply_inverse_transpose(b, factor, mode)
    alive_B = g.abs().flatten(1).amax(1) > 0
    tiny = torch.finfo(g.dtype).tiny
    updated = []
    for mode, factor in enumerate(factors):
        diagonal = factor.ndim == 2
        first, second = gram(a, mode, diagonal), gram(b, mode, diagonal)
        total, difference = first + second, first - second
        size_B = total.amax(-1) if diagonal else norm_lower_bound(total)
        step_B = torch.where(alive_B, lr / size_B.clamp(min=tiny), 0.0)
        if diagonal:
            updated.append(factor - step_B[:, None] * difference * factor)
        else:
            updated.append(factor - step_B[:, None, None] * difference.triu() @ factor)
    return updated


def precondition(factors: Sequence[Tensor], g: Tensor) -> Tensor:
    """P g = (Q_1^T Q_1 x ... x Q_n^T Q_n) g for gradients (B, d_1, ..., d_n)."""
    for mode, factor in enumerate(factors):
        if factor.ndim == 3 and math.prod(g.shape[1:]) > factor.shape[-1] ** 2:
            # one product with the small matrix Q^T Q is cheaper than two with the long gradient
            g = apply_factor(g, factor.mT @ factor, mode)
        else:
            g = apply_factor(apply_factor(g, factor, mode), factor, mode, transpose=True)
    return g


def clip_rms(u: Tensor, limit: float = 1.1) -> Tensor:
    """Directions (B, ...) scaled down to a root mean square of at most `limit`."""
    rms = u.square().flatten(1).mean(1).sqrt()
    return u * (limit / (rms + 1e-12)).clamp(max=1.0).view(-1, *[1] * (u.ndim - 1))
