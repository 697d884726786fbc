"""What readers need from an array, wherever it lies, and arrays made of other arrays.

Axes are named: sample, time, channel, then space (x, y; fewer or more are allowed). The unit of reading is a
block: some snapshots of one sample, T C X Y. Axes that an array lacks have length 1 in its blocks.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Protocol

import numpy as np

SPACE = ("x", "y", "z")


class StoredArray(Protocol):
    """An array on disk with named axes."""

    name: str
    """Name for messages."""
    source: str
    """File or folder for messages."""
    dims: tuple[str, ...]
    """Axes in stored order, among sample, time, channel, x, y, z."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of `dims`."""
        ...

    @property
    def dtype(self) -> np.dtype:
        """Stored type."""
        ...

    def read(self, sample: int, frames: Sequence[int], channels: slice = slice(None)) -> np.ndarray:
        """Snapshots of one sample as T C X Y; `channels` is one run (step 1)."""
        ...

    def close(self) -> None:
        """Close files of this process; the next read opens them again."""
        ...


def size(array: StoredArray, dim: str) -> int | None:
    """Length of an axis, or None if the array lacks it."""
    return dict(zip(array.dims, array.shape)).get(dim)


class ShardedArray:
    """Several arrays joined along the sample axis, first to last.

    Args:
        parts: arrays of equal shape apart from the number of samples.
    """

    def __init__(self, parts: Sequence[StoredArray]) -> None:
        self.parts = list(parts)
        first = self.parts[0]
        for part in self.parts[1:]:
            if (part.dims, part.shape[1:], part.dtype) != (first.dims, first.shape[1:], first.dtype):
                raise ValueError(
                    f"{part.source}: variable {part.name!r} has shape {part.shape} ({part.dtype}), "
                    f"but {first.source} has {first.shape} ({first.dtype}); shards must agree"
                )
        assert first.dims[0] == "sample", "shards are joined along the leading sample axis"
        self.name, self.dims = first.name, first.dims
        self.source = os.path.commonpath([part.source for part in self.parts])
        self.edges = np.cumsum([0] + [part.shape[0] for part in self.parts])

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of `dims`, all shards together."""
        return (int(self.edges[-1]), *self.parts[0].shape[1:])

    @property
    def dtype(self) -> np.dtype:
        """Stored type."""
        return self.parts[0].dtype

    def read(self, sample: int, frames: Sequence[int], channels: slice = slice(None)) -> np.ndarray:
        """Snapshots of one sample as T C X Y."""
        shard = int(np.searchsorted(self.edges, sample, side="right")) - 1
        return self.parts[shard].read(sample - int(self.edges[shard]), frames, channels)

    def close(self) -> None:
        """Close the files of all shards."""
        for part in self.parts:
            part.close()


class RatioArray:
    """One array divided by another, such as velocity = momentum / density.

    Args:
        name: name of the quotient.
        numerator: array whose axes the quotient has.
        denominator: array without a channel axis.
    """

    def __init__(self, name: str, numerator: StoredArray, denominator: StoredArray) -> None:
        self.name, self.source = name, numerator.source
        self.numerator, self.denominator = numerator, denominator
        self.dims = numerator.dims

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of `dims`."""
        return self.numerator.shape

    @property
    def dtype(self) -> np.dtype:
        """Stored type."""
        return self.numerator.dtype

    def read(self, sample: int, frames: Sequence[int], channels: slice = slice(None)) -> np.ndarray:
        """Snapshots of one sample as T C X Y."""
        return self.numerator.read(sample, frames, channels) / self.denominator.read(sample, frames)

    def close(self) -> None:
        """Close the files of both arrays."""
        self.numerator.close()
        self.denominator.close()
