"""Projections of a gradient onto coordinates or a subspace (FRUGAL), as functions of gradient and key.

A projection P is a way (`columns`, `rows`, `randk`, `left`, `right`) with a key: indices (int64), or an
orthonormal basis. `project` is P, `embed` is P^T, and P P^T = I, so that g - embed(project(g)) is orthogonal
to everything projected. Shapes: a gradient of any shape for coordinates; (I, J) with a basis (J, R) on the
right or (I, R) on the left. Source: Zmushko et al. 2024, arXiv:2411.07837.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

COORDINATES = ("columns", "rows", "randk")
SIDES = ("left", "right")
BLOCK_ORDERS = ("random", "ascending", "descending", "mirror")


def _dimension(way: str) -> int:
    return 0 if way == "rows" else -1


def coordinate_count(shape: Sequence[int], way: str, density: float) -> int:
    """Number of coordinates kept: int(density * size of the last dimension, the first, or the whole tensor).

    Raises:
        ValueError: If `way` is unknown.
    """
    return int(coordinate_total(shape, way) * density)


def coordinate_total(shape: Sequence[int], way: str) -> int:
    """Number of coordinates to choose from; a scalar has one.

    Raises:
        ValueError: If `way` is unknown.
    """
    if way not in COORDINATES:
        raise ValueError(f"coord_choice is one of {COORDINATES}, not {way!r}")
    if way == "randk" or not shape:
        return int(torch.Size(shape).numel())
    return int(shape[_dimension(way)])


def subspace_side(shape: Sequence[int]) -> str:
    """Side of the smaller dimension, where the projection saves more: right for a matrix that is not wide."""
    return "right" if shape[0] >= shape[1] else "left"


def subspace_rank(shape: Sequence[int], density: float) -> int:
    """Rank of the projection of a matrix: round(density * smaller dimension)."""
    return round(min(shape) * density)


def svd_basis(g_IJ: Tensor, rank: int) -> Tensor:
    """Leading singular vectors of a gradient on its projected side: (J, R) or (I, R)."""
    u_IK, _, v_KJ = torch.linalg.svd(g_IJ, full_matrices=False)
    return (v_KJ[:rank].mT if subspace_side(g_IJ.shape) == "right" else u_IK[:, :rank]).contiguous()


def orthonormal(normal_SR: Tensor) -> Tensor:
    """Orthonormal basis (S, R), uniform over all of that rank when the input is standard normal."""
    q_SR, r_RR = torch.linalg.qr(normal_SR)
    sign_R = torch.where(r_RR.diagonal() < 0, -1.0, 1.0)
    return q_SR * sign_R


def project(g: Tensor, way: str, key: Tensor) -> Tensor:
    """P g: the chosen coordinates, or the components along a basis.

    Args:
        g: Gradient.
        way: One of `columns`, `rows`, `randk`, `left`, `right`.
        key: Indices (K,) or a basis (S, R).

    Raises:
        ValueError: If `way` is unknown.
    """
    if way == "randk":
        return g.reshape(-1)[key]
    if way in COORDINATES:
        return g.reshape(g.shape or (1,)).index_select(_dimension(way), key)
    if way == "right":
        return g @ key
    if way == "left":
        return key.mT @ g
    raise ValueError(f"a projection is one of {COORDINATES + SIDES}, not {way!r}")


def embed(low: Tensor, way: str, key: Tensor, shape: Sequence[int]) -> Tensor:
    """P^T x: back to the shape of the gradient, with zeros where nothing was chosen.

    Raises:
        ValueError: If `way` is unknown.
    """
    if way == "randk":
        return low.new_zeros(torch.Size(shape).numel()).index_copy(0, key, low).reshape(shape)
    if way in COORDINATES:
        full = low.new_zeros(tuple(shape) or (1,))
        return full.index_copy(_dimension(way), key, low).reshape(shape)
    if way == "right":
        return low @ key.mT
    if way == "left":
        return key @ low
    raise ValueError(f"a projection is one of {COORDINATES + SIDES}, not {way!r}")


def residual(g: Tensor, way: str, key: Tensor) -> Tensor:
    """G - P^T P g; exact zeros on chosen coordinates."""
    return g - embed(project(g, way, key), way, key, g.shape)


def active_blocks(
    count: int, density: float, turn: int, order: str, permutation: Sequence[int] = ()
) -> set[int]:
    """Positions of the whole tensors that have state in a period.

    round(count * density) tensors are active. They continue cyclically from turn to turn, from the first
    (`ascending`), from the last (`descending`), or from both ends by turns (`mirror`: first, last, second,
    ...).

    Args:
        count: Number of tensors.
        density: Share of them.
        turn: Number of the period, from 0.
        order: One of `random`, `ascending`, `descending`, `mirror`.
        permutation: For `random`, the order of this period.

    Raises:
        ValueError: If `order` is unknown.
    """
    if order not in BLOCK_ORDERS:
        raise ValueError(f"block_order is one of {BLOCK_ORDERS}, not {order!r}")
    number = round(count * density)
    if order == "random":
        return {int(position) for position in permutation[:number]}
    line = list(range(count)) if order != "descending" else list(reversed(range(count)))
    if order == "mirror":
        line = [line[-1 - place // 2] if place % 2 else line[place // 2] for place in range(count)]
    return {line[(turn * number + offset) % count] for offset in range(number)}


def projected_shape(shape: Sequence[int], way: str, number: int) -> tuple[int, ...]:
    """Shape of P g for a number of coordinates or a rank.

    Raises:
        ValueError: If `way` is unknown.
    """
    if way == "randk" or (way in COORDINATES and not shape):
        return (number,)
    if way == "rows" or way == "left":
        return (number, *shape[1:])
    if way == "columns" or way == "right":
        return (*shape[:-1], number)
    raise ValueError(f"a projection is one of {COORDINATES + SIDES}, not {way!r}")
