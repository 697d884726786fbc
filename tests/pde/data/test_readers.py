"""Every row of the table can be read from a file in its layout, and damaged files are named."""

import multiprocessing
import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest

from thalweg.pde.data import catalog
from thalweg.pde.data.formats.netcdf import shard_files
from thalweg.pde.data.hdf5 import H5Array, LazyFile
from thalweg.pde.data.stored import Request
from thalweg.pde.data.synthetic import synthetic_fields, write_netcdf, write_synthetic
from thalweg.pde.data.trajectories import open_problem, pixel_mask, split_sizes
from thalweg.pde.problem import Channel, ProblemSpec

ROWS = list(catalog.PROBLEMS.values())


def expected_channel(
    spec: ProblemSpec,
    channel: Channel,
    fields: dict[str, np.ndarray],
    sample: int,
    frame: int,
) -> np.ndarray:
    """A channel by the table's words, from the arrays that were written."""
    values = fields[channel.variable][sample]
    if "time" in next(v.dims for v in spec.variables if v.name == channel.variable):
        values = values[frame]
    if channel.index is not None:
        values = values[channel.index]
    return values.T if spec.transpose else values


@pytest.mark.parametrize("spec", ROWS, ids=lambda spec: spec.name)
def test_every_row_reads_its_own_layout(spec: ProblemSpec, tmp_path: Path) -> None:
    write_synthetic(spec.name, tmp_path, samples=4, resolution=8)
    fields = synthetic_fields(spec, 4, 8)
    reader = open_problem(spec.name, tmp_path)
    assert (len(reader), reader.frames, reader.grid) == (4, spec.frames, (8, 8))
    last = reader.frames - 1
    inputs, outputs = reader.inputs([3, 1, 3], last), reader.outputs([2, 0], [last, 0])
    assert (inputs.shape, inputs.dtype) == ((3, len(spec.inputs), 8, 8), np.float32)
    assert outputs.shape == (2, 2, len(spec.outputs), 8, 8)
    for c, channel in enumerate(spec.inputs):
        for row, sample in enumerate((3, 1, 3)):
            if channel.variable is not None:
                truth = expected_channel(spec, channel, fields, sample, last)
                np.testing.assert_allclose(inputs[row, c], np.broadcast_to(truth, (8, 8)), rtol=1e-6)
    for c, channel in enumerate(spec.outputs):
        if channel.variable is not None:
            truth = expected_channel(spec, channel, fields, 0, last)
            np.testing.assert_allclose(outputs[1, 0, c], truth, rtol=1e-6)


def test_synthesised_channels(tmp_path: Path) -> None:
    write_synthetic("FNS-KF", tmp_path, resolution=9)
    rho, _, _, p, g = open_problem("FNS-KF", tmp_path).inputs([0])[0]
    assert (rho == 1).all()
    assert (p == 0).all()
    x = np.linspace(0, 1, 9)
    np.testing.assert_allclose(g, 0.1 * np.sin(2 * np.pi * (x[:, None] + x)), atol=1e-7)


def test_shards_come_in_string_order(tmp_path: Path) -> None:
    folder = write_synthetic("ACE", tmp_path, samples=24, shards=12)
    names = [path.name for path in shard_files(folder)["solution"]]
    assert names[:4] == ["solution_0.nc", "solution_1.nc", "solution_10.nc", "solution_11.nc"]
    stored = np.concatenate([h5py.File(folder / name)["solution"][...] for name in names])
    reader = open_problem("ACE", tmp_path)
    assert len(reader) == 24
    np.testing.assert_array_equal(reader.outputs(range(24), range(20))[:, :, 0], stored)


def test_static_fields_may_have_their_own_shards(tmp_path: Path) -> None:
    folder = write_synthetic("Wave-Layer", tmp_path, samples=6, resolution=8, shards=2)
    whole = np.concatenate([h5py.File(folder / f"c_{k}.nc")["c"][...] for k in range(2)])
    np.testing.assert_array_equal(open_problem("Wave-Layer", folder).inputs(range(6), 3)[:, 1], whole)


