"""Parameters cut over processes (DTensor, FSDP2): their local parts, their layout, and whole copies."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from thalweg.core_optim.engine.reduce import Layout


def is_sharded(x: Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    return isinstance(x, DTensor)


def local(x: Tensor) -> Tensor:
    """The part that this process holds; a plain tensor itself."""
    return x.to_local() if isinstance(x, DTensor) else x


def layout_of(x: Tensor) -> Layout:
    """Where the local part of a parameter lies.

    Raises:
        ValueError: If a parameter's first dimension is cut twice, or it is a sum that nobody has added up.
    """
    shape = tuple(x.shape)
    if x.is_complex():
        shape = (*shape, 2) if shape else (1, 2)
    if not isinstance(x, DTensor):
        return Layout(shape)
    groups: list[tuple[Any, int]] = []
    offset, cut = 0, False
    for axis, placement in enumerate(x.placements):
        if isinstance(placement, Replicate):
            continue
        if not isinstance(placement, Shard):
            raise ValueError(f"a parameter placed as {placement} cannot be optimised; shard or replicate it")
        groups.append((x.device_mesh.get_group(axis), placement.dim))
        if placement.dim == 0:
            if cut:
                raise ValueError(
                    "a parameter whose first dimension is cut over two mesh dimensions is not supported"
                )
            cut = True
            rows = x.shape[0] if x.dim() else 1
            offset = min(
                rows, x.device_mesh.get_local_rank(axis) * math.ceil(rows / x.device_mesh.size(axis))
            )
    return Layout(shape, tuple(groups), offset)


def numbers_of(x: Tensor) -> Tensor | int:
    """Where the elements of a local part are counted in the whole: from the first, or each (int32)."""
    if not isinstance(x, DTensor):
        return 0
    places = [range(size) for size in x.shape]
    for axis, placement in enumerate(x.placements):
        if isinstance(placement, Shard):
            own = places[placement.dim]
            step = math.ceil(len(own) / x.device_mesh.size(axis))
            first = step * x.device_mesh.get_local_rank(axis)
            places[placement.dim] = own[first : first + step]
    strides = [math.prod(x.shape[d + 1 :]) for d in range(x.dim())]
    if all(len(place) == size for place, size in zip(places[1:], x.shape[1:])):
        return (places[0].start if places and len(places[0]) else 0) * (
            strides[0] if strides else 1
        ) & 0x7FFFFFFF
    device = x.to_local().device
    found = torch.zeros((), dtype=torch.int64, device=device)
    for place, stride in zip(places, strides):
        found = found[..., None] + torch.arange(place.start, place.stop, device=device) * stride
    return (found.reshape(-1) & 0x7FFFFFFF).to(torch.int32)


def placement_key(x: Tensor) -> Any:
    """Equal for tensors whose parts may be handled together."""
    return (id(x.device_mesh), tuple(map(str, x.placements))) if isinstance(x, DTensor) else None


def aligned(gradient: Tensor, parameter: Tensor) -> Tensor:
    """The gradient, placed as its parameter is."""
    if not (isinstance(parameter, DTensor) and isinstance(gradient, DTensor)):
        return gradient
    if gradient.placements == parameter.placements:
        return gradient
    return gradient.redistribute(placements=parameter.placements)


def whole(x: Tensor) -> Tensor:
    """All of a tensor as a plain one; every process gets it."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def part_of(x: Tensor, parameter: Tensor) -> Tensor:
    """The part of a whole tensor that belongs to this process's part of a parameter."""
    if not isinstance(parameter, DTensor):
        return x
    mesh = parameter.device_mesh
    everywhere = DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=parameter.placements).to_local()


def state_like(parameter: Tensor, dtype: torch.dtype, fill: float) -> Tensor:
    """State in the shape, layout and memory order of a parameter."""
    return torch.full_like(
        parameter, fill, dtype=dtype, requires_grad=False, memory_format=torch.preserve_format
    )


def rows_like(parameter: Tensor, dtype: torch.dtype, fill: float) -> Tensor:
    """One number per row, (R, 1), cut as the rows are."""
    part = local(parameter)
    rows = part.shape[0] if parameter.dim() else 1
    found = torch.full((rows, 1), fill, dtype=dtype, device=part.device)
    if not isinstance(parameter, DTensor):
        return found
    total = parameter.shape[0] if parameter.dim() else 1
    placements = [p if isinstance(p, Shard) and p.dim == 0 else Replicate() for p in parameter.placements]
    return DTensor.from_local(
        found, parameter.device_mesh, placements, run_check=False, shape=torch.Size((total, 1)), stride=(1, 1)
    )
