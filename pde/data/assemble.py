"""Joining published shards into one file, a few samples at a time."""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from thalweg.pde.data.formats.contents import Contents
from thalweg.pde.data.formats.netcdf import open_shards
from thalweg.pde.data.space import hdf5_size, reserve, trim
from thalweg.pde.data.stored import SPACE, StoredArray

# Bytes held in memory while copying.
_PIECE_BYTES = 64 * 2**20


def assemble(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Write the shards of a folder as one NetCDF4 file, in the published string order.

    One snapshot is one chunk, as in the published assembled files. The file appears under its name only when
    it is complete.

    Args:
        folder: holds ``<variable>_<k>.nc``; several variables may lie side by side.
        out: file to write.
        progress: called with samples done and samples in all, over all variables.

    Raises:
        ValueError: no shards, or shards that disagree.
        FileExistsError: `out` exists.
        OSError: no space for the file, or writing failed; nothing is left under `out`.
    """
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists; remove it or choose another name")
    contents = open_shards(Path(folder))
    out.parent.mkdir(parents=True, exist_ok=True)
    _check_space(contents, out.parent)
    temporary = out.with_name(f".{out.name}.part")
    try:
        _write(contents, temporary, progress)
        trim(temporary)
        os.replace(temporary, out)
    except (OSError, RuntimeError) as error:
        # HDF5 reports a full disk as either, with several lines of its own.
        number = getattr(error, "errno", None) or errno.EIO
        raise OSError(number, f"cannot write {out}: {str(error).splitlines()[0]}") from error
    finally:
        contents.close()
        temporary.unlink(missing_ok=True)
    return out


def _write(contents: Contents, path: Path, progress: Callable[[int, int], None]) -> None:
    import h5netcdf

    total = sum(array.shape[0] for array in contents.arrays.values())
    done = 0
    data = sum(math.prod(array.shape) * array.dtype.itemsize for array in contents.arrays.values())
    size = hdf5_size(data, chunks=sum(math.prod(array.shape[:2]) for array in contents.arrays.values()))
    reserve(path, size)
    with h5netcdf.File(path, "w") as file:
        reserve(path, size)
        file.attrs.update(contents.attributes)
        _write_coordinates(file, contents.times, contents.coordinates)
        for name, array in contents.arrays.items():
            for count in _copy(file, name, array):
                done += count
                progress(done, total)


def _check_space(contents: Contents, folder: Path) -> None:
    needed = sum(math.prod(array.shape) * array.dtype.itemsize for array in contents.arrays.values())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC, f"{folder} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB are needed"
        )


def _write_coordinates(file: Any, times: np.ndarray | None, coordinates: Mapping[str, np.ndarray]) -> None:
    known = {**coordinates} if times is None else {"time": times, **coordinates}
    for dim, values in known.items():
        file.dimensions[dim] = len(values)
        file.create_variable(dim, (dim,), values.dtype)[...] = values


def _copy(file: Any, name: str, array: StoredArray) -> Iterator[int]:
    """Copy one variable; yields how many samples each step wrote."""
    dims, shape = array.dims, array.shape
    if list(dims) != [dim for dim in ("sample", "time", "channel", *SPACE) if dim in dims]:
        raise ValueError(f"{array.source}: variable {name!r} has its axes in another order: {dims}")
    file.dimensions.update({d: n for d, n in zip(dims, shape) if d not in file.dimensions})
    chunks = tuple(1 if dim in ("sample", "time") else n for dim, n in zip(dims, shape))
    target = file.create_variable(name, dims, array.dtype, chunks=chunks)
    frames = range(shape[dims.index("time")]) if "time" in dims else range(1)
    sample_bytes = int(np.prod(shape[1:], dtype=np.int64)) * array.dtype.itemsize
    step = max(1, _PIECE_BYTES // sample_bytes)
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        block = np.stack([array.read(sample, frames) for sample in range(start, stop)])
        target[start:stop] = block.reshape(stop - start, *shape[1:])
        yield stop - start
