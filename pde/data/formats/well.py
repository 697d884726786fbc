"""The Well's HDF5 files: fields by tensor order, constant axes left out, components last.

Format: PolymathicAI/the_well, docs/data_format.md. Groups ``t0_fields``, ``t1_fields``, ``t2_fields`` hold
scalars, vectors and tensors; the flags ``sample_varying``, ``time_varying`` and ``dim_varying`` of each data
set tell which axes exist. Momentum is also offered as velocity = momentum / density where there is a density.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np

from thalweg.pde.data.formats.contents import Contents, plain_attributes
from thalweg.pde.data.hdf5 import H5Array, LazyFile
from thalweg.pde.data.stored import SPACE, RatioArray, Request, StoredArray, gather_blocks


class TensorArray:
    """Second-order tensors (..., D, D) presented with D * D channels, row by row."""

    def __init__(self, array: H5Array) -> None:
        self._array = array
        self.name, self.source = array.name, array.source
        self.dims = array.dims[:-1]
        self.shape = (*array.shape[:-2], array.shape[-2] * array.shape[-1])
        self.dtype = array.dtype

    def read(self, sample: int, frames: Sequence[int], channels: slice = slice(None)) -> np.ndarray:
        """Snapshots of one sample as T C X Y."""
        block = np.moveaxis(self._array.read(sample, frames), -1, 2)
        return block.reshape(len(block), -1, *block.shape[3:])[:, channels]

    def gather(self, request: Request) -> None:
        """Write single snapshots of many samples."""
        gather_blocks(self, request)

    def close(self) -> None:
        """Close the file in this process."""
        self._array.close()


def open_well(path: Path) -> Contents:
    """Contents of one file of The Well.

    Raises:
        ValueError: the file is not in this format, or a field's shape contradicts its flags.
    """
    file = LazyFile(path, "a file of The Well")
    root = file.handle
    if "t0_fields" not in root or "dimensions" not in root:
        raise ValueError(f"{path} is not a file of The Well: no groups t0_fields and dimensions")
    axes = [_text(name) for name in root["dimensions"].attrs["spatial_dims"]]
    arrays: dict[str, StoredArray] = {}
    for order in range(3):
        for name, item in root.get(f"t{order}_fields", {}).items():
            arrays[name] = _field(file, item, order, axes)
    if {"momentum", "density"} <= arrays.keys() and "velocity" not in arrays:
        arrays["velocity"] = RatioArray("velocity", arrays["momentum"], arrays["density"])
    coordinates = {
        SPACE[position]: root["dimensions"][name][...]
        for position, name in enumerate(axes)
        if root["dimensions"][name].ndim == 1
    }
    times = root["dimensions"]["time"][...] if "time" in root["dimensions"] else None
    attributes = {**plain_attributes(root.attrs), "spatial_dims": axes, "boundary": _boundary(root)}
    return Contents(
        path=path,
        format="well",
        arrays=arrays,
        times=times[0] if times is not None and times.ndim == 2 else times,
        coordinates=coordinates,
        attributes=attributes,
    )


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _field(file: LazyFile, item: h5py.Dataset, order: int, axes: Sequence[str]) -> StoredArray:
    varying = list(item.attrs.get("dim_varying", [True] * len(axes)))
    dims = ["sample"] if item.attrs.get("sample_varying", True) else []
    dims += ["time"] if item.attrs.get("time_varying", True) else []
    dims += [SPACE[position] for position, varies in enumerate(varying) if varies]
    dims += ["channel"] if order else []
    if order == 2 and item.ndim == len(dims) + 1:
        return TensorArray(H5Array(file, item.name, (*dims, "column")))
    if item.ndim != len(dims):
        raise ValueError(
            f"{file.path}: {item.name} should have the axes {tuple(dims)} by its flags, found {item.shape}"
        )
    return H5Array(file, item.name, tuple(dims))


def _boundary(root: h5py.File) -> str:
    """Kinds of boundary condition in the file, e.g. ``periodic`` or ``open, wall``."""
    conditions = root.get("boundary_conditions", {}).values()
    kinds = {_text(item.attrs.get("bc_type", "")).lower() for item in conditions}
    return ", ".join(sorted(kinds - {""})) or "unknown"
