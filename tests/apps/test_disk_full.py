"""A full disk costs nothing that was there, leaves nothing half-written and is reported in one line.

The limit on the size of files stands for the disk: writing beyond it fails as writing to a full disk does.
"""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from poseidon_runs import scot

from thalweg.apps.checkpoint_io import SafeCheckpointIO
from thalweg.apps.cli import main
from thalweg.apps.report import Report
from thalweg.apps.results import write_json
from thalweg.checkpoints import tensors
from thalweg.pde import plots
from thalweg.pde.data import catalog
from thalweg.pde.data.assemble import assemble
from thalweg.pde.data.space import hdf5_size, reserve, trim
from thalweg.pde.data.synthetic import write_synthetic
from thalweg.pde.predictions import PredictionFile


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def write_report(path: Path) -> None:
    Report(title="x" * 5000).write(path)


def write_checkpoint(path: Path) -> None:
    SafeCheckpointIO().save_checkpoint({"state_dict": {"a": torch.zeros(5000)}}, path)


def write_tensors(path: Path) -> None:
    tensors.save({"a": torch.zeros(5000)}, path)


def write_results(path: Path) -> None:
    write_json({"a": "x" * 5000}, path)


def write_picture(path: Path) -> None:
    plots.save(plots.error_over_time([0.0, 1.0], {"u": [1.0, 2.0]}), path)


def write_predictions(path: Path) -> None:
    with PredictionFile(path, catalog.get("ACE"), [0, 1], [0.5], (32, 32)) as file:
        file([0, 1], torch.zeros(2, 1, 1, 32, 32), torch.zeros(2, 1, 1, 32, 32))


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (write_report, "report.html"),
        (write_checkpoint, "last.ckpt"),
        (write_tensors, "model.safetensors"),
        (write_results, "metrics.json"),
        (write_picture, "picture.png"),
        (write_predictions, "predictions.nc"),
    ],
)
def test_the_old_file_stays_alone_until_a_new_one_is_complete(write, name: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / name
    path.write_text("old")
    with disk_of(2000), pytest.raises(OSError, match=name):
        write(path)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == [name]
    write(path)
    assert path.stat().st_size > 2000
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


GENERATE = ["data", "generate", "ACE", "--samples=6", "--resolution=32", "--batch_size=2", "--no-progress"]


def test_generation_keeps_its_samples_and_continues(tmp_path: Path) -> None:
    main([*GENERATE, f"--out={tmp_path / 'whole'}"])
    command = [*GENERATE, f"--out={tmp_path / 'parts'}"]
    # Enough for the pieces, two samples each, but not for the file.
    with disk_of(250_000), pytest.raises(SystemExit, match=r"cannot write .*ACE\.nc: .*samples are kept"):
        main(command)
    assert len(list((tmp_path / "parts" / "ACE.nc.parts").glob("*.safetensors"))) == 3
    assert [entry.name for entry in (tmp_path / "parts").iterdir()] == ["ACE.nc.parts"]
    main(command)
    whole, parts = ((tmp_path / name / "ACE.nc").read_bytes() for name in ("whole", "parts"))
    assert whole == parts


def test_assembling_leaves_nothing(tmp_path: Path) -> None:
    folder = write_synthetic("ACE", tmp_path / "shards", samples=4, resolution=16, shards=2)
    with disk_of(20_000), pytest.raises(OSError, match=r"cannot write .*ACE\.nc"):
        assemble(folder, tmp_path / "out" / "ACE.nc")
    assert list((tmp_path / "out").iterdir()) == []


def test_import_leaves_nothing(tmp_path: Path) -> None:
    scot().save_pretrained(tmp_path / "source")
    with disk_of(20_000), pytest.raises(SystemExit, match=r"error: cannot write .*model\.safetensors"):
        main(["import", str(tmp_path / "source"), f"--to={tmp_path / 'target'}"])
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]


def test_reserved_space_is_given_back(tmp_path: Path) -> None:
    """An HDF5 file ends where its content ends."""
    path, plain = tmp_path / "a.h5", tmp_path / "plain.h5"
    size = hdf5_size(8000)
    for name in (path, plain):
        with h5py.File(name, "w") as file:
            if name == path:
                reserve(path, size)
            file["a"] = np.arange(1000.0)
    assert path.stat().st_size == size
    trim(path)
    assert path.read_bytes() == plain.read_bytes()
    with disk_of(1000), pytest.raises(OSError, match="File too large"):
        reserve(tmp_path / "b.h5", size)