LAYOUTS = {
    "contiguous": {},
    "one snapshot per chunk": {"chunks": (1, 1, 3, 6, 6)},
    "several snapshots per chunk": {"chunks": (2, 3, 3, 6, 6)},
    "compressed": {"chunks": (1, 4, 3, 6, 6), "compression": "gzip"},
    "split snapshots": {"chunks": (1, 1, 1, 3, 6)},
    "big-endian": {"dtype": ">f4"},
}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("channels", [slice(0, 3), slice(1, 2)], ids=["all", "one"])
def test_storage_does_not_matter(layout: str, channels: slice, tmp_path: Path) -> None:
    data = np.random.default_rng(0).normal(size=(5, 7, 3, 6, 6)).astype(np.float32)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("v", data=data, **LAYOUTS[layout])
    array = H5Array(LazyFile(tmp_path / "a.h5"), "v", ("sample", "time", "channel", "x", "y"))
    for frames in ([0, 1, 2], [6, 0], [4]):
        np.testing.assert_array_equal(array.read(3, frames, channels), data[3, frames][:, channels])
    samples, frames, rows = np.array([0, 0, 4]), np.array([1, 6, 3]), np.array([2, 0, 3])
    out = np.zeros((4, 3, 6, 6), np.float32)
    array.gather(Request(samples=samples, frames=frames, channels=channels, out=out[:, channels], rows=rows))
    np.testing.assert_array_equal(out[rows][:, channels], data[samples, frames][:, channels])
    assert (out[1] == 0).all()


def test_resolution_keeps_band_limited_fields(tmp_path: Path) -> None:
    # The synthetic fields have modes up to 1, so every other point of the fine grid is exact.
    write_synthetic("NS-Sines", tmp_path, resolution=16)
    fine, coarse = (open_problem("NS-Sines", tmp_path, resolution=r) for r in (None, 8))
    np.testing.assert_allclose(coarse.inputs([1], 4), fine.inputs([1], 4)[..., ::2, ::2], atol=1e-6)


def test_resolution_needs_a_periodic_problem(tmp_path: Path) -> None:
    write_synthetic("Poisson-Gauss", tmp_path)
    with pytest.raises(ValueError, match=r"resolution=8: Poisson-Gauss is not periodic \(dirichlet\)"):
        open_problem("Poisson-Gauss", tmp_path, resolution=8)
    write_synthetic("ACE", tmp_path)
    with pytest.raises(ValueError, match="resolution=32 of ACE must be at most 16"):
        open_problem("ACE", tmp_path, resolution=32)


def test_airfoil_mask_is_where_the_indicator_is_one(tmp_path: Path) -> None:
    write_synthetic("SE-AF", tmp_path)
    reader = open_problem("SE-AF", tmp_path)
    inputs = reader.inputs([0, 1])
    mask = pixel_mask(reader.spec, inputs)
    assert mask.any()
    assert not mask.all()
    np.testing.assert_array_equal(mask, inputs == 1)


def test_times_and_splits_of_the_file_win(tmp_path: Path) -> None:
    fields = {
        "solution": (("sample", "time", "x", "y"), np.zeros((20, 3, 4, 4))),
        "time": (("time",), np.array([0.0, 0.25, 0.75])),
    }
    write_netcdf(tmp_path / "ACE.nc", fields, {"num_val": 2, "num_test": 5})
    reader = open_problem("ACE", tmp_path)
    assert reader.times.tolist() == [0.0, 0.25, 0.75]
    assert (reader.splits.train, reader.splits.val, reader.splits.test) == (13, 2, 5)
    assert open_problem("ACE", tmp_path, num_val=1).splits.train == 14


def test_splits_without_numbers_are_tenths(tmp_path: Path) -> None:
    reader = open_problem("ACE", write_synthetic("ACE", tmp_path, samples=30, frames=2))
    assert (reader.splits.train, reader.splits.val, reader.splits.test) == (24, 3, 3)
    with pytest.raises(ValueError, match="num_val=20 and num_test=10 leave none to train"):
        split_sizes(reader.spec, reader.contents, 20, 10)


# Damaged and wrong files


def test_truncated_file_is_named(tmp_path: Path) -> None:
    path = write_synthetic("CE-RP", tmp_path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(
        ValueError, match=r"CE-RP\.nc cannot be read.*truncated file.*expected data \(10000, 21, 5"
    ):
        open_problem("CE-RP", path)


def test_foreign_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "ACE.nc").write_text("<html>503</html>")
    with pytest.raises(ValueError, match=r"ACE\.nc cannot be read.*found a file of 16 bytes"):
        open_problem("ACE", tmp_path)


@pytest.mark.parametrize("chunks", [None, (1, 1, 8, 8)], ids=["contiguous", "chunked"])
def test_data_that_end_early_are_named(chunks: tuple[int, ...] | None, tmp_path: Path) -> None:
    # A file cut behind HDF5's back, after it was opened.
    path = tmp_path / "ACE.nc"
    with h5py.File(path, "w") as file:
        file.create_dataset("solution", data=np.ones((6, 20, 8, 8), np.float32), chunks=chunks)
    reader = open_problem("ACE", path)
    reader.outputs([0], [0])
    with path.open("r+b") as file:
        file.truncate(4096)
    with pytest.raises(ValueError, match=r"ACE\.nc: variable 'solution', sample 5.*(truncated|damaged)"):
        reader.outputs([5], [19])


