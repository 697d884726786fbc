"""Disk space of HDF5 files: claimed before writing, because HDF5 crashes the process on a full disk."""

from __future__ import annotations

import os

import h5py


def hdf5_size(data: int, chunks: int = 0) -> int:
    """Bytes that an HDF5 file takes at most, from those of its data and its number of chunks."""
    return data + 256 * chunks + 2**18


def reserve(path: str | os.PathLike[str], size: int) -> None:
    """Claim the space of a file.

    Opening a file for writing empties it: call this before, to fail in time, and again afterwards, to hold
    the space; :func:`trim` the file once it is closed. Systems without ``posix_fallocate`` claim nothing.

    Args:
        path: File, which is made if needed.
        size: Bytes.

    Raises:
        OSError: If there is no room.
    """
    if not hasattr(os, "posix_fallocate"):
        return
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        os.posix_fallocate(descriptor, 0, size)
    finally:
        os.close(descriptor)


def trim(path: str | os.PathLike[str]) -> None:
    """Give back what a closed HDF5 file does not use."""
    with h5py.File(path, "r+") as file:
        file.flush()  # only then HDF5 looks at what is used, not at what is there
        size = file.id.get_filesize()
    os.truncate(path, size)
