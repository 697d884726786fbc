"""Arrays in HDF5 files, read a few snapshots at a time.

Files are opened on first use in each process, so that readers can be pickled into spawned workers and
inherited by forked ones. Where the file allows it (no compression, native floats, snapshots in one piece)
snapshots are read straight from their byte offset with ``pread``: HDF5's global lock, selection and chunk
cache cost more than the copy itself.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from thalweg.pde.data.stored import Request, gather_blocks

# Large enough that a compressed chunk spanning several snapshots is decoded once per block.
_CHUNK_CACHE_BYTES = 32 * 2**20

# Handles inherited through fork must not be closed by the child: HDF5's state belongs to the parent.
_INHERITED: list[h5py.File] = []


class LazyFile:
    """An HDF5 file that each process opens for itself when it first reads.

    Args:
        path: file to read.
        note: what the file should hold; part of the message if it cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str], note: str = "") -> None:
        self.path = Path(path)
        self.note = note
        self._pid: int | None = None
        self._file: h5py.File | None = None
        self._descriptor = -1

    @property
    def handle(self) -> h5py.File:
        """Open file of this process.

        Raises:
            ValueError: the file is truncated or not HDF5.
            FileNotFoundError: there is no such file.
        """
        if self._pid != os.getpid():
            if self._file is not None:
                _INHERITED.append(self._file)
            self._file = self._open()
            self._descriptor = self._file.id.get_vfd_handle()
            self._pid = os.getpid()
        assert self._file is not None
        return self._file

    @property
    def descriptor(self) -> int:
        """File descriptor of this process for reads by offset."""
        if self._pid != os.getpid():
            _ = self.handle
        return self._descriptor

    def _open(self) -> h5py.File:
        if not self.path.is_file():
            raise FileNotFoundError(f"no such file: {self.path}")
        try:
            return h5py.File(self.path, "r", locking="best-effort", rdcc_nbytes=_CHUNK_CACHE_BYTES)
        except OSError as error:
            reason = str(error).partition("(")[2].rstrip(")") or str(error)
            expected = f"; expected {self.note}" if self.note else ""
            raise ValueError(
                f"{self.path} cannot be read as HDF5 or NetCDF4: {reason}{expected}, "
                f"found a file of {self.path.stat().st_size} bytes that is truncated or of another format"
            ) from None

    def close(self) -> None:
        """Close the file in this process; the next read opens it again."""
        if self._file is not None and self._pid == os.getpid():
            self._file.close()
            self._file, self._pid, self._descriptor = None, None, -1

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "note": self.note, "_pid": None, "_file": None, "_descriptor": -1}


