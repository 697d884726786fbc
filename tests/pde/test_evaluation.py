"""Evaluation: protocols, exact networks, rollouts with static channels, streaming, files and pictures."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray
from poseidon_runs import scot, write_data
from torch import Tensor, nn

from thalweg.pde.data import catalog
from thalweg.pde.data.normalize import normalizer_for
from thalweg.pde.data.trajectories import TrajectoryReader, open_problem
from thalweg.pde.errors import median, relative_lp_error
from thalweg.pde.evaluation import Evaluator, Protocol, plan
from thalweg.pde.gallery import draw
from thalweg.pde.poseidon.model import ScOTOutput
from thalweg.pde.predictions import PredictionFile


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    return write_data(
        folder, "NS-Sines", "CE-RP", "Wave-Layer", "Poisson-Gauss", "SE-AF", samples=20, frames=9
    )


def evaluator(name: str, folder: Path, network: nn.Module, protocol: Protocol, **options: Any) -> Evaluator:
    reader = open_problem(name, folder)
    return Evaluator(network, reader, normalizer_for(reader.spec, reader.constants), protocol, **options)


class Recorder(nn.Module):
    """Answers with a function of its input and writes down how it was called."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer, self.calls = answer, []

    def forward(
        self, x: Tensor, time: Tensor, pixel_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> ScOTOutput:
        self.calls.append((x.clone(), time.clone(), pixel_mask))
        return ScOTOutput(self.answer(x, time, labels))


@pytest.mark.parametrize(
    ("options", "frames", "steps"),
    [
        ({}, (2, 4, 6, 8, 10, 12, 14), ()),
        ({"horizon": False}, (14,), ()),
        ({"initial": 4, "final": 9}, (5, 7, 9), ()),
        ({"mode": "autoregressive"}, (14,), (2.0,) * 7),
        ({"mode": "autoregressive", "steps": 4}, (14,), (3.5,) * 4),
        ({"mode": "autoregressive", "steps": [2, 2, 10]}, (14,), (2.0, 2.0, 10.0)),
        ({"mode": "accumulation", "steps": 2}, (7, 14), (7.0, 7.0)),
        ({"mode": "accumulation", "final": 5}, (2, 4, 5), (2.0, 2.0, 1.0)),
    ],
)
def test_protocols_follow_the_paper_unless_told_otherwise(options: dict, frames: tuple, steps: tuple) -> None:
    protocol = plan(catalog.get("NS-Sines"), 21, **options)
    assert (protocol.frames, protocol.steps) == (frames, steps)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("NS-Sines", {"final": 21}, "initial 0 and final 21"),
        ("NS-Sines", {"initial": 9, "final": 9}, "0 <= initial < final < 21"),
        ("NS-Sines", {"steps": 3}, "belong to mode"),
        ("NS-Sines", {"mode": "accumulation", "steps": 4}, "3.5 lies between two"),
        ("NS-Sines", {"mode": "autoregressive", "steps": [2, 2]}, "add up to 14"),
        ("NS-Sines", {"mode": "autoregressive", "steps": 0}, "at least one step"),
        ("Poisson-Gauss.time", {"mode": "autoregressive"}, "is steady"),
    ],
)
def test_impossible_protocols_are_refused(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(catalog.get(name), 21, **options)


def test_steady_problems_have_one_frame() -> None:
    assert plan(catalog.get("Poisson-Gauss.time"), 1).frames == (0,)


def test_direct_predictions_get_raw_input_and_lead_times(folder: Path) -> None:
    network = Recorder(lambda x, time, labels: x)
    run = evaluator("NS-Sines", folder, network, Protocol(mode="direct", initial=2, frames=(4, 8)))
    prediction, truth = run.predict([3, 5])
    assert prediction.shape == truth.shape == (2, 2, 4, 16, 16)
    raw = run.reader.inputs([3, 5], 2)
    assert np.allclose(run.normalizer.denormalize_inputs(network.calls[0][0].numpy()), raw, atol=1e-5)
    times = [call[1].tolist() for call in network.calls]
    assert times == [[pytest.approx(0.1)] * 2, [pytest.approx(0.3)] * 2]
    assert network.calls[0][2].tolist() == [[False, False, False, True]] * 2


def test_a_perfect_network_has_no_error_in_any_unit(folder: Path) -> None:
    oracle = Recorder(lambda x, time, labels: labels)
    run = evaluator("NS-Sines", folder, oracle, plan(catalog.get("NS-Sines"), 9), batch_size=3)
    report = run.run(range(7)).report()
    for kind in ("normalised", "physical"):
        assert all(value == 0 for name, value in report["metrics"][kind].items()), kind
        assert all(max(values) == 0 for values in report["horizon"][kind].values())


def test_scores_equal_errors_computed_at_once_in_both_units(folder: Path) -> None:
    protocol = plan(catalog.get("CE-RP"), 9)
    run = evaluator("CE-RP", folder, scot(), protocol, batch_size=3)
    scores = run.run(range(10))
    report = scores.report()
    prediction, truth = run.predict(list(range(10)))
    edges = run.spec.channel_slices
    errors = relative_lp_error(prediction[:, -1], truth[:, -1], edges=edges)
    single = report["metrics"]["normalised"]
    assert single["uv/median_relative_l1_error"] == pytest.approx(median(errors)[1].item(), rel=1e-5)
    assert single["scored_median_relative_l1_error"] == pytest.approx(median(errors).mean().item(), rel=1e-5)
    assert scores.per_sample()["p"] == pytest.approx(errors[:, 2].tolist(), rel=1e-5)
    assert scores.ranking() == errors.mean(1).argsort().tolist()
    physical = [run.normalizer.denormalize_outputs(x) for x in (prediction, truth)]
    errors = relative_lp_error(physical[0][:, -1], physical[1][:, -1], edges=edges)
    known = report["metrics"]["physical"]["rho/median_relative_l1_error"]
    assert known == pytest.approx(median(errors)[0].item(), rel=1e-5)
    assert known != pytest.approx(single["rho/median_relative_l1_error"], rel=0.05)
    for index in range(len(protocol.frames)):
        errors = relative_lp_error(prediction[:, index], truth[:, index], edges=edges)
        horizon = report["horizon"]["normalised"]["rho/median"][index]
        assert horizon == pytest.approx(median(errors)[0].item(), rel=1e-5)


@pytest.mark.parametrize("static", ["truth", "predicted"])
def test_static_channels_are_fed_as_asked(folder: Path, static: str) -> None:
    network = Recorder(lambda x, time, labels: 0.5 * x)
    spec = catalog.get("Wave-Layer")
    run = evaluator("Wave-Layer", folder, network, plan(spec, 9, mode="accumulation", static=static))
    prediction, _ = run.predict([0])
    start, second, third = (call[0] for call in network.calls[:3])
    assert torch.allclose(second[:, 0], 0.5 * start[:, 0])
    assert torch.allclose(third[:, 0], 0.25 * start[:, 0])
    factor = 1.0 if static == "truth" else 0.25
    assert torch.allclose(third[:, 1], factor * start[:, 1])
    assert torch.allclose(prediction[:, 2, 0], 0.125 * start[:, 0])
    assert len({call[1].item() for call in network.calls}) == 1
    assert network.calls[0][1].item() == pytest.approx(2 / spec.time_scale)


def test_autoregressive_scores_the_last_state_of_accumulation(folder: Path) -> None:
    spec, results = catalog.get("NS-Sines"), []
    for mode in ("autoregressive", "accumulation"):
        run = evaluator("NS-Sines", folder, scot(), plan(spec, 9, mode=mode))
        results.append(run.predict([1, 4]))
    assert torch.allclose(results[0][0][:, 0], results[1][0][:, -1], atol=1e-6)
    assert torch.equal(results[0][1][:, 0], results[1][1][:, -1])


def test_airfoil_interior_counts_as_exact(folder: Path) -> None:
    channels = {"num_channels": 1, "num_out_channels": 1, "channel_slice_list_normalized_loss": (0, 1)}
    run = evaluator("SE-AF.time", folder, scot(**channels), plan(catalog.get("SE-AF.time"), 1))
    prediction, truth = run.predict([0, 1])
    inside = torch.from_numpy(run.reader.inputs([0, 1]) == 1)
    assert inside.any()
    assert torch.equal(prediction[:, 0][inside], truth[:, 0][inside])
    assert not torch.equal(prediction, truth)


def test_predictions_stream_into_a_self_describing_file(folder: Path, tmp_path: Path) -> None:
    run = evaluator("CE-RP", folder, scot(), plan(catalog.get("CE-RP"), 9), batch_size=2)
    samples, path = [3, 4, 5, 9, 11], tmp_path / "predictions.nc"
    times = run.reader.times[list(run.protocol.frames)].tolist()
    with PredictionFile(path, run.spec, samples, times, run.reader.grid, {"mode": "direct"}) as file:
        run.run(samples, [file])
        assert not path.exists()
    with xarray.open_dataset(path, engine="h5netcdf") as found:
        assert found["rho"].dims == ("source", "sample", "time", "x", "y")
        assert found["sample"].values.tolist() == samples
        assert found["time"].values.tolist() == pytest.approx(times)
        assert found.attrs["problem"] == "CE-RP"
        assert found["p"].attrs["units"] == next(c.units for c in run.spec.outputs if c.name == "p")
        truth = found["p"].sel(source="truth", sample=9).values
        raw = run.reader.outputs([9], run.protocol.frames)[0, :, 3]
        assert np.allclose(truth, raw, rtol=1e-5, atol=1e-5)
        expected = run.normalizer.denormalize_outputs(run.predict([9])[0])[0, :, 0].numpy()
        assert np.allclose(found["rho"].sel(source="prediction", sample=9).values, expected, atol=1e-5)


def test_an_interrupted_evaluation_leaves_no_file(folder: Path, tmp_path: Path) -> None:
    run = evaluator("CE-RP", folder, scot(), plan(catalog.get("CE-RP"), 9))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "predictions.nc"
    with pytest.raises(KeyboardInterrupt), PredictionFile(path, run.spec, [0], [0.0], run.reader.grid):
        run.run([0], [interrupt])
    assert list(tmp_path.iterdir()) == []


def test_pictures_of_an_evaluation(folder: Path, tmp_path: Path) -> None:
    run = evaluator(
        "Wave-Layer", folder, Recorder(lambda x, time, labels: 0.9 * x), plan(catalog.get("Wave-Layer"), 9)
    )
    files = draw(tmp_path, "_16", run, [0, 1, 2], run.run([0, 1, 2]))
    assert {file.name for file in files} == {
        "sample_best_16.png",
        "sample_median_16.png",
        "sample_worst_16.png",
        "trajectory_median_16.png",
        "spectra_16.png",
        "error_over_time_16.png",
    }
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


class Counting(TrajectoryReader):
    """Reader that knows how many trajectories it was asked for at once."""

    largest = 0

    def outputs(self, samples: Any, frames: Any = (0,)) -> np.ndarray:
        Counting.largest = max(Counting.largest, len(samples))
        return super().outputs(samples, frames)


def test_no_more_than_a_batch_is_held(folder: Path) -> None:
    run = evaluator("CE-RP", folder, scot(), plan(catalog.get("CE-RP"), 9), batch_size=2)
    run.reader.__class__ = Counting
    scores = run.run(range(9))
    assert Counting.largest == 2
    states = [v for m in scores.modules() if hasattr(m, "errors") for v in m.errors]
    assert sum(v.numel() for v in states) < 9 * 4 * 60
