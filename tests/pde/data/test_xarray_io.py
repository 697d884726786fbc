"""xarray data sets hold what the files hold, with names, coordinates and units, lazily."""

import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import xarray as xr

from thalweg.pde.data import catalog
from thalweg.pde.data.synthetic import write_synthetic
from thalweg.pde.data.xarray_io import open_trajectories

ROWS = [spec for name, spec in catalog.PROBLEMS.items() if not name.endswith((".out", ".time"))]


@pytest.mark.parametrize("spec", ROWS, ids=lambda spec: spec.name)
def test_every_row_opens_with_its_fields(spec: catalog.ProblemSpec, tmp_path: Path) -> None:
    path = write_synthetic(spec.name, tmp_path, samples=3, resolution=8)
    data = open_trajectories(path, spec.name)
    for channel in (*spec.inputs, *spec.outputs):
        if channel.variable is not None:
            assert data[channel.name].attrs["units"] == channel.units
            assert data[channel.name].sizes["sample"] == 3
    if not spec.steady:
        assert data.time.values[-1] == pytest.approx((spec.frames - 1) * spec.time_step)
    (low, high), _ = spec.domain
    assert low <= data.x.values[0] < data.x.values[-1] <= high
    assert data.attrs["equation"] == spec.equation
    for name, variable in data.variables.items():
        assert np.isfinite(variable.values).all(), name


def test_indexing_equals_the_file(tmp_path: Path) -> None:
    path = write_synthetic("NS-PwC", tmp_path)
    raw = h5py.File(path)["velocity"][...]
    data = open_trajectories(path)
    picks = [
        ({}, raw[:, :, 1]),
        ({"sample": 2}, raw[2, :, 1]),
        ({"time": -1}, raw[:, -1, 1]),
        ({"sample": 2, "time": [5, 1], "x": slice(2, 6)}, raw[2, [5, 1], 1, 2:6]),
        ({"sample": [4, 0], "y": 3}, raw[[4, 0], :, 1, :, 3]),
        ({"sample": 0, "time": 0, "x": 1, "y": 2}, raw[0, 0, 1, 1, 2]),
        ({"sample": slice(1, 6, 2), "x": [3, 0], "y": [1, 2]}, raw[1:6:2, :, 1][:, :, [3, 0]][..., [1, 2]]),
        ({"sample": slice(0, 0)}, raw[:0, :, 1]),
    ]
    for pick, truth in picks:
        np.testing.assert_array_equal(data.v.isel(pick).values, truth)


def test_channels_without_a_name_keep_their_index(tmp_path: Path) -> None:
    data = open_trajectories(write_synthetic("CE-RP", tmp_path))
    assert list(data.data_vars) == ["rho", "u", "v", "p", "data_4"]


def test_dask_chunks(tmp_path: Path) -> None:
    folder = write_synthetic("ACE", tmp_path, samples=8, shards=3)
    eager, lazy = open_trajectories(folder), open_trajectories(folder, chunks={"sample": 2, "time": 5})
    assert lazy.u.chunks == ((2, 2, 2, 2), (5, 5, 5, 5), (16,), (16,))
    xr.testing.assert_equal(lazy.mean(("x", "y")).compute(), eager.mean(("x", "y")))


def test_dask_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_synthetic("ACE", tmp_path)
    monkeypatch.setitem(sys.modules, "dask.array", None)
    with pytest.raises(ImportError, match=r"pip install 'thalweg\[dask\]'"):
        open_trajectories(path, chunks=1)
    assert open_trajectories(path).u.shape == (6, 20, 16, 16)


def test_name_that_contradicts_the_file(tmp_path: Path) -> None:
    path = write_synthetic("ACE", tmp_path)
    with pytest.raises(ValueError, match="has no variable 'velocity'"):
        open_trajectories(path, "NS-Sines")
