"""Tensors that are split over processes (DTensor, FSDP2): element-wise work on the parts, and norms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from thalweg.core_optim.engine.sharding import aligned, local
from thalweg.core_optim.engine.update import HALF


def gradient_of(parameter: Tensor) -> Tensor:
    """This process's part of a gradient, split as the parameter is.

    Raises:
        ValueError: If the gradient is sparse.
    """
    gradient = parameter.grad
    assert gradient is not None
    if gradient.is_sparse:
        raise ValueError(f"the gradient of a parameter of shape {tuple(parameter.shape)} is sparse")
    return local(aligned(gradient, parameter))


def buckets(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Positions of tensors that can be worked on together: equal device and dtype."""
    found: dict[Any, list[int]] = {}
    for i, tensor in enumerate(tensors):
        found.setdefault((tensor.device, tensor.dtype), []).append(i)
    return list(found.values())


def norm_of(parts: Sequence[Tensor], owners: Sequence[Tensor]) -> Tensor:
    """The 2-norm over all entries of all tensors, () in float32 or wider, equal on all processes.

    Sums over processes once per layout, without a wait for the device. No tensors have norm 0.

    Args:
        parts: This process's parts.
        owners: Parameters that are split in the same way.
    """
    layouts: dict[Any, list[Tensor]] = {}
    for part, owner in zip(parts, owners):
        mesh = getattr(owner, "device_mesh", None)
        layout = (part.device, part.dtype, mesh, *(() if mesh is None else owner.placements))  # type: ignore[attr-defined]
        layouts.setdefault(layout, []).append(part)
    if not layouts:
        return torch.zeros(())
    norms = [_bucket_norm(bucket, *layout[2:]) for layout, bucket in layouts.items()]
    dtype = torch.float64 if any(n.dtype == torch.float64 for n in norms) else torch.float32
    return torch.linalg.vector_norm(torch.stack([n.to(norms[0].device, dtype) for n in norms]))


def _bucket_norm(bucket: list[Tensor], mesh: Any, *placements: Any) -> Tensor:
    wide = {"dtype": torch.float32} if bucket[0].dtype in HALF else {}
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(bucket, 2.0, **wide)))
    if mesh is None:
        return norm
    from torch.distributed.tensor import DTensor, Partial, Replicate

    sums = [Partial() if placement.is_shard() else Replicate() for placement in placements]
    total: Tensor = DTensor.from_local(norm.square(), mesh, sums, run_check=False).full_tensor().sqrt()
    return total
