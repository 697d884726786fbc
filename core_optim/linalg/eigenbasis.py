"""Eigenbases of SOAP: products along modes, averages of outer products, and one step of power iteration.

Shapes: B batch, d_1 ... d_n the modes of a tensor.  Each mode has an average of outer products GG (B, d, d)
and an orthogonal basis Q (B, d, d) whose columns are its eigenvectors by falling eigenvalue, or None where it
is left alone.  Source: Vyas et al. 2024, arXiv:2409.11321, algorithm 3, and nikhilvyas/SOAP.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from thalweg.core_optim.linalg.householder import orthogonal_factor
from thalweg.core_optim.linalg.symmetric import mirror_, mix_outer_

Bases = Sequence[Tensor | None]


def merged_shape(shape: Sequence[int], limit: int) -> tuple[int, ...]:
    """Shape with neighbouring dimensions merged from the left while their product stays within a limit."""
    merged: list[int] = []
    current = 1
    for size in shape:
        if current * size <= limit:
            current *= size
        elif current > 1:
            merged.append(current)
            current = size
        else:
            merged.append(size)
    if current > 1 or not merged:
        merged.append(current)
    return tuple(merged)


def _along(x: Tensor, mode: int) -> tuple[int, int, int]:
    """Sizes before, of and after a mode, the batch left out."""
    before = after = 1
    for k, size in enumerate(x.shape[1:]):
        if k < mode:
            before *= size
        elif k > mode:
            after *= size
    return before, x.shape[1 + mode], after


def multiply_mode(x: Tensor, q: Tensor, mode: int) -> Tensor:
    """Product along a mode, y[.., j, ..] = sum_i x[.., i, ..] q[i, j]; x (B, d_1, ..., d_n), q (B, d, d)."""
    before, size, after = _along(x, mode)
    batch = x.shape[0]
    if before == 1:
        y = q.mT @ x.reshape(batch, size, after)
    elif after == 1:
        y = x.reshape(batch, before, size) @ q
    else:
        rows = x.reshape(batch, before, size, after).transpose(2, 3).reshape(batch, before * after, size)
        y = (rows @ q).view(batch, before, after, size).transpose(2, 3)
    return y.reshape(x.shape)


def project(x: Tensor, bases: Bases) -> Tensor:
    """Tensor in the coordinates of its bases."""
    for mode, q in enumerate(bases):
        if q is not None:
            x = multiply_mode(x, q, mode)
    return x


def project_back(x: Tensor, bases: Bases) -> Tensor:
    """Tensor from the coordinates of its bases."""
    for mode, q in enumerate(bases):
        if q is not None:
            x = multiply_mode(x, q.mT, mode)
    return x


def average_outer_(average: Tensor, x: Tensor, mode: int, weight: float) -> Tensor:
    """``GG <- (1 - weight) GG + weight X Xᵀ`` in place, X the unfolding of x with the mode as rows.

    Large matrices are kept current above the diagonal only (see ``symmetric.mix_outer_``).
    """
    before, size, after = _along(x, mode)
    batch = x.shape[0]
    if before == 1:
        rows = x.reshape(batch, size, after)
    elif after == 1:
        rows = x.reshape(batch, before, size).mT
    else:
        rows = x.reshape(batch, before, size, after).transpose(1, 2).reshape(batch, size, before * after)
    if batch == 1:
        mix_outer_(average[0], rows[0], weight)
    else:
        mix_outer_(average, rows, weight)
    return average


def eigenbasis(average: Tensor) -> Tensor:
    """Eigenvectors of symmetric matrices (B, d, d) by falling eigenvalue; finite whatever is given.

    Should the decomposition fail, it is tried again in fp64 on a matrix with a small multiple of the identity
    added; what is not finite becomes the identity.
    """
    mirror_(average)
    identity = torch.eye(average.shape[-1], dtype=average.dtype, device=average.device)
    finite = torch.isfinite(average).all(-1).all(-1)[:, None, None]
    matrix = torch.where(finite, average, identity)
    try:
        q = torch.linalg.eigh(matrix)[1]
    except torch.linalg.LinAlgError:
        wide = matrix.double()
        scale = wide.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        q = torch.linalg.eigh(wide + 1e-9 * scale * identity)[1].to(average.dtype)
    return torch.where(torch.isfinite(q) & finite, q.flip(-1), identity)


def refresh_basis(average: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """One step of power iteration on a basis, sorted by falling estimated eigenvalue.

    Args:
        average: GG (B, d, d); what lies below its diagonal is brought up to date in place.
        q: Basis (B, d, d).

    Returns:
        The orthogonal factor of GG Q with sorted columns, and the order (B, d): column j comes from order[j].
        A basis that would not be finite stays as it is.
    """
    product = mirror_(average) @ q
    order = torch.argsort((product * q).sum(-2), dim=-1, descending=True, stable=True)
    # rows are sorted faster than columns
    found = orthogonal_factor(permute_mode(product.mT.contiguous(), order, 0).mT)
    return where_finite(found, lambda: permute_mode(q.mT, order, 0).mT), order


def where_finite(x: Tensor, otherwise: Callable[[], Tensor]) -> Tensor:
    """Matrices (B, d, d), those that are not finite everywhere replaced."""
    finite = torch.isfinite(x.sum((-2, -1), keepdim=True))
    if x.device.type == "cpu" and bool(finite.all()):
        return x
    return torch.where(finite, x, otherwise())


def change_bases(x: Tensor, old: Bases, new: Bases) -> Tensor:
    """Tensor from the coordinates of some bases to those of others."""
    sizes = x.shape[1:]
    for mode, (before, after) in enumerate(zip(old, new)):
        if before is None or after is None:
            continue
        if sizes[mode] ** 2 < sizes.numel():
            x = multiply_mode(x, before.mT @ after, mode)
        else:
            x = multiply_mode(multiply_mode(x, before.mT, mode), after, mode)
    return x


def permute_mode(x: Tensor, order: Tensor, mode: int) -> Tensor:
    """Tensor whose entries along a mode are put in an order (B, d)."""
    if x.shape[0] == 1:
        return x.index_select(1 + mode, order[0])
    shape = [1] * x.ndim
    shape[0], shape[1 + mode] = order.shape
    return x.gather(1 + mode, order.view(shape).expand_as(x))