class _Offsets:
    """Where snapshots lie inside a file that stores them plainly.

    Args:
        dataset: its leading axes are sample and/or time.
        leading: how many of these axes there are.
    """

    def __init__(self, dataset: h5py.Dataset, leading: int) -> None:
        self._id = dataset.id
        self._chunk: tuple[int, ...] = (dataset.chunks or dataset.shape)[:leading]
        self._rest = (0,) * (dataset.ndim - leading)
        grid = [-(-n // c) for n, c in zip(dataset.shape, self._chunk)]
        # Byte offset of each chunk once it is known; looking one up in HDF5 takes longer than reading it.
        self._table = np.full(grid, -1, np.int64)
        if dataset.chunks is None:
            self._table[...] = dataset.id.get_offset()
        self.snapshot_bytes = int(np.prod(dataset.shape[leading:], dtype=np.int64)) * dataset.dtype.itemsize

    @staticmethod
    def possible(dataset: h5py.Dataset, leading: int) -> bool:
        """Whether the data lie plainly: no filters, native floats, each snapshot in one piece."""
        plain = dataset.dtype.isnative and dataset.dtype.kind == "f" and dataset.file.driver == "sec2"
        if not plain or dataset.id.get_create_plist().get_nfilters() or dataset.file.userblock_size:
            return False
        if dataset.chunks is None:
            return dataset.id.get_offset() is not None
        return dataset.chunks[leading:] == dataset.shape[leading:]

    def of(self, index: tuple[np.ndarray, ...]) -> np.ndarray:
        """Byte offsets of snapshots by their indices along the leading axes; -1 for those never written."""
        cells = tuple(i // c for i, c in zip(index, self._chunk))
        base = np.array(self._table[cells]).reshape(len(index[0]) if index else 1)
        for n in np.flatnonzero(base < 0).tolist():
            corner = tuple(int(cell[n]) * c for cell, c in zip(cells, self._chunk))
            found = self._id.get_chunk_info_by_coord(corner + self._rest).byte_offset
            if found is not None:
                base[n] = self._table[tuple(cell[n] for cell in cells)] = found
        inside = np.zeros(len(base), np.int64)
        for i, c in zip(index, self._chunk):
            inside = inside * c + i % c
        return np.where(base < 0, -1, base + inside * self.snapshot_bytes)


class H5Array:
    """One data set of a file.

    Args:
        file: where it lies.
        path: name inside the file.
        dims: its axes in stored order; any of them may be missing.
    """

    def __init__(self, file: LazyFile, path: str, dims: tuple[str, ...]) -> None:
        dataset = file.handle[path]
        if len(dims) != dataset.ndim:
            raise ValueError(
                f"{file.path}: variable {path!r} should have the axes {dims}, found shape {dataset.shape}"
            )
        self.file, self.path, self.dims = file, path, dims
        self.name, self.source = path, str(file.path)
        self.shape: tuple[int, ...] = dataset.shape
        self.dtype: np.dtype = dataset.dtype
        self._tail = tuple(dim for dim in dims if dim not in ("sample", "time"))
        self._opened: tuple[int, h5py.Dataset, _Offsets | None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def close(self) -> None:
        """Close the file in this process."""
        self._opened = None
        self.file.close()

    def _open(self) -> tuple[h5py.Dataset, _Offsets | None]:
        if self._opened is None or self._opened[0] != os.getpid():
            dataset = self.file.handle[self.path]
            leading = len(self.dims) - len(self._tail)
            plain = self.dims[leading:] == self._tail and "channel" not in self._tail[1:]
            offsets = _Offsets(dataset, leading) if plain and _Offsets.possible(dataset, leading) else None
            self._opened = (os.getpid(), dataset, offsets)
        return self._opened[1:]

    def read(self, sample: int, frames: Sequence[int], channels: slice = slice(None)) -> np.ndarray:
        """Snapshots of one sample as T C X Y.

        Raises:
            ValueError: the file is truncated, damaged or was not written to the end.
        """
        dataset, offsets = self._open()
        if "time" not in self.dims:
            frames = (0,)
        if offsets is not None:
            return self._read_plain(offsets, sample, frames, channels)
        return self._read_slab(dataset, sample, frames, channels)

    def gather(self, request: Request) -> None:
        """Write single snapshots of many samples, straight into the target where the types agree."""
        _, offsets = self._open()
        if offsets is None or request.out.dtype != self.dtype:
            gather_blocks(self, request)
            return
        targets = [request.out[row] for row in request.rows.tolist()]
        self._fetch(offsets, request.samples, request.frames, request.channels, targets)

    def _where(self, sample: int, frame: int) -> str:
        return f"{self.source}: variable {self.name!r}, sample {sample}, snapshot {frame}"

    def _read_plain(
        self, offsets: _Offsets, sample: int, frames: Sequence[int], channels: slice
    ) -> np.ndarray:
        shape = self.shape[len(self.dims) - len(self._tail) :]
        shape = shape if "channel" in self._tail else (1, *shape)
        out = np.empty((len(frames), len(range(shape[0])[channels]), *shape[1:]), self.dtype)
        self._fetch(offsets, np.full(len(frames), sample), np.asarray(frames), channels, list(out))
        return out

    def _fetch(
        self,
        offsets: _Offsets,
        samples: np.ndarray,
        frames: np.ndarray,
        channels: slice,
        targets: Sequence[np.ndarray],
    ) -> None:
        """Read snapshots by their byte offsets."""
        index = {"sample": samples, "time": frames}
        try:
            found = offsets.of(tuple(index[dim] for dim in self.dims if dim in index))
        except RuntimeError as error:  # the file's index of chunks is damaged
            where = self._where(int(samples[0]), int(frames[0]))
            raise ValueError(f"{where} cannot be located, the file is damaged: {error}") from None
        places = np.broadcast_to(found, len(targets))
        skip = 0
        if "channel" in self._tail:
            skip = (channels.start or 0) * (offsets.snapshot_bytes // self.shape[self.dims.index("channel")])
        descriptor = self.file.descriptor
        for n, (place, target) in enumerate(zip(places.tolist(), targets)):
            if place < 0:
                raise ValueError(f"{self._where(int(samples[n]), int(frames[n]))} was never written")
            count = os.preadv(descriptor, [target], place + skip)
            if count != target.nbytes:
                raise ValueError(
                    f"{self._where(int(samples[n]), int(frames[n]))}: expected shape {target.shape} "
                    f"({target.nbytes} bytes), found {count} bytes; the file is truncated"
                )

    def _read_slab(
        self, dataset: h5py.Dataset, sample: int, frames: Sequence[int], channels: slice
    ) -> np.ndarray:
        low, high = min(frames), max(frames) + 1
        # One hyperslab over the needed range, unless that would read far more than is asked for.
        runs = [(low, high)] if high - low <= 2 * len(frames) else [(f, f + 1) for f in frames]
        blocks = []
        for start, stop in runs:
            pick = {"sample": sample, "time": slice(start, stop), "channel": channels}
            try:
                block = dataset[tuple(pick.get(dim, slice(None)) for dim in self.dims)]
            except OSError as error:
                raise ValueError(f"{self._where(sample, start)} cannot be read: {error}") from None
            blocks.append(self._in_order(block))
        if len(runs) == 1:
            return blocks[0][[frame - low for frame in frames]] if "time" in self.dims else blocks[0]
        return np.concatenate(blocks)

    def _in_order(self, block: np.ndarray) -> np.ndarray:
        """Bring a block without the sample axis to T C X Y."""
        dims = [dim for dim in self.dims if dim != "sample"]
        for position, dim in enumerate(("time", "channel")):
            if dim not in dims:
                block = np.expand_dims(block, position)
                dims.insert(position, dim)
        order = [dims.index(dim) for dim in ("time", "channel")]
        order += [axis for axis in range(len(dims)) if axis not in order]
        return block.transpose(order)


class GroupArray:
    """An item repeated in one HDF5 group per sample.

    Args:
        file: where the groups lie.
        groups: group names in sample order.
        item: name inside a group.
        dims: axes of the item, without the sample axis.
    """

    def __init__(self, file: LazyFile, groups: Sequence[str], item: str, dims: tuple[str, ...]) -> None:
        self.file, self.groups, self.item, self._item_dims = file, list(groups), item, dims
        self.name, self.source = item, str(file.path)
        self.dims = ("sample", *dims)
        first = self._item(0)
        self.shape: tuple[int, ...] = (len(self.groups), *first.shape)
        self.dtype: np.dtype = first.dtype

    def close(self) -> None:
        """Close the file in this process."""
        self.file.close()

    def _item(self, sample: int) -> H5Array:
        group = self.file.handle[self.groups[sample]]
        if self.item not in group:
            raise ValueError(
                f"{self.source}: group {self.groups[sample]!r} has no {self.item!r}, found {sorted(group)}"
            )
        return H5Array(self.file, f"{self.groups[sample]}/{self.item}", self._item_dims)

    def read(self, sample: int, frames: Sequence[int], channels: slice = slice(None)) -> np.ndarray:
        """Snapshots of one sample as T C X Y."""
        item = self._item(sample)
        if item.shape != self.shape[1:]:
            raise ValueError(
                f"{self.source}: {item.path} should have shape {self.shape[1:]}, found {item.shape}"
            )
        return item.read(sample, frames, channels)

    def gather(self, request: Request) -> None:
        """Write single snapshots of many samples."""
        gather_blocks(self, request)
