"""``thalweg data``: list, info, assemble."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from thalweg.apps.data import assemble, info, list_
from thalweg.pde.data import catalog
from thalweg.pde.data.synthetic import write_synthetic


def test_list_names_every_set(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    list_(ids=True)
    printed = capsys.readouterr().out
    for name, spec in catalog.PROBLEMS.items():
        if not name.endswith((".out", ".time")):
            assert name in printed
            assert spec.aliases[0] in printed
    list_(kind="steady")
    assert "NS-Sines" not in capsys.readouterr().out
    with pytest.raises(
        ValueError, match="kind 'easy' is unknown; choose among pretraining, downstream, steady"
    ):
        list_(kind="easy")


def test_info_tells_what_a_file_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    constants = {"inputs": {"u": [0.5, 2.0]}, "outputs": {"u": [0.5, 2.0]}}
    attributes = {"thalweg_problem": "ACE", "seed": 7, "constants": json.dumps(constants)}
    path = write_synthetic("ACE", tmp_path, attributes=attributes)
    info(str(path))
    printed = capsys.readouterr().out
    for text in (
        "netcdf",
        "data set: ACE",
        "solution (sample 6, time 20, x 16, y 16): float32, chunks (1, 1, 16, 16)",
        "constants of inputs: u mean 0.5, std 2",
        "seed: 7",
    ):
        assert text in printed
    info(str(path), as_json=True)
    report = json.loads(capsys.readouterr().out)
    low, high = report["variables"][0]["ranges"][0]
    with h5py.File(path) as file:
        assert (low, high) == (file["solution"][...].min(), file["solution"][...].max())


def test_info_warns_of_nan_and_names_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_synthetic("ACE", tmp_path, shards=3)
    with h5py.File(folder / "solution_0.nc", "a") as file:
        file["solution"][0, 0, 0, 0] = np.nan
    info(str(folder))
    printed = capsys.readouterr().out
    assert "3 shards, chunks (1, 1, 16, 16)" in printed
    assert "has NaN or infinity" in printed


def test_assemble_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_synthetic("ACE", tmp_path, shards=2)
    assemble(str(folder), str(tmp_path / "whole.nc"))
    assert "whole.nc" in capsys.readouterr().out
    assert h5py.File(tmp_path / "whole.nc")["solution"].shape == (6, 20, 16, 16)
