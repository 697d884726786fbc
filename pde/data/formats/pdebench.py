"""PDEBench's HDF5 files and their relatives (PDEArena, DPOT), told apart by what they contain.

- compressible flow: ``density``, ``pressure``, ``Vx``, ... each (B, T, X[, Y[, Z]]), ``x-coordinate``, ...;
- one field: ``tensor`` (B, T, X); Darcy flow: ``nu`` (B, X, Y) and ``tensor`` (B, 1, X, Y);
- one group per seed ``0000``, ... with ``data`` (T, X[, Y], V) and ``grid/{x,y,t}``;
- incompressible flow: ``velocity`` (B, T, X, Y, 2), ``particles`` (B, T, X, Y, 1), ``force`` (B, X, Y, 2);
- PDEArena: a group named by the split with fields (N, T, X, Y);
- DPOT: ``data`` (N, X, Y, T, C).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from thalweg.pde.data.formats.contents import Contents, plain_attributes
from thalweg.pde.data.hdf5 import GroupArray, H5Array, LazyFile
from thalweg.pde.data.stored import SPACE, StoredArray

_COMPRESSIBLE = ("density", "pressure", "Vx", "Vy", "Vz")
_INCOMPRESSIBLE = {
    "velocity": ("sample", "time", "x", "y", "channel"),
    "particles": ("sample", "time", "x", "y", "channel"),
    "force": ("sample", "x", "y", "channel"),
}
_SPLIT_GROUPS = ("train", "valid", "test")


def is_pdebench(root: h5py.File) -> bool:
    """Whether a file has one of the layouts above."""
    names = set(root)
    return bool(
        {"tensor"} & names
        or {"density", "Vx"} <= names
        or {"velocity", "particles"} <= names
        or _seed_groups(root)
        or any(isinstance(root.get(name), h5py.Group) for name in _SPLIT_GROUPS)
        or (names == {"data"} and root["data"].ndim == 5)
    )


def open_pdebench(path: Path) -> Contents:
    """Contents of a file in one of the layouts above.

    Raises:
        ValueError: none of them fits.
    """
    file = LazyFile(path, "a PDEBench file")
    root = file.handle
    if groups := _seed_groups(root):
        return _open_seeds(path, file, groups)
    base = next((name for name in _SPLIT_GROUPS if isinstance(root.get(name), h5py.Group)), None)
    if base is not None:
        arrays, times = _arena_arrays(file, base), None
    elif set(root) == {"data"} and root["data"].ndim == 5:
        arrays, times = {"data": H5Array(file, "data", ("sample", "x", "y", "time", "channel"))}, None
    elif "velocity" in root:
        arrays = {name: H5Array(file, name, dims) for name, dims in _INCOMPRESSIBLE.items() if name in root}
        times = root["t"][0] if "t" in root else None
    else:
        arrays = _plain_arrays(file)
        times = root["t-coordinate"][...] if "t-coordinate" in root else None
    if not arrays:
        raise ValueError(f"{path} has no layout of PDEBench, found {sorted(root)}")
    return _contents(path, arrays, times, _coordinates(root, "{}-coordinate"), plain_attributes(root.attrs))


def _contents(
    path: Path,
    arrays: Mapping[str, StoredArray],
    times: np.ndarray | None,
    coordinates: Mapping[str, np.ndarray],
    attributes: Mapping[str, Any],
) -> Contents:
    frames = max(dict(zip(a.dims, a.shape)).get("time", 1) for a in arrays.values())
    # Some files list one time more than there are snapshots.
    times = times[:frames] if times is not None and len(times) >= frames else None
    return Contents(
        path=path,
        format="pdebench",
        arrays=arrays,
        times=times,
        coordinates=coordinates,
        attributes=attributes,
    )


def _coordinates(root: Any, pattern: str) -> dict[str, np.ndarray]:
    names = {axis: pattern.format(axis) for axis in SPACE}
    return {axis: root[name][...] for axis, name in names.items() if name in root}


def _plain_arrays(file: LazyFile) -> dict[str, StoredArray]:
    root = file.handle
    arrays: dict[str, StoredArray] = {}
    for name in (*_COMPRESSIBLE, "tensor"):
        if name in root:
            arrays[name] = H5Array(file, name, ("sample", "time", *SPACE[: root[name].ndim - 2]))
    if "nu" in root:
        arrays["nu"] = H5Array(file, "nu", ("sample", *SPACE[: root["nu"].ndim - 1]))
    return arrays


def _arena_arrays(file: LazyFile, base: str) -> dict[str, StoredArray]:
    fields = {name: item for name, item in file.handle[base].items() if item.ndim == 4}
    return {name: H5Array(file, f"{base}/{name}", ("sample", "time", "x", "y")) for name in fields}


def _seed_groups(root: h5py.File) -> list[str]:
    names = [name for name in root if name.isdigit()]
    return sorted(names) if names and "data" in root[names[0]] else []


def _open_seeds(path: Path, file: LazyFile, groups: list[str]) -> Contents:
    first = file.handle[groups[0]]
    space = SPACE[: first["data"].ndim - 2]
    arrays = {"data": GroupArray(file, groups, "data", ("time", *space, "channel"))}
    grid = first.get("grid", {})
    times = grid["t"][...] if "t" in grid else None
    return _contents(path, arrays, times, _coordinates(grid, "{}"), plain_attributes(file.handle.attrs))
