"""What readers need from an array, wherever it lies, and arrays made of other arrays.

Axes are named: sample, time, channel, then space (x, y; fewer or more are allowed). The unit of reading is a
block: some snapshots of one sample, T C X Y. Axes that an array lacks have length 1 in its blocks.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
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

    def gather(self, request: Request) -> None:
        """Write single snapshots of many samples, see `Request`."""
        ...

    def close(self) -> None:
        """Close files of this process; the next read opens them again."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """Snapshots (samples[n], frames[n]) to be written to out[rows[n]], sorted by sample and time."""

    samples: np.ndarray
    """Sample indices (N,)."""
    frames: np.ndarray
    """Snapshot indices (N,)."""
    channels: slice
    """One run of channels."""
    out: np.ndarray
    """Target, M C X Y; each out[row] is contiguous."""
    rows: np.ndarray
    """Rows of the target (N,)."""

    def subset(self, chosen: np.ndarray, first_sample: int) -> Request:
        """Part of the request, samples counted from `first_sample`."""
        return replace(
            self,
            samples=self.samples[chosen] - first_sample,
            frames=self.frames[chosen],
            rows=self.rows[chosen],
        )


def gather_blocks(array: StoredArray, request: Request) -> None:
    """Serve a request sample by sample, each in one read."""
    edges = np.flatnonzero(np.diff(request.samples, prepend=-1))
    for chosen in np.split(np.arange(len(request.samples)), edges[1:]):
        sample, frames = int(request.samples[chosen[0]]), request.frames[chosen].tolist()
        request.out[request.rows[chosen]] = array.read(sample, frames, request.channels)


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

    def gather(self, request: Request) -> None:
        """Write single snapshots of many samples."""
        owner = np.searchsorted(self.edges, request.samples, side="right") - 1
        for shard in np.unique(owner).tolist():
            chosen = np.flatnonzero(owner == shard)
            self.parts[shard].gather(request.subset(chosen, int(self.edges[shard])))

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

    def gather(self, request: Request) -> None:
        """Write single snapshots of many samples."""
        gather_blocks(self, request)

    def close(self) -> None:
        """Close the files of both arrays."""
        self.numerator.close()
        self.denominator.close()
