"""Writes generated samples as one file in the published layout, with the constants of its training part.

Samples are streamed: one piece is in memory at a time. The file is written under a temporary name and renamed
when it is complete.

Shapes: variables have the axes of the catalog row, (sample, time, channel, x, y) or fewer.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import h5netcdf
import h5py
import numpy as np

from thalweg.pde.data.catalog import PROBLEMS
from thalweg.pde.data.space import hdf5_size, reserve, trim
from thalweg.pde.problem import Channel, ProblemSpec, Variable


class ChannelStatistics:
    """Mean and standard deviation of each channel, one sample at a time (Chan, Golub and LeVeque 1983)."""

    def __init__(self) -> None:
        self._moments: dict[tuple[str, int | None], tuple[int, float, float]] = {}

    def add(self, channel: Channel, sample: Mapping[str, np.ndarray]) -> None:
        """Take a sample's values of a channel into account, once per call."""
        assert channel.variable is not None, "synthesised channels have no statistics"
        field = sample[channel.variable].astype(np.float64)
        values = field if channel.index is None else field[:, channel.index]
        count, mean = values.size, float(values.mean())
        spread = float(np.square(values - mean).sum())
        key = (channel.variable, channel.index)
        if key in self._moments:
            old_count, old_mean, old_spread = self._moments[key]
            delta = mean - old_mean
            spread += old_spread + delta**2 * old_count * count / (old_count + count)
            mean = old_mean + delta * count / (old_count + count)
            count += old_count
        self._moments[key] = (count, mean, spread)

    def constants(self, channel: Channel) -> list[float]:
        """[mean, standard deviation]; 1 replaces the deviation of a channel that does not vary."""
        assert channel.variable is not None, "synthesised channels have no statistics"
        count, mean, spread = self._moments[channel.variable, channel.index]
        std = (spread / count) ** 0.5
        return [mean, std if std > 1e-7 * abs(mean) else 1.0]


def rows_of(file: str) -> list[ProblemSpec]:
    """All rows of the catalog, variants included, that read a file of this name."""
    return [spec for spec in PROBLEMS.values() if spec.file == file]


def sizes(spec: ProblemSpec, *, samples: int, frames: int, resolution: int) -> dict[str, tuple[int, ...]]:
    """Shape of every variable of a generated file."""
    known = {"sample": samples, "time": frames, "x": resolution, "y": resolution}

    def shape(variable: Variable) -> tuple[int, ...]:
        return tuple(known.get(dim, length) for dim, length in zip(variable.dims, variable.shape))

    return {variable.name: shape(variable) for variable in spec.variables}


def write_dataset(
    path: Path,
    spec: ProblemSpec,
    shapes: Mapping[str, tuple[int, ...]],
    samples: Iterable[Mapping[str, np.ndarray]],
    *,
    train: int,
    times: tuple[float, ...],
    attributes: Mapping[str, object],
) -> None:
    """Write a data set; the constants come from the first ``train`` samples.

    Args:
        path: Final name; it appears only when the file is complete.
        spec: Row of the catalog; its layout decides between NetCDF and the HDF5 groups of Helmholtz.
        shapes: Shape of every variable, sample axis included.
        samples: Sample after sample, variable -> array without sample axis.
        train: Number of leading samples that count for the constants.
        times: Physical times of the snapshots; empty for steady problems.
        attributes: Global attributes.

    Raises:
        OSError: If the disk is full; nothing is left behind then.
    """
    statistics = ChannelStatistics()
    rows = rows_of(spec.file)
    channels = [channel for row in rows for channel in (*row.inputs, *row.outputs)]
    # Each place in the file counts once, however many rows mention it.
    stored = {(c.variable, c.index): c for c in channels if c.variable is not None}.values()

    def observed() -> Iterator[Mapping[str, np.ndarray]]:
        for number, sample in enumerate(samples):
            if number < train:
                for channel in stored:
                    statistics.add(channel, sample)
            yield sample

    with _replacing(path) as temporary:
        if spec.layout == "helmholtz":
            _write_groups(temporary, spec, shapes, observed())
        else:
            _write_netcdf(temporary, spec, shapes, observed(), times)
        constants = json.dumps(_constants(rows, statistics))
        # h5netcdf would store numbers as arrays of length one.
        with h5py.File(temporary, "r+") as file:
            file.attrs.update({**attributes, "constants": constants})
        trim(temporary)


def _constants(rows: list[ProblemSpec], statistics: ChannelStatistics) -> dict[str, dict[str, list[float]]]:
    """Constants by channel name; synthesised channels are the same in every file and keep the published."""

    def of(channels: Iterable[Channel]) -> dict[str, list[float]]:
        return {c.name: [c.mean, c.std] if c.variable is None else statistics.constants(c) for c in channels}

    return {
        "inputs": of(channel for row in rows for channel in row.inputs),
        "outputs": of(channel for row in rows for channel in row.outputs),
    }


def _write_netcdf(
    path: Path,
    spec: ProblemSpec,
    shapes: Mapping[str, tuple[int, ...]],
    samples: Iterable[Mapping[str, np.ndarray]],
    times: tuple[float, ...],
) -> None:
    """NetCDF4 with the dimensions of the catalog row and a coordinate ``time``."""
    size = _size(shapes, 4)
    reserve(path, size)
    with h5netcdf.File(path, "w") as file:
        reserve(path, size)
        for variable in spec.variables:
            for dim, length in zip(variable.dims, shapes[variable.name]):
                if dim not in file.dimensions:
                    file.dimensions[dim] = length
        if times:
            file.create_variable("time", ("time",), data=np.asarray(times, np.float64))
        for variable in spec.variables:
            shape = shapes[variable.name]
            # One frame is one chunk, as in the published files.
            chunks = tuple(
                1 if dim in ("sample", "time") else length for dim, length in zip(variable.dims, shape)
            )
            file.create_variable(variable.name, variable.dims, np.float32, chunks=chunks)
        for number, sample in enumerate(samples):
            for name, field in sample.items():
                file.variables[name][number] = field


def _size(shapes: Mapping[str, tuple[int, ...]], itemsize: int) -> int:
    """Bytes of a file, with a chunk per snapshot or a group per sample."""
    data = itemsize * sum(math.prod(shape) for shape in shapes.values())
    return hdf5_size(data, chunks=sum(4 * math.prod(shape[:2]) for shape in shapes.values()))


def _write_groups(
    path: Path,
    spec: ProblemSpec,
    shapes: Mapping[str, tuple[int, ...]],
    samples: Iterable[Mapping[str, np.ndarray]],
) -> None:
    """HDF5 with one group of float64 arrays per sample, as Helmholtz is published."""
    size = _size(shapes, 8)
    reserve(path, size)
    with h5py.File(path, "w") as file:
        reserve(path, size)
        for number, sample in enumerate(samples):
            group = file.create_group(f"Sample_{number}")
            for variable in spec.variables:
                group.create_dataset(variable.name, data=np.asarray(sample[variable.name], np.float64))


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Temporary name that becomes ``path`` if the block succeeds and vanishes if it fails."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    for leftover in path.parent.glob(f"{path.name}.*.tmp"):
        leftover.unlink(missing_ok=True)
    try:
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # HDF5 reports a full disk as either, with several lines of its own.
        number = getattr(error, "errno", None) or errno.EIO
        reason = str(error).splitlines()[0]
        raise OSError(number, f"cannot write {path}: {reason}; finished samples are kept") from error
    finally:
        temporary.unlink(missing_ok=True)
