"""Pools by name: ``inline`` and ``process`` on one machine, ``ray`` and ``submitit`` on several."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from thalweg.diffusion.s3.pool import InlinePool, ObjectiveRef, Pool, ProcessPool
from thalweg.diffusion.s3.ray_pool import RayPool
from thalweg.diffusion.s3.submitit_pool import SubmititPool


def inline(objective: ObjectiveRef, workers: int, devices: Sequence[str] = ("cpu",)) -> InlinePool:
    """This process on the first device.

    Raises:
        ValueError: For more than one worker.
    """
    if workers != 1 or not devices:
        raise ValueError(f"pool 'inline' is one worker on a device, got {workers} and {list(devices)}")
    return InlinePool(objective.make(devices[0]))


POOLS: dict[str, Callable[..., Pool]] = {
    "inline": inline,
    "process": ProcessPool,
    "ray": RayPool,
    "submitit": SubmititPool,
}


def make_pool(
    name: str, objective: ObjectiveRef, workers: int = 1, devices: Sequence[str] = ("cpu",), **options: Any
) -> Pool:
    """A pool by name; close it after use.

    Args:
        name: One of :data:`POOLS`.
        objective: How a worker makes its objective.
        workers: Number of workers.
        devices: Device of each worker, in turn.
        options: Of the pool, such as ``address`` of ray or ``folder`` of submitit.

    Raises:
        ValueError: For an unknown pool or option, or a number of workers or a device that it cannot have.
    """
    if name not in POOLS:
        raise ValueError(f"pool {name!r} is not known, allowed: {', '.join(POOLS)}")
    known = list(inspect.signature(POOLS[name]).parameters)[3:]
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(
            f"pool {name!r} has no {', '.join(unknown)}, allowed: {', '.join(known) or 'no options'}"
        )
    return POOLS[name](objective, workers, devices, **options)
