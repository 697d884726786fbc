"""Raw fields of a data set, channel by channel, as the table describes them.

A :class:`TrajectoryReader` gathers snapshots of many trajectories at once: requests are sorted by sample and
time, repeated ones are read once, and each trajectory is read in one go.

Legend: B samples (batch), T snapshots, C channels, H W space after the set's own axis convention.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from thalweg.pde.data import catalog
from thalweg.pde.data.formats.contents import Contents
from thalweg.pde.data.open import open_contents
from thalweg.pde.data.resample import downsample
from thalweg.pde.data.stored import Request, StoredArray, size
from thalweg.pde.data.synthesis import synthesise
from thalweg.pde.problem import Channel, ProblemSpec, Splits

Side = Literal["inputs", "outputs"]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Run:
    """Neighbouring channels read from one variable."""

    array: StoredArray
    channels: slice
    """Along the variable's channel axis."""
    target: slice
    """Along the network's channels."""


def _runs(channels: Sequence[Channel], contents: Contents) -> list[_Run]:
    """Group channels that lie side by side in the file."""
    runs: list[_Run] = []
    for position, channel in enumerate(channels):
        if channel.variable is None:
            continue
        array = contents.array(channel.variable)
        first = channel.index or 0
        last = runs[-1] if runs else None
        if last and last.array is array and (last.channels.stop, last.target.stop) == (first, position):
            runs[-1] = replace(
                last,
                channels=slice(last.channels.start, first + 1),
                target=slice(last.target.start, position + 1),
            )
        else:
            runs.append(
                _Run(array=array, channels=slice(first, first + 1), target=slice(position, position + 1))
            )
    return runs


