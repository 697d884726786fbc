"""The driver: same file whatever the batching and however often it was stopped; nothing half-written."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import psutil
import pytest
import torch
import xarray

from thalweg.pde.data import catalog
from thalweg.pde.data.trajectories import open_problem
from thalweg.pde.solvers import recipes
from thalweg.pde.solvers.generate import generate

SMALL = {"samples": 6, "resolution": 16, "frames": 3, "progress": False}


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Content of the small NS-Sines file, made in one go."""
    return generate("NS-Sines", tmp_path_factory.mktemp("reference"), **SMALL).read_bytes()


@pytest.mark.parametrize("batch_size", [1, 4, 6])
def test_file_does_not_depend_on_the_batch_size(tmp_path: Path, reference: bytes, batch_size: int) -> None:
    assert generate("NS-Sines", tmp_path, batch_size=batch_size, **SMALL).read_bytes() == reference


def test_file_does_not_depend_on_the_number_of_workers(tmp_path: Path, reference: bytes) -> None:
    assert generate("NS-Sines", tmp_path, workers=2, batch_size=2, **SMALL).read_bytes() == reference
    assert _names(tmp_path) == ["NS-Sines.nc"]


@pytest.mark.slow
def test_file_does_not_depend_on_the_engine(tmp_path: Path, reference: bytes) -> None:
    made = generate("NS-Sines", tmp_path, workers=2, batch_size=2, engine="dask", **SMALL)
    assert made.read_bytes() == reference


def test_larger_set_starts_with_the_samples_of_a_smaller_one(tmp_path: Path) -> None:
    few = generate("NS-Sines", tmp_path / "few", **{**SMALL, "samples": 2})
    many = generate("NS-Sines", tmp_path / "many", **{**SMALL, "samples": 3})
    with h5py.File(few) as a, h5py.File(many) as b:
        assert np.array_equal(a["velocity"][:], b["velocity"][:2])


class Layout(NamedTuple):
    """What a generated file must look like."""

    name: str
    dims: tuple[str, ...]
    chunks: tuple[int, ...]
    axes: str


@pytest.mark.parametrize(
    "layout",
    [
        Layout("NS-Sines", ("sample", "time", "channel", "x", "y"), (1, 1, 3, 16, 16), "x y"),
        Layout("NS-SL", ("sample", "time", "channel", "x", "y"), (1, 1, 2, 16, 16), "y x"),
        Layout("ACE", ("sample", "time", "x", "y"), (1, 1, 16, 16), "x y"),
    ],
    ids=lambda layout: layout.name,
)
def test_file_has_the_published_layout_and_says_what_it_is(tmp_path: Path, layout: Layout) -> None:
    spec, made = catalog.get(layout.name), recipes.get(layout.name)
    path = generate(layout.name, tmp_path, seed=3, num_val=2, num_test=1, **SMALL)
    assert path.name == spec.file
    variable = spec.variables[0].name
    with h5py.File(path) as file:
        assert file[variable].chunks == layout.chunks
        assert file[variable].dtype == np.float32
        attributes = dict(file.attrs)
    assert attributes["thalweg_problem"] == layout.name
    assert attributes["axes"] == layout.axes
    assert (attributes["seed"], attributes["num_val"], attributes["num_test"]) == (3, 2, 1)
    assert json.loads(attributes["parameters"]) == json.loads(json.dumps(dict(made.parameters)))
    with xarray.open_dataset(path, engine="h5netcdf") as data:
        assert data[variable].dims == layout.dims
        assert data["time"].values.tolist() == list(made.times[:3])
        expected = made.sample(made.request(tuple(range(6)), seed=3, resolution=16, frames=3))[variable]
        assert np.array_equal(data[variable].values, expected.numpy())


def test_constants_are_those_of_the_training_part(tmp_path: Path) -> None:
    path = generate("NS-PwC", tmp_path, num_val=1, num_test=2, **SMALL)
    with h5py.File(path) as file:
        train = file["velocity"][:3].astype(np.float64)
        constants = json.loads(file.attrs["constants"])
    for kind in ("inputs", "outputs"):
        for channel, name in enumerate(("u", "v", "tracer")):
            values = train[:, :, channel]
            assert constants[kind][name] == pytest.approx([values.mean(), values.std()], rel=1e-12, abs=1e-15)
        assert constants[kind]["rho"] == [0.8, 0.31]


