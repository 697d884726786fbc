"""Files of The Well, PDEBench and their relatives are read field by field, and train without a table row."""

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from thalweg.pde.data.datamodule import DatasetConfig, PDEDataModule
from thalweg.pde.data.formats.detect import detect, open_any
from thalweg.pde.data.recognise import spec_for_file
from thalweg.pde.data.trajectories import open_problem

B, T, X, Y = 10, 5, 8, 6


def field(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(1, 2, shape).astype(np.float32)


def write_well(path: Path) -> dict[str, np.ndarray]:
    """Euler flow in The Well's format, with constant fields and a tensor."""
    fields = {
        "t0_fields/density": (field(B, T, X, Y, seed=1), {}),
        "t0_fields/speed": (field(B, X, Y, seed=2), {"time_varying": False}),
        "t0_fields/profile": (field(X, seed=3), {"sample_varying": False, "time_varying": False, "y": False}),
        "t1_fields/momentum": (field(B, T, X, Y, 2, seed=4), {}),
        "t2_fields/stress": (field(B, T, X, Y, 2, 2, seed=5), {}),
    }
    with h5py.File(path, "w") as file:
        file.attrs.update({"dataset_name": "toy_euler", "n_trajectories": B, "grid_type": "cartesian"})
        dimensions = file.create_group("dimensions")
        dimensions.attrs["spatial_dims"] = ["x", "y"]
        for name, values in (("time", np.arange(T) * 0.5), ("x", np.arange(X)), ("y", np.arange(Y))):
            dimensions[name] = values.astype(np.float32)
        for order in range(3):
            file.create_group(f"t{order}_fields")
        for name, (values, flags) in fields.items():
            item = file.create_dataset(name, data=values)
            item.attrs["sample_varying"] = flags.get("sample_varying", True)
            item.attrs["time_varying"] = flags.get("time_varying", True)
            item.attrs["dim_varying"] = [True, flags.get("y", True)]
        wall = file.create_group("boundary_conditions/x_wall")
        wall.attrs["bc_type"] = "PERIODIC"
    return {name.rpartition("/")[2]: values for name, (values, _) in fields.items()}


def test_the_well(tmp_path: Path) -> None:
    truth = write_well(tmp_path / "well.hdf5")
    contents = open_any(tmp_path / "well.hdf5")
    assert contents.format == "well"
    assert contents.attributes["boundary"] == "periodic"
    assert contents.times.tolist() == [0.0, 0.5, 1.0, 1.5, 2.0]
    read = {name: array.read(7, [4, 1]) for name, array in contents.arrays.items()}
    np.testing.assert_array_equal(read["density"][:, 0], truth["density"][7, [4, 1]])
    np.testing.assert_array_equal(read["speed"][0, 0], truth["speed"][7])
    np.testing.assert_array_equal(read["profile"][0, 0], truth["profile"])
    momentum = np.moveaxis(truth["momentum"][7, [4, 1]], -1, 1)
    np.testing.assert_array_equal(read["momentum"], momentum)
    np.testing.assert_array_equal(read["velocity"], momentum / truth["density"][7, [4, 1]][:, None])
    stress = truth["stress"][7, [4, 1]].reshape(2, X, Y, 4)
    np.testing.assert_array_equal(read["stress"], np.moveaxis(stress, -1, 1))
    np.testing.assert_array_equal(
        contents.arrays["stress"].read(7, [1], slice(2, 3))[0, 0], stress[1, ..., 2]
    )


def test_the_well_trains_without_a_table_row(tmp_path: Path) -> None:
    truth = write_well(tmp_path / "well.hdf5")
    spec = spec_for_file(tmp_path / "well.hdf5")
    names = [channel.name for channel in spec.outputs]
    assert {"density", "velocity_x", "velocity_y", "stress_xy", "speed"} <= set(names)
    assert "momentum_x" not in names
    assert ("velocity_x", "velocity_y") in spec.groups
    data = PDEDataModule([DatasetConfig(name="auto", path="well.hdf5")], str(tmp_path), batch_size=4)
    data.setup()
    assert data.normalizers[0].origin == "compute"
    batch = next(iter(data.test_dataloader()[0]))
    assert batch["pixel_values"].shape == (1, len(names), X, Y)
    velocity = data.normalizers[0].denormalize_outputs(batch["labels"])[0, names.index("velocity_x")]
    expected = truth["momentum"][B - 1, T - 1, ..., 0] / truth["density"][B - 1, T - 1]
    np.testing.assert_allclose(velocity, expected, rtol=1e-5)


def test_wells_flags_must_fit_the_shape(tmp_path: Path) -> None:
    write_well(tmp_path / "well.hdf5")
    with h5py.File(tmp_path / "well.hdf5", "a") as file:
        file["t0_fields/speed"].attrs["time_varying"] = True
    with pytest.raises(
        ValueError, match=r"t0_fields/speed should have the axes \('sample', 'time', 'x', 'y'\)"
    ):
        open_any(tmp_path / "well.hdf5")


def compressible(file: h5py.File) -> None:
    for seed, name in enumerate(("density", "pressure", "Vx", "Vy")):
        file[name] = field(B, T, X, Y, seed=seed)
    file["t-coordinate"] = np.arange(T + 1) * 0.1  # one entry too many, as in published files
    file["x-coordinate"] = np.arange(X) / X


def darcy(file: h5py.File) -> None:
    file["nu"] = field(B, X, Y)
    file["tensor"] = field(B, 1, X, Y, seed=1)


def seeds(file: h5py.File) -> None:
    for k in range(B):
        file[f"{k:04d}/data"] = field(T, X, Y, 2, seed=k)
        file[f"{k:04d}/grid/t"] = np.arange(T) * 0.2


def incompressible(file: h5py.File) -> None:
    file["velocity"] = field(B, T, X, Y, 2)
    file["particles"] = field(B, T, X, Y, 1, seed=1)
    file["force"] = field(B, X, Y, 2, seed=2)
    file["t"] = np.tile(np.arange(T) * 0.3, (B, 1))


def arena(file: h5py.File) -> None:
    for seed, name in enumerate(("u", "vx", "vy")):
        file[f"train/{name}"] = field(B, T, X, Y, seed=seed)
    file["train/x"] = np.arange(X)


def dpot(file: h5py.File) -> None:
    file["data"] = field(B, X, Y, T, 3)


CASES = [
    (compressible, ["density", "pressure", "Vx", "Vy"], ("Vx", "Vy"), lambda f: f["pressure"][3, 2], 1, 0.1),
    (seeds, ["data_0", "data_1"], ("data_1",), lambda f: f["0003/data"][2, ..., 1], 1, 0.2),
    (
        incompressible,
        ["velocity_x", "velocity_y", "particles_x", "force_x", "force_y"],
        ("velocity_x", "velocity_y"),
        lambda f: f["velocity"][3, 2, ..., 1],
        1,
        0.3,
    ),
    (arena, ["u", "vx", "vy"], ("u",), lambda f: f["train/vx"][3, 2], 1, 1.0),
    (dpot, ["data_0", "data_1", "data_2"], ("data_2",), lambda f: f["data"][3, :, :, 2, 1], 1, 1.0),
]


@pytest.mark.parametrize(
    ("write", "names", "group", "truth", "channel", "step"), CASES, ids=lambda c: getattr(c, "__name__", "")
)
def test_pdebench_and_relatives(
    write: Callable[[h5py.File], None],
    names: list[str],
    group: tuple[str, ...],
    truth: Callable[[h5py.File], np.ndarray],
    channel: int,
    step: float,
    tmp_path: Path,
) -> None:
    path = tmp_path / "bench.hdf5"
    with h5py.File(path, "w") as file:
        write(file)
    assert detect(path) == "pdebench"
    spec = spec_for_file(path)
    assert [c.name for c in spec.outputs] == names
    assert group in spec.groups
    assert (spec.frames, spec.splits.total, spec.steady) == (T, B, False)
    assert spec.time_step == pytest.approx(step)
    reader = open_problem(spec, path)
    with h5py.File(path) as file:
        np.testing.assert_array_equal(reader.outputs([3, 0], [2, 4])[0, 0, channel], truth(file))


def test_darcy_flow_is_a_steady_problem(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "darcy.hdf5", "w") as file:
        darcy(file)
    spec = spec_for_file(tmp_path / "darcy.hdf5")
    assert (spec.steady, [c.name for c in spec.inputs], [c.name for c in spec.outputs]) == (
        True,
        ["nu"],
        ["tensor"],
    )
    reader = open_problem(spec, tmp_path / "darcy.hdf5")
    np.testing.assert_array_equal(reader.inputs([4])[0, 0], field(B, X, Y)[4])
    np.testing.assert_array_equal(reader.outputs([4])[0, 0, 0], field(B, 1, X, Y, seed=1)[4, 0])


def test_one_dimensional_files_open_but_do_not_train(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "burgers.hdf5", "w") as file:
        file["tensor"] = field(B, T, X)
    assert open_any(tmp_path / "burgers.hdf5").arrays["tensor"].dims == ("sample", "time", "x")
    with pytest.raises(ValueError, match=r"burgers\.hdf5 has no 2-D field that varies in time"):
        spec_for_file(tmp_path / "burgers.hdf5")


def test_unknown_file_asks_for_a_name(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "other.nc", "w") as file:
        file["v"] = field(B, T, X, Y)
    with pytest.raises(ValueError, match="no attribute 'thalweg_problem' and is not named like a data set"):
        spec_for_file(tmp_path / "other.nc")
