"""PDE files as xarray data sets: one variable per physical field, named axes, coordinates, units.

Values are read when they are used. With `chunks`, variables are dask arrays (extra ``dask``).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
from xarray.backends import BackendArray
from xarray.core import indexing

from thalweg.pde.data import catalog
from thalweg.pde.data.formats.contents import Contents
from thalweg.pde.data.formats.detect import open_any
from thalweg.pde.data.open import open_contents
from thalweg.pde.data.recognise import component_names, recognise
from thalweg.pde.data.stored import SPACE, StoredArray, size
from thalweg.pde.problem import Channel, ProblemSpec

Chunks = int | str | Mapping[str, int] | None


class FieldArray(BackendArray):
    """One channel of a stored array, read when it is indexed; axes sample, time, x, y, as far as stored."""

    def __init__(self, array: StoredArray, channel: int | None) -> None:
        self.array, self.channel = array, channel
        self.dims = tuple(dim for dim in ("sample", "time", *SPACE) if dim in array.dims)
        self.shape = tuple(size(array, dim) or 0 for dim in self.dims)
        self.dtype = array.dtype

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._read)

    def _read(self, key: tuple[Any, ...]) -> np.ndarray:
        picks = dict(zip(self.dims, key))
        samples = self._list(picks.get("sample", 0), "sample")
        frames = self._list(picks.get("time", 0), "time")
        run = slice(None) if self.channel is None else slice(self.channel, self.channel + 1)
        blocks = [self.array.read(sample, frames, run)[:, 0] for sample in samples]
        values = np.stack(blocks) if blocks else np.empty((0, len(frames), *self._space()), self.dtype)
        kept = 0
        for dim in ("sample", "time", *(dim for dim in self.dims if dim in SPACE)):
            pick = picks.get(dim, 0)
            many = isinstance(pick, slice | np.ndarray)
            if dim in ("sample", "time"):  # already picked by reading; only lone values go away
                pick = slice(None) if many else 0
            values = values[(slice(None),) * kept + (pick,)]
            kept += many
        return values

    def _space(self) -> tuple[int, ...]:
        return tuple(n for dim, n in zip(self.dims, self.shape) if dim in SPACE)

    def _list(self, pick: Any, dim: str) -> list[int]:
        if isinstance(pick, slice):
            return list(range(*pick.indices(size(self.array, dim) or 1)))
        return [int(i) for i in np.atleast_1d(pick)]


def open_trajectories(
    path: str | os.PathLike[str], name: str | None = None, chunks: Chunks = None
) -> xr.Dataset:
    """Open a PDE file of any supported format lazily.

    Fields have the axes (sample, time, x, y), fewer if constant along some. Channels that the loader would
    synthesise or normalise are not added: this is what the file holds, in physical units.

    Args:
        path: file, or folder of shards.
        name: data set of the table, if the file does not say it.
        chunks: chunks for dask, as in `xarray.Dataset.chunk`; None reads into numpy when used.

    Raises:
        ValueError: unreadable file, or a file that contradicts `name`.
        ImportError: `chunks` is given and dask is not installed.
    """
    spec = None if name is None else catalog.get(name)
    contents = open_any(path) if spec is None else open_contents(spec, path)
    spec = spec or recognise(contents)
    variables: dict[str, xr.Variable] = {}
    used: set[tuple[str, int]] = set()
    for key, channel in _table_fields(spec).items():
        assert channel.variable is not None
        used.add((channel.variable, channel.index or 0))
        attributes = {"units": channel.units, "role": channel.role}
        variables[key] = _variable(contents.array(channel.variable), channel.index, attributes)
    for stored, array in contents.arrays.items():
        count = size(array, "channel")
        names = [stored] if count is None else _components(contents, stored, count)
        for k, component in enumerate(names):
            if (stored, k) not in used:
                variables[component] = _variable(array, None if count is None else k, {})
    dataset = xr.Dataset(variables, coords=_coordinates(contents, spec), attrs=_attributes(contents, spec))
    return dataset if chunks is None else _chunk(dataset, chunks)


def _table_fields(spec: ProblemSpec | None) -> dict[str, Channel]:
    """Stored channels of a data set by name; input and output of a steady problem may share a name."""
    fields: dict[str, Channel] = {}
    for channel in (*spec.inputs, *spec.outputs) if spec else ():
        if channel.variable is not None:
            fields.setdefault(channel.name, channel)
    return fields


def _components(contents: Contents, stored: str, count: int) -> list[str]:
    """Vectors of The Well and PDEBench are vectors in space; elsewhere a channel axis may hold anything."""
    if contents.format in ("well", "pdebench") and stored != "data":
        return component_names(stored, count)
    return [f"{stored}_{k}" for k in range(count)]


def _variable(array: StoredArray, channel: int | None, attributes: Mapping[str, Any]) -> xr.Variable:
    field = FieldArray(array, channel)
    return xr.Variable(field.dims, indexing.LazilyIndexedArray(field), dict(attributes))


def _coordinates(contents: Contents, spec: ProblemSpec | None) -> dict[str, Any]:
    lengths: dict[str, int] = {}
    for array in contents.arrays.values():
        lengths.update({d: n for d, n in zip(array.dims, array.shape) if d in ("time", *SPACE)})
    coordinates: dict[str, Any] = {}
    for dim, length in lengths.items():
        values = contents.times if dim == "time" else contents.coordinates.get(dim)
        if values is None and spec is not None:
            values = _times(spec, length) if dim == "time" else grid_points(spec, dim, length)
        if values is not None and len(values) == length:
            coordinates[dim] = xr.Variable(dim, np.asarray(values, np.float64), {"units": "1"})
    return coordinates


def _times(spec: ProblemSpec, frames: int) -> np.ndarray:
    return np.arange(frames) * spec.time_step


def grid_points(spec: ProblemSpec, dim: str, length: int) -> np.ndarray:
    """Coordinates of a data set's grid along x or y."""
    low, high = spec.domain[SPACE.index(dim)]
    if spec.grid == "closed":
        return np.linspace(low, high, length)
    shift = 0.5 if spec.grid == "cells" else 0.0
    return low + (np.arange(length) + shift) * (high - low) / length


def _attributes(contents: Contents, spec: ProblemSpec | None) -> dict[str, Any]:
    attributes = dict(contents.attributes)
    if spec is not None:
        told = {"problem": spec.name, "equation": spec.equation, "boundary": spec.boundary}
        attributes = {**told, **attributes}
    return {"format": contents.format, **attributes}


def _chunk(dataset: xr.Dataset, chunks: int | str | Mapping[str, int]) -> xr.Dataset:
    try:
        import dask.array  # noqa: F401
    except ImportError:
        raise ImportError("chunks need dask: pip install 'thalweg[dask]'") from None
    return dataset.chunk(chunks)
