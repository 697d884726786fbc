"""How the images of an epoch are split over processes and batches.

An epoch samples G groups of K images, trains on them in micro-batches and makes a number of optimizer steps.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """The shape of an epoch."""

    groups: int
    """Groups of an epoch, G."""
    group_size: int
    """Images of a group, K."""
    world_size: int
    """Processes."""
    batch: int
    """Images of a micro-batch on one process."""
    gradient_steps: int
    """Optimizer steps of an epoch."""
    scattered: bool = False
    """Whether the images of a group are scattered over processes, as the authors' sampler does."""

    @property
    def images(self) -> int:
        """Images of an epoch."""
        return self.groups * self.group_size

    @property
    def even(self) -> bool:
        """Whether all processes have equally many batches, as sharded networks need."""
        return self.scattered or self.groups % self.world_size == 0

    def groups_of(self, rank: int) -> range:
        """Numbers of the groups of one process: whole, consecutive, and at most one more than others have."""
        assert not self.scattered, "scattered groups belong to no process"
        each, more = divmod(self.groups, self.world_size)
        start = rank * each + min(rank, more)
        return range(start, start + each + (rank < more))

    def batches_of(self, rank: int) -> int:
        """Micro-batches of one process in an epoch."""
        if self.scattered:
            return self.images // (self.world_size * self.batch)
        return len(self.groups_of(rank)) * self.group_size // self.batch

    @property
    def accumulation(self) -> float:
        """Micro-batches of an optimizer step, the mean over processes.

        Every process divides the sum of its losses by it, and by the number of training times of an image.
        The mean of the gradients over processes is then that of all images, also where processes differ.
        """
        return self.images / (self.world_size * self.batch * self.gradient_steps)


def geometry(
    groups: int, group_size: int, world_size: int, largest_batch: int, gradient_steps: int = 1
) -> Geometry:
    """The largest micro-batches such that every process has whole groups and whole micro-batches.

    A micro-batch is whole groups or an equal part of one, and every optimizer step takes equally many of them
    from a process. One process will do.

    Raises:
        ValueError: If there is no such batch; the message names what is allowed.
    """
    _check(groups, group_size, world_size, largest_batch, gradient_steps)
    shares = {groups // world_size, -(-groups // world_size)}
    for batch in range(min(largest_batch, group_size * max(shares)), 0, -1):
        if (batch % group_size and group_size % batch) or any(
            share * group_size % (batch * gradient_steps) for share in shares
        ):
            continue
        return Geometry(
            groups=groups,
            group_size=group_size,
            world_size=world_size,
            batch=batch,
            gradient_steps=gradient_steps,
        )
    images = [share * group_size for share in sorted(shares)]
    allowed = [str(n) for n in range(1, min(images) + 1) if not any(count % n for count in images)]
    listed = " or ".join(map(str, images))
    raise ValueError(
        f"gradient_steps is {gradient_steps} for {listed} images of a process, allowed: {', '.join(allowed)}"
    )


def reference_geometry(
    groups: int, group_size: int, world_size: int, largest_batch: int, gradient_steps: int = 1
) -> Geometry:
    """The authors' micro-batches, for reproduction: groups are whole over all processes only.

    The largest batch such that a batch of all processes is whole groups, an epoch is whole batches, and
    optimizer steps take equally many.

    Raises:
        ValueError: If there is no such batch, as on 1 or 2 processes with the published 48 groups of 24 in
            batches up to 9; the message names numbers of processes that have one.
    """
    _check(groups, group_size, world_size, largest_batch, gradient_steps)
    images = groups * group_size
    batch = _reference_batch(images, group_size, world_size, largest_batch, gradient_steps)
    if batch is None:
        allowed = [
            str(world)
            for world in range(1, images + 1)
            if _reference_batch(images, group_size, world, largest_batch, gradient_steps)
        ]
        raise ValueError(
            f"world_size is {world_size}, where no batch up to {largest_batch} holds {groups} groups of"
            f" {group_size} in {gradient_steps} steps; allowed: {', '.join(allowed[:12]) or 'none'}."
            " Groups that are whole on each process have no such limit"
        )
    return Geometry(
        groups=groups,
        group_size=group_size,
        world_size=world_size,
        batch=batch,
        gradient_steps=gradient_steps,
        scattered=True,
    )


def _reference_batch(images: int, k: int, world: int, largest: int, gradient_steps: int) -> int | None:
    for batch in range(largest, 0, -1):
        together = batch * world
        if images % together == 0 and together % k == 0 and images // together % gradient_steps == 0:
            return batch
    return None


def _check(groups: int, group_size: int, world_size: int, largest_batch: int, gradient_steps: int) -> None:
    least = {"groups": (groups, 1), "group_size": (group_size, 2), "largest_batch": (largest_batch, 1)}
    for name, (value, low) in (least | {"gradient_steps": (gradient_steps, 1)}).items():
        if value < low:
            reason = ": an advantage compares images of one group" if name == "group_size" else ""
            raise ValueError(f"{name} is {value}, allowed: {low} and more{reason}")
    if not 1 <= world_size <= groups:
        raise ValueError(f"world_size is {world_size}, allowed: 1 to {groups}, a group for each process")