class TrajectoryReader:
    """Trajectories of one data set.

    Args:
        spec: the data set.
        contents: its opened file.
        splits: sizes of its parts.
        resolution: side of a coarser grid to give the fields on; periodic problems only.
        check_finite: refuse NaN and infinity; every snapshot is checked when a process first reads it.
    """

    def __init__(
        self,
        spec: ProblemSpec,
        contents: Contents,
        splits: Splits,
        *,
        resolution: int | None = None,
        check_finite: bool = True,
    ) -> None:
        self.spec, self.contents, self.splits = spec, contents, splits
        self.check_finite = check_finite
        self.resolution = resolution
        sides = {"inputs": spec.inputs, "outputs": spec.outputs}
        self._runs = {side: _runs(channels, contents) for side, channels in sides.items()}
        self.frames = max([size(contents.array(v.name), "time") or 1 for v in spec.variables])
        """Snapshots per trajectory in this file."""
        self.grid = self._grid()
        """Height and width of the fields."""
        self._planes = {
            side: [
                (position, synthesise(channel.formula or channel.name, self.grid)[None])
                for position, channel in enumerate(channels)
                if channel.variable is None
            ]
            for side, channels in sides.items()
        }
        self._checked: dict[str, np.ndarray] = {}

    def _grid(self) -> tuple[int, int]:
        space = [
            tuple(n for dim, n in zip(array.dims, array.shape) if dim in ("x", "y"))
            for array in map(self.contents.array, [v.name for v in self.spec.variables])
            if "x" in array.dims
        ]
        if len(set(space)) != 1 or len(space[0]) != 2:
            raise ValueError(f"{self.contents.path}: variables lie on different grids or not in 2-D: {space}")
        stored = space[0][::-1] if self.spec.transpose else space[0]
        if self.resolution is None or (self.resolution, self.resolution) == stored:
            return stored
        if self.spec.boundary != "periodic":
            raise ValueError(
                f"resolution={self.resolution}: {self.spec.name} is not periodic ({self.spec.boundary}), "
                "so it cannot be resampled spectrally"
            )
        if not 1 <= self.resolution <= min(stored):
            raise ValueError(
                f"resolution={self.resolution} of {self.spec.name} must be at most {min(stored)}"
            )
        return (self.resolution, self.resolution)

    def __len__(self) -> int:
        return self.splits.total

    @property
    def times(self) -> np.ndarray:
        """Physical times of the snapshots, from the file or else from the table."""
        if self.contents.times is not None and len(self.contents.times) == self.frames:
            return np.asarray(self.contents.times, np.float64)
        return np.arange(self.frames) * self.spec.time_step

    @property
    def constants(self) -> dict[str, dict[str, list[float]]] | None:
        """Normalisation constants stored by our generators, None for other files."""
        return self.contents.json_attribute("constants")

    def inputs(self, samples: Sequence[int], frame: int = 0) -> np.ndarray:
        """Raw input channels of some samples at one snapshot, float32 B C H W."""
        out = np.empty((len(samples), len(self.spec.inputs), *self.grid), np.float32)
        self.fill("inputs", np.asarray(samples), np.full(len(samples), frame), out)
        return out

    def outputs(self, samples: Sequence[int], frames: Sequence[int] = (0,)) -> np.ndarray:
        """Raw output channels of some samples at some snapshots, float32 B T C H W."""
        out = np.empty((len(samples) * len(frames), len(self.spec.outputs), *self.grid), np.float32)
        self.fill("outputs", np.repeat(samples, len(frames)), np.tile(frames, len(samples)), out)
        return out.reshape(len(samples), len(frames), *out.shape[1:])

    def fill(
        self,
        side: Side,
        samples: np.ndarray,
        frames: np.ndarray,
        out_NCHW: np.ndarray,
        offset: np.ndarray | None = None,
        std: np.ndarray | None = None,
        rows: np.ndarray | None = None,
    ) -> None:
        """Write the snapshots (samples[n], frames[n]) to out[rows[n]], or out[n].

        They are normalised if `offset` and `std` (C,) are given.
        """
        self._check_range(samples, frames)
        rows = np.arange(len(samples)) if rows is None else rows
        everywhere = slice(None) if len(rows) == len(out_NCHW) else rows
        for c, plane in self._planes[side]:
            if offset is not None and std is not None:
                plane = (plane - offset[c]) / std[c]
            out_NCHW[everywhere, c] = plane
        _, first, inverse = np.unique(samples * self.frames + frames, return_index=True, return_inverse=True)
        copies = np.flatnonzero(first[inverse] != np.arange(len(rows)))
        for run in self._runs[side]:
            fields = out_NCHW[:, run.target]
            self._fill_run(run, samples[first], frames[first], fields, rows[first])
            for target, source in zip(rows[copies].tolist(), rows[first[inverse[copies]]].tolist()):
                fields[target] = fields[source]
            if offset is not None and std is not None:
                _normalize(fields, rows, offset[run.target], std[run.target])

    def _fill_run(
        self, run: _Run, samples: np.ndarray, frames: np.ndarray, out: np.ndarray, rows: np.ndarray
    ) -> None:
        """Write different snapshots, sorted by sample and time, to rows of a view with the run's channels."""
        array = run.array
        space = tuple(n for dim, n in zip(array.dims, array.shape) if dim in ("x", "y"))
        direct = space == self.grid and not self.spec.transpose
        if direct:
            block, at = out, rows
        else:
            block, at = np.empty((len(rows), out.shape[1], *space), np.float32), np.arange(len(rows))
        array.gather(Request(samples=samples, frames=frames, channels=run.channels, out=block, rows=at))
        if self.check_finite:
            self._refuse_non_finite(run, samples, frames, block, at)
        if direct:
            return
        if not space:  # one value per sample: spread over the plane
            block = block[:, :, None, None]
        elif self.spec.transpose:
            block = block.swapaxes(-1, -2)
        if space and block.shape[-2:] != self.grid:
            block = downsample(block, self.grid[0])
        out[rows] = block

    def _check_range(self, samples: np.ndarray, frames: np.ndarray) -> None:
        for what, values, limit in (("sample", samples, len(self)), ("snapshot", frames, self.frames)):
            if len(values) and (values.min() < 0 or values.max() >= limit):
                wrong = values.max() if values.max() >= limit else values.min()
                raise IndexError(f"{self.contents.path}: {what} {wrong} does not exist, there are {limit}")

    def _refuse_non_finite(
        self, run: _Run, samples: np.ndarray, frames: np.ndarray, block: np.ndarray, rows: np.ndarray
    ) -> None:
        """Check each snapshot once per process; a sum is enough and several times faster than isfinite."""
        key = f"{run.array.name} {run.channels}"
        if key not in self._checked:
            self._checked[key] = np.zeros((len(self), self.frames), bool)
        seen = self._checked[key]
        for n in np.flatnonzero(~seen[samples, frames]).tolist():
            fields = block[rows[n]]
            if not np.isfinite(fields.sum(dtype=np.float64)):
                finite = np.isfinite(fields).reshape(len(fields), -1).all(axis=1)
                raise ValueError(
                    f"{run.array.source}: variable {run.array.name!r} has NaN or infinity in "
                    f"sample {samples[n]}, snapshot {frames[n]}, "
                    f"channel {run.channels.start + int((~finite).argmax())}"
                )
        seen[samples, frames] = True

    def close(self) -> None:
        """Close files in this process; reading opens them again."""
        self.contents.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_checked": {}}


