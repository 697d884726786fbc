"""Assembling shards gives one file in the published order, whole or not at all."""

import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from thalweg.pde.data import assemble as assemble_module
from thalweg.pde.data.assemble import assemble
from thalweg.pde.data.synthetic import write_netcdf, write_synthetic
from thalweg.pde.data.trajectories import open_problem


def test_assembled_file_equals_its_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assemble_module, "_PIECE_BYTES", 6_000)  # several pieces per shard
    folder = write_synthetic("Wave-Layer", tmp_path, samples=26, resolution=8, shards=12)
    steps: list[tuple[int, int]] = []
    out = assemble(
        folder, tmp_path / "out" / "Wave-Layer.nc", lambda done, total: steps.append((done, total))
    )
    assert steps[-1] == (52, 52)
    assert len(steps) > 12
    shards, whole = open_problem("Wave-Layer", folder), open_problem("Wave-Layer", out)
    np.testing.assert_array_equal(whole.inputs(range(26), 20), shards.inputs(range(26), 20))
    with h5py.File(out) as file:
        assert file["solution"].chunks == (1, 1, 8, 8)
        assert file["c"].chunks == (1, 8, 8)
        first = h5py.File(folder / "solution_10.nc")["solution"][0]
        # Shard 10 follows shard 1: two shards of three samples come before it.
        np.testing.assert_array_equal(file["solution"][6], first)
    assert [path.name for path in out.parent.iterdir()] == ["Wave-Layer.nc"]


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    folder = write_synthetic("ACE", tmp_path, shards=2)
    out = tmp_path / "ACE.nc"
    out.write_text("mine")
    with pytest.raises(FileExistsError, match=r"ACE\.nc exists"):
        assemble(folder, out)
    assert out.read_text() == "mine"


def test_unequal_shards_leave_nothing(tmp_path: Path) -> None:
    for k, n in enumerate((4, 5)):
        dims = ("sample", "time", "x", "y")
        write_netcdf(tmp_path / f"solution_{k}.nc", {"solution": (dims, np.zeros((2, 3, n, n)))})
    with pytest.raises(ValueError, match="shards must agree"):
        assemble(tmp_path, tmp_path / "out" / "ACE.nc")
    assert not (tmp_path / "out").exists()


def test_too_little_space_is_told_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_synthetic("ACE", tmp_path, shards=2)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"GB free, .* GB are needed"):
        assemble(folder, tmp_path / "whole.nc")
    assert not (tmp_path / "whole.nc").exists()


def test_full_disk_leaves_nothing(tmp_path: Path) -> None:
    folder = write_synthetic("ACE", tmp_path, samples=40, resolution=32, shards=2)
    out = tmp_path / "out" / "ACE.nc"
    code = (
        "import resource, sys; from thalweg.pde.data.assemble import assemble;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000));"
        "assemble(sys.argv[1], sys.argv[2])"
    )
    run = subprocess.run([sys.executable, "-c", code, folder, out], capture_output=True, text=True)
    # HDF5 may crash on exit after a failed write; what counts is the message and what is left.
    assert run.returncode != 0
    assert "cannot write" in run.stderr
    assert list(out.parent.iterdir()) == []
    assert not list(tmp_path.rglob("*.part"))
