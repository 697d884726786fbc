"""Finished pieces of a data set that is being generated.

``<file>.parts/`` holds one safetensors file per batch of consecutive samples, ``<first>-<stop>.safetensors``,
and ``manifest.json`` with everything that decides the numbers. A piece appears by a rename of a complete,
flushed file: whatever is there after a crash is whole, and a rerun computes only what is missing.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save

from thalweg.checkpoints.atomic import write_bytes, write_text

_NAME = re.compile(r"(\d+)-(\d+)\.safetensors")


class Parts:
    """The folder of pieces that belongs to one target file."""

    def __init__(self, target: Path) -> None:
        self.folder = target.with_name(f"{target.name}.parts")

    def open(self, manifest: Mapping[str, object], *, overwrite: bool) -> None:
        """Make the folder, or check that what it holds belongs to the same run.

        Raises:
            ValueError: If it was started with other parameters and ``overwrite`` is False.
        """
        if overwrite:
            self.remove()
        self.folder.mkdir(parents=True, exist_ok=True)
        record = self.folder / "manifest.json"
        if record.exists():
            changed = differences(json.loads(record.read_text()), manifest)
            if changed:
                raise ValueError(
                    f"{self.folder} was started with other parameters ({changed}); finish it with those, "
                    "or pass --overwrite to start again"
                )
        else:
            write_text(record, json.dumps(manifest, indent=1))
        for leftover in self.folder.glob("*.tmp"):
            leftover.unlink(missing_ok=True)

    def finished(self, samples: int) -> dict[int, tuple[Path, int]]:
        """Sample -> (piece, position in it) of the finished ones below ``samples``; drops bad pieces."""
        places: dict[int, tuple[Path, int]] = {}
        for path in sorted(self.folder.iterdir()):
            match = _NAME.fullmatch(path.name)
            if match is None:
                continue
            if not _readable(path):
                path.unlink()
                continue
            first, stop = map(int, match.groups())
            places |= {i: (path, i - first) for i in range(first, min(stop, samples))}
        return places

    def missing(self, samples: int, size: int) -> list[range]:
        """Consecutive samples that still have to be computed, at most ``size`` at a time."""
        done = self.finished(samples)
        batches: list[range] = []
        for index in range(samples):
            if index in done:
                continue
            last = batches[-1] if batches else range(0)
            if len(last) in (0, size) or last.stop != index:
                batches.append(range(index, index + 1))
            else:
                batches[-1] = range(last.start, index + 1)
        return batches

    def path(self, batch: range) -> Path:
        """File of a batch of consecutive samples."""
        return self.folder / f"{batch.start:07d}-{batch.stop:07d}.safetensors"

    def samples(self, count: int) -> Iterator[dict[str, np.ndarray]]:
        """Variables of sample 0, 1, ... without the sample axis; one piece at a time is in memory."""
        places = self.finished(count)
        current, arrays = None, {}
        for index in range(count):
            path, position = places[index]
            if path != current:
                current, arrays = path, load_file(path)
            yield {variable: array[position] for variable, array in arrays.items()}

    def remove(self) -> None:
        """Delete all pieces."""
        shutil.rmtree(self.folder, ignore_errors=True)


def write_part(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write one piece, complete or not at all.

    Raises:
        OSError: If the disk is full.
    """
    write_bytes(path, save({name: np.ascontiguousarray(array) for name, array in arrays.items()}))


def differences(old: Mapping[str, object], new: Mapping[str, object]) -> str:
    """Entries that differ, as ``name: old, now new``; empty if none does."""
    # The new values take the way through JSON that the old ones took.
    new = json.loads(json.dumps(new))
    return "; ".join(
        f"{key}: {old.get(key)!r}, now {new.get(key)!r}"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key)
    )


def _readable(path: Path) -> bool:
    """Whether the header is sound and the size agrees with it."""
    try:
        with safe_open(path, framework="np"):
            return True
    except (SafetensorError, OSError):
        return False
