"""What a PDE file is: format, data set, variables, times, constants and value ranges."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from thalweg.pde.data.formats.contents import Contents
from thalweg.pde.data.formats.detect import open_any
from thalweg.pde.data.hdf5 import GroupArray, H5Array
from thalweg.pde.data.recognise import recognise
from thalweg.pde.data.stored import ShardedArray, StoredArray, size

# Value ranges come from this many samples, spread evenly: the whole file may be tens of gigabytes.
_SAMPLES = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class VariableReport:
    """One variable of a file."""

    name: str
    """Name."""
    dims: tuple[str, ...]
    """Axes in stored order."""
    shape: tuple[int, ...]
    """Sizes of the axes."""
    dtype: str
    """Stored type."""
    storage: str
    """Chunks and compression."""
    ranges: list[tuple[float, float]]
    """Smallest and largest value per channel, on some samples."""
    finite: bool
    """False if those samples have NaN or infinity."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileReport:
    """What a file or a folder of shards holds."""

    path: str
    """File or folder."""
    format: str
    """Format."""
    problem: str | None
    """Data set of the table, if it can be told."""
    bytes: int
    """Size on disk."""
    variables: list[VariableReport]
    """Its variables."""
    times: list[float] | None
    """First and last physical time, and their number, if stored."""
    constants: Mapping[str, Any] | None
    """Normalisation constants stored in the file."""
    attributes: Mapping[str, Any]
    """Other attributes."""
    samples_read: int
    """Number of samples behind the value ranges."""


def inspect_file(path: str | os.PathLike[str]) -> FileReport:
    """Describe a file of any supported format.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: truncated, or not a supported format.
    """
    contents = open_any(path)
    try:
        return _report(contents)
    finally:
        contents.close()


def _report(contents: Contents) -> FileReport:
    problem = recognise(contents)
    total = max((size(array, "sample") or 1 for array in contents.arrays.values()), default=0)
    chosen = np.unique(np.linspace(0, total - 1, min(total, _SAMPLES)).astype(np.int64)).tolist()
    times = contents.times
    return FileReport(
        path=str(contents.path),
        format=contents.format,
        problem=None if problem is None else problem.name,
        bytes=_bytes(contents.path),
        variables=[_variable(name, array, chosen) for name, array in contents.arrays.items()],
        times=None if times is None else [float(times[0]), float(times[-1]), len(times)],
        constants=contents.json_attribute("constants"),
        attributes={k: v for k, v in contents.attributes.items() if k != "constants"},
        samples_read=len(chosen),
    )


def _bytes(path: Path) -> int:
    files = path.glob("*.nc") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def _variable(name: str, array: StoredArray, samples: list[int]) -> VariableReport:
    frames = range(size(array, "time") or 1)
    low, high, finite = None, None, True
    for sample in samples if "sample" in array.dims else [0]:
        block = array.read(sample, frames)
        axes = tuple(axis for axis in range(block.ndim) if axis != 1)
        finite = finite and bool(np.isfinite(block).all())
        known = np.where(np.isfinite(block), block, np.nan) if not finite else block
        smallest, largest = np.nanmin(known, axis=axes), np.nanmax(known, axis=axes)
        low = smallest if low is None else np.fmin(low, smallest)
        high = largest if high is None else np.fmax(high, largest)
    assert low is not None
    assert high is not None
    return VariableReport(
        name=name,
        dims=array.dims,
        shape=tuple(array.shape),
        dtype=str(array.dtype),
        storage=_storage(array),
        ranges=list(zip(low.tolist(), high.tolist())),
        finite=finite,
    )


def _storage(array: StoredArray) -> str:
    if isinstance(array, ShardedArray):
        return f"{len(array.parts)} shards, {_storage(array.parts[0])}"
    if isinstance(array, GroupArray):
        return "one group per sample"
    if not isinstance(array, H5Array):
        return "computed"
    dataset = array.file.handle[array.path]
    layout = "contiguous" if dataset.chunks is None else f"chunks {dataset.chunks}"
    return layout if dataset.compression is None else f"{layout}, {dataset.compression}"