def test_reader_of_the_catalog_row_gets_the_fields(tmp_path: Path) -> None:
    """The shear layer is stored transposed; the reader returns the solver's own orientation."""
    path = generate("NS-SL", tmp_path, **SMALL)
    made = recipes.get("NS-SL")
    stored = made.sample(made.request((4,), seed=0, resolution=16, frames=3))["velocity"]
    reader = open_problem(catalog.get("NS-SL"), path)
    read = np.asarray(reader.outputs([4], [0, 1, 2]))
    assert np.array_equal(read[0, :, 1:3], stored[0].mT.numpy())
    assert reader.constants is not None


STOPPABLE = {
    "samples": 12,
    "resolution": 64,
    "frames": 5,
    "batch_size": 1,
    "progress": False,
    "dtype": "float64",
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Content of a file that takes a few seconds, made in one go."""
    return generate("NS-Gauss", tmp_path_factory.mktemp("uninterrupted"), **STOPPABLE).read_bytes()


@pytest.mark.parametrize(
    ("sent", "workers"),
    [
        (signal.SIGINT, 1),
        (signal.SIGKILL, 2),
        pytest.param(signal.SIGKILL, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 2, marks=pytest.mark.slow),
    ],
)
def test_stopped_run_continues_to_the_same_file(
    tmp_path: Path, uninterrupted: bytes, sent: signal.Signals, workers: int
) -> None:
    process, parts = _start(tmp_path, workers)
    process.send_signal(sent)
    process.communicate(timeout=60)
    assert process.returncode != 0
    kept = {path.name: path.stat().st_mtime_ns for path in parts.glob("*.safetensors")}
    assert 3 <= len(kept) < STOPPABLE["samples"]
    assert not (tmp_path / "NS-Gauss.nc").exists()

    computed = []
    original = recipes.get("NS-Gauss").sample
    with pytest.MonkeyPatch.context() as patch:
        watched = replace(
            recipes.get("NS-Gauss"),
            sample=lambda request: computed.append(request.indices) or original(request),
        )
        patch.setattr(recipes, "get", lambda name: watched)
        path = generate("NS-Gauss", tmp_path, **STOPPABLE)
    assert path.read_bytes() == uninterrupted
    # A worker may have finished its piece just after its parent was killed.
    assert 0 < len(computed) <= STOPPABLE["samples"] - len(kept)
    assert _names(tmp_path) == ["NS-Gauss.nc", "run.py"]


def test_other_parameters_are_not_mixed_into_a_started_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fail_after(monkeypatch, 3)
    with pytest.raises(OSError, match="No space left"):
        generate("NS-Sines", tmp_path, batch_size=1, **SMALL)
    monkeypatch.undo()
    with pytest.raises(
        ValueError, match=r"started with other parameters \(resolution: 16, now 24; seed: 0, now 1\)"
    ):
        generate("NS-Sines", tmp_path, seed=1, **{**SMALL, "resolution": 24})
    path = generate("NS-Sines", tmp_path, seed=1, overwrite=True, **{**SMALL, "resolution": 24})
    with h5py.File(path) as file:
        assert file["velocity"].shape == (6, 3, 3, 24, 24)


def test_finished_file_is_not_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = generate("NS-Sines", tmp_path, **SMALL)
    before = path.stat()
    monkeypatch.setattr("thalweg.pde.solvers.generate.run", lambda *_, **__: pytest.fail("computed again"))
    assert generate("NS-Sines", tmp_path, **{**SMALL, "progress": True}) == path
    assert path.stat() == before
    assert "is already there" in capsys.readouterr().err


def test_finished_file_with_other_parameters_is_kept(tmp_path: Path) -> None:
    path = generate("NS-Sines", tmp_path, **SMALL)
    content = path.read_bytes()
    with pytest.raises(ValueError, match=r"exists with other parameters \(samples: 6, now 7\)"):
        generate("NS-Sines", tmp_path, **{**SMALL, "samples": 7})
    assert path.read_bytes() == content


def test_foreign_file_is_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "NS-Sines.nc"
    with h5py.File(path, "w") as file:
        file["velocity"] = np.zeros(3)
    content = path.read_bytes()
    with pytest.raises(ValueError, match="was not generated here"):
        generate("NS-Sines", tmp_path, overwrite=True, **SMALL)
    assert path.read_bytes() == content


def test_full_disk_keeps_finished_samples_and_no_half_file(
    tmp_path: Path, reference: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fail_after(monkeypatch, 3)
    with pytest.raises(OSError, match="No space left"):
        generate("NS-Sines", tmp_path, batch_size=1, **SMALL)
    # The first of the three writes is the manifest.
    assert _names(tmp_path / "NS-Sines.nc.parts") == [
        "0000000-0000001.safetensors",
        "0000001-0000002.safetensors",
        "manifest.json",
    ]
    monkeypatch.undo()
    assert generate("NS-Sines", tmp_path, batch_size=1, **SMALL).read_bytes() == reference


def test_full_disk_while_assembling_leaves_no_half_file(tmp_path: Path, reference: bytes) -> None:
    """A limit on the file size stops HDF5 in the middle of the final file, as a full disk would."""
    script = (
        "import resource, signal; from thalweg.pde.solvers.generate import generate\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        f"try: generate('NS-Sines', {str(tmp_path)!r}, batch_size=1, **{SMALL!r})\n"
        "except OSError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "cannot write" in done.stdout
    assert "finished samples are kept" in done.stdout
    assert _names(tmp_path) == ["NS-Sines.nc.parts"]
    assert generate("NS-Sines", tmp_path, **SMALL).read_bytes() == reference


def test_too_little_room_is_noticed_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match="GB free"):
        generate("NS-Sines", tmp_path, **SMALL)
    assert _names(tmp_path / "NS-Sines.nc.parts") == ["manifest.json"]


def test_damaged_piece_is_computed_again(
    tmp_path: Path, reference: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fail_after(monkeypatch, 4)
    with pytest.raises(OSError, match="No space left"):
        generate("NS-Sines", tmp_path, batch_size=1, **SMALL)
    monkeypatch.undo()
    piece = tmp_path / "NS-Sines.nc.parts" / "0000001-0000002.safetensors"
    piece.write_bytes(piece.read_bytes()[:100])
    assert generate("NS-Sines", tmp_path, **SMALL).read_bytes() == reference


def test_solution_with_nan_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = replace(
        recipes.get("NS-Sines"),
        sample=lambda request: {"velocity": torch.full((len(request.indices), 3, 3, 16, 16), torch.nan)},
    )
    monkeypatch.setattr(recipes, "get", lambda name: broken)
    with pytest.raises(FloatingPointError, match=r"'velocity' is not finite in samples \(0, 1\) of seed 0"):
        generate("NS-Sines", tmp_path, batch_size=2, **SMALL)
    assert _names(tmp_path / "NS-Sines.nc.parts") == ["manifest.json"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "NS-Sine"}, "did you mean NS-Sines"),
        ({"samples": -3}, "samples must be at least 1, got -3"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"seed": -1}, "seed must not be negative, got -1"),
        ({"resolution": 33}, "multiple of 8"),
        ({"num_val": 5, "num_test": 1}, "got 5 and 1 of 6 samples"),
        ({"num_test": -1}, "must not be negative"),
        ({"engine": "mpi"}, "engine must be one of processes, dask, got 'mpi'"),
        ({"device": "tpu9"}, "device 'tpu9' cannot be used"),
    ],
)
def test_impossible_arguments_are_refused_before_anything_is_written(
    tmp_path: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        generate(**{"name": "NS-Sines", "out": tmp_path, **SMALL, **options})
    assert _names(tmp_path) == []


@pytest.mark.slow
def test_death_of_a_worker_is_explained(tmp_path: Path) -> None:
    process, _ = _start(tmp_path, workers=2)
    workers = [
        child for child in psutil.Process(process.pid).children() if "spawn_main" in " ".join(child.cmdline())
    ]
    workers[0].kill()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "a worker process died, perhaps for lack of memory; finished samples are kept" in stderr


def _start(folder: Path, workers: int) -> tuple[subprocess.Popen[str], Path]:
    """Run the stoppable generation in a process of its own; returns when three pieces are there."""
    script = folder / "run.py"
    script.write_text(
        "import signal\n"
        "from thalweg.pde.solvers.generate import generate\n"
        # Shells start background jobs with SIGINT ignored, which children inherit.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "if __name__ == '__main__':\n"
        f"    generate('NS-Gauss', {str(folder)!r}, workers={workers}, **{STOPPABLE!r})\n"
    )
    parts = folder / "NS-Gauss.nc.parts"
    process = subprocess.Popen([sys.executable, script], stderr=subprocess.PIPE, text=True)
    while len(list(parts.glob("*.safetensors"))) < 3:
        assert process.poll() is None, "the run ended before it could be stopped"
        time.sleep(0.01)
    return process, parts


def _fail_after(monkeypatch: pytest.MonkeyPatch, writes: int) -> None:
    """Let the disk be full after a number of files."""
    real, count = os.fsync, iter(range(writes))

    def fsync(descriptor: int) -> None:
        if next(count, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