def _normalize(fields: np.ndarray, rows: np.ndarray, offset: np.ndarray, std: np.ndarray) -> None:
    """(fields - offset) / std in place, on some rows."""
    shift, scale = (values.astype(fields.dtype)[:, None, None] for values in (offset, std))
    whole = len(rows) == len(fields)
    for block in [fields] if whole else [fields[row] for row in rows.tolist()]:
        np.subtract(block, shift, out=block)
        np.divide(block, scale, out=block)


def split_sizes(
    spec: ProblemSpec, contents: Contents, num_val: int | None = None, num_test: int | None = None
) -> Splits:
    """Sizes of the parts of a file.

    Numbers given by the caller win, then the file's own ``num_val`` and ``num_test``. A file of the published
    length has the published splits; any other keeps a tenth, at least one, for validation and for testing.

    Raises:
        ValueError: no training trajectory would be left.
    """
    first = contents.array(spec.variables[0].name)
    total = first.shape[0] if "sample" in first.dims else 1
    published = total == spec.splits.total
    tenth = max(1, total // 10)
    parts = []
    for given, name in ((num_val, "num_val"), (num_test, "num_test")):
        fallback = getattr(spec.splits, name.removeprefix("num_")) if published else tenth
        parts.append(given if given is not None else int(contents.attributes.get(name, fallback)))
    if min(parts) < 0 or sum(parts) >= total:
        raise ValueError(
            f"{contents.path} has {total} samples: "
            f"num_val={parts[0]} and num_test={parts[1]} leave none to train"
        )
    return Splits(total=total, val=parts[0], test=parts[1])


def open_problem(
    spec: ProblemSpec | str,
    path: str | os.PathLike[str],
    *,
    num_val: int | None = None,
    num_test: int | None = None,
    resolution: int | None = None,
    check_finite: bool = True,
) -> TrajectoryReader:
    """Reader of a data set.

    Args:
        spec: row of the table, or its name.
        path: file, folder with the file, or folder of shards.
        num_val: size of the validation part, see `split_sizes`.
        num_test: size of the test part.
        resolution: coarser grid, see `TrajectoryReader`.
        check_finite: refuse NaN and infinity.
    """
    if isinstance(spec, str):
        spec = catalog.get(spec)
    contents = open_contents(spec, path)
    splits = split_sizes(spec, contents, num_val, num_test)
    return TrajectoryReader(spec, contents, splits, resolution=resolution, check_finite=check_finite)


def pixel_mask(spec: ProblemSpec, inputs_BCHW: np.ndarray) -> np.ndarray | None:
    """Outputs that do not count, True where masked: (B, Cout), (B, Cout, H, W), or None without a mask.

    Args:
        spec: the data set.
        inputs_BCHW: raw inputs; an airfoil is where its indicator is 1.
    """
    batch, num_out = len(inputs_BCHW), len(spec.outputs)
    if spec.mask_rule == "channels":
        return np.tile([channel.masked for channel in spec.outputs], (batch, 1))
    if spec.mask_rule == "input_is_one":
        return np.repeat(inputs_BCHW[:, :1] == 1, num_out, axis=1)
    return None
