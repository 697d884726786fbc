"""Opening a file whose format is not known beforehand."""

from __future__ import annotations

import os
from pathlib import Path

from thalweg.pde.data.formats import netcdf, pdebench, well
from thalweg.pde.data.formats.contents import Contents
from thalweg.pde.data.hdf5 import LazyFile

OPENERS = {
    "netcdf": netcdf.open_netcdf,
    "helmholtz": netcdf.open_helmholtz,
    "well": well.open_well,
    "pdebench": pdebench.open_pdebench,
}
"""Openers of single files by format, the values of `ProblemSpec.layout`."""


def detect(path: Path) -> str:
    """Format of a file, a key of `OPENERS`."""
    file = LazyFile(path)
    root = file.handle
    try:
        if "t0_fields" in root:
            return "well"
        if any(name.startswith("Sample_") for name in root):
            return "helmholtz"
        return "pdebench" if path.suffix != ".nc" and pdebench.is_pdebench(root) else "netcdf"
    finally:
        file.close()


def open_any(path: str | os.PathLike[str]) -> Contents:
    """Contents of a file, or of a folder of shards.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: it is not HDF5, or a folder without shards.
    """
    path = Path(path)
    if path.is_dir():
        return netcdf.open_shards(path)
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder: {path}")
    return OPENERS[detect(path)](path)
