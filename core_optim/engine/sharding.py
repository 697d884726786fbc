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
        ValueError: If a parameter is a sum that nobody has added up.
    """
    shape = tuple(x.shape)
    if x.is_complex():
        shape = (*shape, 2) if shape else (1, 2)
    if not isinstance(x, DTensor):
        return Layout(shape)
    dims = [_cut_dim(placement) for placement in x.placements]
    groups = [(x.device_mesh.get_group(axis), dim) for axis, dim in enumerate(dims) if dim is not None]
    places = _places(x)
    return Layout(shape, tuple(groups), places[0].start if places else None if places is None else 0)


def _cut_dim(placement: Any) -> int | None:
    """Dimension that a placement cuts; None for copies."""
    if isinstance(placement, Replicate):
        return None
    # FSDP over tensor parallelism cuts in strides, by a private class that is no Shard
    dim = getattr(placement, "dim", None)
    if dim is None:
        raise ValueError(f"a parameter placed as {placement} cannot be optimised; shard or replicate it")
    return int(dim)


def _places(x: DTensor) -> list[range] | None:
    """Indices of the local part by dimension; None if they are not in a row."""
    places = [range(size) for size in x.shape]
    for axis, placement in enumerate(x.placements):
        dim = _cut_dim(placement)
        if dim is None:
            continue
        if not isinstance(placement, Shard):
            return None
        own = places[dim]
        step = math.ceil(len(own) / x.device_mesh.size(axis))
        first = step * x.device_mesh.get_local_rank(axis)
        places[dim] = own[first : first + step]
    return places


def numbers_of(x: Tensor) -> Tensor | int:
    """Where the elements of a local part are counted in the whole: from the first, or each (int32).

    Parts cut in strides get numbers of their own, other than those of the whole.
    """
    if not isinstance(x, DTensor):
        return 0
    places = _places(x)
    if places is None:
        cuts = [axis for axis, placement in enumerate(x.placements) if _cut_dim(placement) is not None]
        return sum(x.device_mesh.get_local_rank(axis) * 0x9E3779 * 31**axis for axis in cuts) & 0x7FFFFFFF
    strides = [math.prod(x.shape[d + 1 :]) for d in range(x.dim())]
    if all(len(place) == size for place, size in zip(places[1:], x.shape[1:])):
        first = places[0].start if places and len(places[0]) else 0
        return first * (strides[0] if strides else 1) & 0x7FFFFFFF
    device = x.to_local().device
    found = torch.zeros((), dtype=torch.int64, device=device)
    for place, stride in zip(places, strides):
        found = found[..., None] + torch.arange(place.start, place.stop, device=device) * stride
    return (found.reshape(-1) & 0x7FFFFFFF).to(torch.int32)


def placement_key(x: Tensor) -> Any:
    """Equal for tensors whose parts may be handled together."""
    # equal meshes may be different objects
    return (x.device_mesh, x.placements) if isinstance(x, DTensor) else None


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
    placements = [p if _cut_dim(p) == 0 else Replicate() for p in parameter.placements]
    return DTensor.from_local(
        found, parameter.device_mesh, placements, run_check=False, shape=torch.Size((total, 1)), stride=(1, 1)
    )
