"""PDEgym files: NetCDF4 with axes sample, time, channel, x, y, and Helmholtz groups.

Published sets come as shards ``<variable>_<k>.nc``. The official order of shards is that of their names as
text (0, 1, 10, 11, ..., 2, ...), which fixes which samples are the test set; it is kept here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import h5py

from thalweg.pde.data.formats.contents import Contents, plain_attributes
from thalweg.pde.data.hdf5 import GroupArray, H5Array, LazyFile
from thalweg.pde.data.stored import SPACE, ShardedArray, StoredArray

_SHARD = re.compile(r"(?P<variable>.+)_\d+\.nc")
_BY_RANK = {
    1: ("sample",),
    3: ("sample", "x", "y"),
    4: ("sample", "time", "x", "y"),
    5: ("sample", "time", "channel", "x", "y"),
}
_KNOWN_DIMS = ("sample", "time", "channel", *SPACE)
_HIDDEN = ("_NCProperties", "_Netcdf4Dimid", "_Netcdf4Coordinates")


def open_netcdf(path: Path, note: str = "", axes: Mapping[str, tuple[str, ...]] | None = None) -> Contents:
    """Contents of one NetCDF4 (or plain HDF5) file whose variables lie at the top level.

    Args:
        path: the file.
        note: what it should hold, for messages.
        axes: axes of variables whose axes have no names in the file.
    """
    file = LazyFile(path, note)
    arrays: dict[str, StoredArray] = {}
    coordinates = {}
    for name, item in file.handle.items():
        if not isinstance(item, h5py.Dataset) or _is_bare_dimension(item):
            continue
        if name in _KNOWN_DIMS:
            coordinates[name] = item[...]
        elif item.ndim and item.dtype.kind in "fiu":
            arrays[name] = H5Array(file, name, _dims(item, axes or {}))
    attributes = {k: v for k, v in plain_attributes(file.handle.attrs).items() if k not in _HIDDEN}
    return Contents(
        path=path,
        format="netcdf",
        arrays=arrays,
        times=coordinates.pop("time", None),
        coordinates={name: coordinates[name] for name in SPACE if name in coordinates},
        attributes=attributes,
    )


def _is_bare_dimension(item: h5py.Dataset) -> bool:
    """NetCDF stores a dimension without coordinates as a variable that says so in its NAME."""
    name = item.attrs.get("NAME", b"")
    text = name.decode() if isinstance(name, bytes) else str(name)
    return text.startswith("This is a netCDF dimension but not a netCDF variable")


def _dims(item: h5py.Dataset, axes: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Axes by the file's dimension scales, else as told, else by rank."""
    named = tuple(scale[0].name if len(scale) else scale.label for scale in item.dims)
    if all(named):
        return tuple(name.rsplit("/", 1)[-1] for name in named)
    name = item.name.lstrip("/")
    dims = axes.get(name) or _BY_RANK.get(item.ndim)
    if dims is None:
        raise ValueError(
            f"{item.file.filename}: variable {name!r} has no named axes and shape {item.shape}; "
            f"expected {', '.join(str(known) for known in _BY_RANK.values())}"
        )
    return dims


def shard_files(folder: Path) -> dict[str, list[Path]]:
    """Shards of a folder by variable, in the published order."""
    shards: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.nc"), key=lambda path: path.name):
        if match := _SHARD.fullmatch(path.name):
            shards.setdefault(match["variable"], []).append(path)
    return shards


def open_shards(folder: Path, note: str = "", axes: Mapping[str, tuple[str, ...]] | None = None) -> Contents:
    """Contents of a folder of shards, presented as if they were assembled."""
    arrays: dict[str, StoredArray] = {}
    first: Contents | None = None
    for variable, paths in shard_files(folder).items():
        parts = [open_netcdf(path, note, axes) for path in paths]
        first = first or parts[0]
        arrays[variable] = ShardedArray([part.array(variable) for part in parts])
    if first is None:
        raise ValueError(f"{folder} has no shards <variable>_<k>.nc")
    return Contents(
        path=folder,
        format="netcdf shards",
        arrays=arrays,
        times=first.times,
        coordinates=first.coordinates,
        attributes=first.attributes,
    )


def open_helmholtz(path: Path, note: str = "") -> Contents:
    """Contents of a file with one group ``Sample_<i>`` per sample, ordered by i."""
    file = LazyFile(path, note)
    groups = _numbered(file.handle, "Sample_")
    if not groups:
        raise ValueError(f"{path} has no groups Sample_<i>, found {sorted(file.handle)[:8]}")
    ranks = {0: (), 2: ("x", "y")}
    items = {name: item.ndim for name, item in file.handle[groups[0]].items()}
    arrays = {name: GroupArray(file, groups, name, ranks[n]) for name, n in items.items() if n in ranks}
    return Contents(
        path=path, format="helmholtz", arrays=arrays, attributes=plain_attributes(file.handle.attrs)
    )


def _numbered(names: Iterable[str], prefix: str) -> list[str]:
    matching = [name for name in names if name.startswith(prefix) and name[len(prefix) :].isdigit()]
    return sorted(matching, key=lambda name: int(name[len(prefix) :]))