def test_missing_variable_lists_what_is_there(tmp_path: Path) -> None:
    write_netcdf(tmp_path / "ACE.nc", {"u": (("sample", "x", "y"), np.zeros((2, 4, 4)))})
    with pytest.raises(ValueError, match=r"ACE\.nc has no variable 'solution', found u \(2, 4, 4\)"):
        open_problem("ACE", tmp_path)


def test_missing_file_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"neither NS-BB\.nc nor shards velocity_<k>\.nc in .*NS-BB"):
        open_problem("NS-BB", tmp_path)
    with pytest.raises(FileNotFoundError, match=f"thalweg data generate NS-BB --out {tmp_path} makes it"):
        open_problem("NS-BB", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"SE-AF$"):
        open_problem("SE-AF", tmp_path)


@pytest.mark.parametrize(
    ("dims", "shape", "message"),
    [
        (("sample", "time", "x", "y"), (3, 2, 4, 4), r"expected axes .*found \('sample', 'time', 'x', 'y'\)"),
        (("sample", "time", "channel", "x", "y"), (3, 2, 3, 4, 4), r"channel 3 is needed.*\(3, 2, 3, 4, 4\)"),
    ],
)
def test_wrong_shape_tells_expected_and_found(
    dims: tuple[str, ...], shape: tuple[int, ...], message: str, tmp_path: Path
) -> None:
    write_netcdf(tmp_path / "CE-RP.nc", {"data": (dims, np.zeros(shape))})
    with pytest.raises(ValueError, match=rf"variable 'data' of CE-RP: .*{message}"):
        open_problem("CE-RP", tmp_path)


def test_shards_must_agree(tmp_path: Path) -> None:
    for k, n in enumerate((4, 5)):
        values = np.zeros((2, 3, n, n))
        write_netcdf(tmp_path / f"solution_{k}.nc", {"solution": (("sample", "time", "x", "y"), values)})
    with pytest.raises(
        ValueError, match=r"solution_1\.nc.*\(2, 3, 5, 5\).*\(2, 3, 4, 4\).*shards must agree"
    ):
        open_problem("ACE", tmp_path)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_data_are_located(bad: float, tmp_path: Path) -> None:
    path = write_synthetic("CE-RP", tmp_path)
    with h5py.File(path, "a") as file:
        file["data"][2, 7, 3, 1, 1] = bad
    reader = open_problem("CE-RP", path)
    reader.inputs([2], 6)
    with pytest.raises(ValueError, match=r"CE-RP\.nc: variable 'data' .*sample 2, snapshot 7, channel 3"):
        reader.outputs([1, 2], [6, 7])
    assert np.isnan(open_problem("CE-RP", path, check_finite=False).outputs([2], [7]).sum()) or np.isinf(bad)


def test_snapshots_never_written_are_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "ACE.nc", "w") as file:
        data = file.create_dataset("solution", (4, 3, 8, 8), "f4", chunks=(1, 1, 8, 8))
        data[0] = 1.0
    reader = open_problem("ACE", tmp_path)
    assert (reader.outputs([0], range(3)) == 1).all()
    with pytest.raises(ValueError, match="sample 2, snapshot 1 was never written"):
        reader.outputs([2], [1])


def test_sample_out_of_range(tmp_path: Path) -> None:
    reader = open_problem("ACE", write_synthetic("ACE", tmp_path))
    with pytest.raises(IndexError, match="sample 6 does not exist, there are 6"):
        reader.inputs([6])
    with pytest.raises(IndexError, match="snapshot -1 does not exist, there are 20"):
        reader.inputs([0], -1)


# Processes


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_open_readers_survive_new_processes(start: str, tmp_path: Path) -> None:
    write_synthetic("NS-PwC", tmp_path)
    reader = open_problem("NS-PwC", tmp_path)
    truth = reader.outputs([3, 0], [2, 5])  # the parent's file stays open meanwhile
    with multiprocessing.get_context(start).Pool(2) as pool:
        results = [pool.apply_async(reader.outputs, ([3, 0], [2, 5])) for _ in range(4)]
        for result in results:
            np.testing.assert_array_equal(result.get(timeout=60), truth)
    np.testing.assert_array_equal(reader.outputs([3, 0], [2, 5]), truth)


def test_pickled_and_closed_readers_open_again(tmp_path: Path) -> None:
    write_synthetic("Helmholtz", tmp_path)
    reader = open_problem("Helmholtz", tmp_path)
    truth = reader.inputs([1, 4])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(reader)).inputs([1, 4]), truth)
    reader.close()
    np.testing.assert_array_equal(reader.inputs([1, 4]), truth)
