"""What a file (or a folder of shards) holds, in the same terms for every format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from thalweg.pde.data.stored import StoredArray


@dataclass(frozen=True, kw_only=True)
class Contents:
    """Arrays and metadata of one data file."""

    path: Path
    """File or folder."""
    format: str
    """``netcdf``, ``netcdf shards``, ``helmholtz``, ``well`` or ``pdebench``."""
    arrays: Mapping[str, StoredArray]
    """Fields by name."""
    times: np.ndarray | None = None
    """Physical times of the snapshots, if the file has them."""
    coordinates: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Coordinates x, y, z, if the file has them."""
    attributes: Mapping[str, Any] = field(default_factory=dict)
    """Global attributes."""

    def array(self, name: str) -> StoredArray:
        """Field with a name.

        Raises:
            ValueError: there is none; the message lists what the file has.
        """
        if name not in self.arrays:
            found = ", ".join(f"{key} {array.shape}" for key, array in self.arrays.items()) or "no variables"
            raise ValueError(f"{self.path} has no variable {name!r}, found {found}")
        return self.arrays[name]

    def json_attribute(self, name: str) -> Any:
        """Attribute stored as JSON text, or None."""
        text = self.attributes.get(name)
        return None if text is None else json.loads(text)

    def close(self) -> None:
        """Close all files in this process."""
        for array in self.arrays.values():
            array.close()


def plain_attributes(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """HDF5 attributes as plain Python values (text, numbers, lists); references are left out."""
    plain: dict[str, Any] = {}
    for name, value in attributes.items():
        if isinstance(value, bytes):
            value = value.decode()
        elif isinstance(value, np.ndarray | np.generic):
            values = [v.decode() if isinstance(v, bytes) else v for v in np.ravel(value).tolist()]
            # NetCDF has no scalar attributes: a single number comes as an array of one.
            value = values[0] if len(values) == 1 else values
        if isinstance(value, str | int | float | bool) or (
            isinstance(value, list) and all(isinstance(v, str | int | float | bool) for v in value)
        ):
            plain[name] = value
    return plain
