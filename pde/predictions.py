"""Predictions on disk: NetCDF with named axes, units and the truth beside the prediction.

One variable per channel with axes (source, sample, time, x, y), where ``source`` is ``prediction`` or
``truth``; coordinates give sample numbers in the data set and physical times. Read it with
``xarray.open_dataset(path, engine="h5netcdf")`` and select ``ds["u"].sel(source="prediction")``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import h5netcdf
import h5py
import numpy as np
from torch import Tensor

from thalweg.pde.data.space import hdf5_size, reserve, trim
from thalweg.pde.problem import ProblemSpec

SOURCES = ("prediction", "truth")


class PredictionFile:
    """Writes trajectories as they come; the file gets its name once it is complete.

    Use it as a context manager, and as a sink of :meth:`thalweg.pde.evaluation.Evaluator.run`.

    Args:
        path: File to write.
        spec: Problem, which names channels and units.
        samples: Numbers of all samples that will be written, in order.
        times: Physical times of the frames.
        grid: Grid points along x and y.
        attributes: Global attributes, such as the protocol.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        spec: ProblemSpec,
        samples: Sequence[int],
        times: Sequence[float],
        grid: tuple[int, int],
        attributes: Mapping[str, Any] | None = None,
    ) -> None:
        self.path, self.spec = Path(path), spec
        self.rows = {sample: row for row, sample in enumerate(samples)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.partial = self.path.with_name(f".{self.path.name}.partial")
        frames = len(SOURCES) * len(samples) * len(times) * len(spec.outputs)
        size = hdf5_size(4 * frames * grid[0] * grid[1], chunks=frames)
        try:
            reserve(self.partial, size)
        except OSError as error:
            self.partial.unlink(missing_ok=True)
            raise OSError(error.errno, f"cannot write: {error.strerror}", str(self.path)) from error
        self.file = h5netcdf.File(self.partial, "w")
        reserve(self.partial, size)
        axes = {
            "source": len(SOURCES),
            "sample": len(samples),
            "time": len(times),
            "x": grid[0],
            "y": grid[1],
        }
        self.file.dimensions = axes
        self.file.attrs.update({"problem": spec.name, "equation": spec.equation, **(attributes or {})})
        source = self.file.create_variable("source", ("source",), dtype=h5py.string_dtype())
        source[...] = np.array(SOURCES, dtype=object)
        self.file.create_variable("sample", ("sample",), data=np.asarray(samples, np.int64))
        self.file.create_variable("time", ("time",), data=np.asarray(times, np.float64))
        for name, length in zip(("x", "y"), grid, strict=True):
            self.file.create_variable(name, (name,), data=(np.arange(length) / length).astype(np.float64))
        for channel in spec.outputs:
            variable = self.file.create_variable(
                channel.name, tuple(axes), dtype=np.float32, chunks=(1, 1, 1, *grid)
            )
            variable.attrs["units"] = channel.units

    def __call__(self, samples: Sequence[int], prediction_BFCXY: Tensor, truth_BFCXY: Tensor) -> None:
        """Write some samples."""
        rows = [self.rows[sample] for sample in samples]
        for index, fields in enumerate((prediction_BFCXY, truth_BFCXY)):
            values = fields.cpu().numpy()
            for position, channel in enumerate(self.spec.outputs):
                variable = self.file.variables[channel.name]
                for row, trajectory in zip(rows, values[:, :, position], strict=True):
                    variable[index, row] = trajectory

    def __enter__(self) -> PredictionFile:
        """The file itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close; keep the file only if nothing failed."""
        self.close(complete=kind is None)

    def close(self, *, complete: bool) -> None:
        """Close the file and give it its name if it is complete; else remove it."""
        try:
            self.file.close()
            if complete:
                trim(self.partial)
                os.replace(self.partial, self.path)
        finally:
            self.partial.unlink(missing_ok=True)
