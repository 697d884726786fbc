"""Errors and metrics: equality with golden values, numbers done by hand, Parseval, several processes."""

import json
import math
from pathlib import Path

import pytest
import torch
from golden import golden_files
from metric_processes import gather
from safetensors.torch import load_file

from thalweg.pde import errors
from thalweg.pde.metrics import (
    RMSE,
    VRMSE,
    HorizonError,
    LpError,
    MeanSpectra,
    RelativeLp,
    SampleErrors,
    SpectralError,
)

(GOLDEN,) = golden_files("poseidon", "metrics.json")
CASES = json.loads(Path(GOLDEN).read_text())
ARRAYS = load_file(Path(GOLDEN).with_suffix(".safetensors"))
GROUPS = (("rho",), ("u", "v"), ("p",))


def groups_of(case: dict) -> list[tuple[str, ...]]:
    return [tuple(part.split(",")) for part in case["channel_description"].strip("[]").split("],[")]


def fields(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    return ARRAYS[f"{name}.predictions"].double(), ARRAYS[f"{name}.labels"].double()


@pytest.mark.parametrize("name", CASES)
def test_per_sample_errors_equal_golden_values(name: str) -> None:
    case, (pred, target) = CASES[name], fields(name)
    edges = errors.group_edges(groups_of(case))
    assert edges == case["channel_slices"]
    for index, group in enumerate(case["group_names"]):
        for p in (1, 2):
            golden = case["per_group"][group]
            relative = errors.relative_lp_error(pred, target, edges=edges, p=p)[:, index]
            absolute = errors.lp_error(pred, target, edges=edges, p=p)[:, index]
            assert relative.tolist() == pytest.approx(golden[f"relative_l{p}_percent"], rel=1e-12, abs=0)
            assert absolute.tolist() == pytest.approx(golden[f"l{p}"], rel=1e-12, abs=0)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("batch_size", [2, 100])
def test_statistics_have_the_golden_names_and_values(name: str, batch_size: int) -> None:
    case, (pred, target) = CASES[name], fields(name)
    report: dict[str, float] = {}
    for metric in (RelativeLp(groups_of(case)), LpError(groups_of(case))):
        for start in range(0, len(pred), batch_size):
            metric.update(pred[start : start + batch_size], target[start : start + batch_size])
        report |= {key: value.item() for key, value in metric.compute().items()}
    golden = case["evaluation_metrics"]
    assert {key for key in report if not key.startswith("scored")} == set(golden)
    assert {key: report[key] for key in golden} == pytest.approx(golden, rel=1e-12, abs=0)
    assert case["train_metrics"].items() <= golden.items()


def test_scored_groups_leave_out_constant_and_masked_quantities() -> None:
    pred, target = fields("set0")
    metric = RelativeLp(GROUPS, scored=[("u", "v")])
    metric.update(pred, target)
    report = metric.compute()
    assert report["scored_median_relative_l1_error"] == report["uv/median_relative_l1_error"]
    assert report["scored_mean_relative_l1_error"] == report["uv/mean_relative_l1_error"]
    with pytest.raises(ValueError, match="c"):
        errors.summarise(torch.zeros(2, 3), GROUPS, "l1", scored=[("c",)])


def test_median_of_an_even_number_is_the_middle_of_two() -> None:
    assert errors.median(torch.tensor([[4.0], [1.0], [3.0], [10.0]])).item() == 3.5
    assert errors.median(torch.tensor([[4.0], [1.0], [3.0]])).item() == 3.0


def test_float32_fields_are_summed_in_float64() -> None:
    target = torch.full((1, 1, 256, 256), 1.0)
    pred = target * (1 + 2.0**-12)
    assert errors.relative_lp_error(pred, target).item() == pytest.approx(100 * 2.0**-12, rel=1e-12)


def test_vrmse_of_the_mean_field_is_one_in_any_units() -> None:
    target = torch.randn(3, 2, 16, 16, dtype=torch.float64)
    mean = target.mean(dim=(-2, -1), keepdim=True).expand_as(target)
    assert errors.vrmse(mean, target, eps=0).flatten().tolist() == pytest.approx([1] * 6, rel=1e-12)
    scaled = errors.vrmse(1e6 * mean + 3, 1e6 * target + 3, eps=0)
    assert scaled.flatten().tolist() == pytest.approx([1] * 6, rel=1e-9)


@pytest.mark.parametrize("shape", [(16, 16), (16, 24), (15, 9)])
def test_power_spectrum_obeys_parseval(shape: tuple[int, int]) -> None:
    field = torch.randn(2, 3, *shape, dtype=torch.float64)
    total = errors.power_spectrum(field).sum(-1)
    assert torch.allclose(total, field.square().mean(dim=(-2, -1)), rtol=1e-12, atol=0)


def test_a_plane_wave_lies_in_its_own_band_only() -> None:
    x = torch.arange(64, dtype=torch.float64) / 64
    low = torch.cos(2 * math.pi * 3 * x)[:, None].expand(64, 64)[None, None]
    high = torch.cos(2 * math.pi * 20 * x)[None, :].expand(64, 64)[None, None]
    assert errors.power_spectrum(low)[0, 0, 3].item() == pytest.approx(0.5, rel=1e-12)
    target, pred = low + high, low + 1.25 * high
    low_error, middle_error, high_error = errors.band_error(pred, target)[0, 0].tolist()
    assert low_error == pytest.approx(0, abs=1e-10)
    assert high_error == pytest.approx(25, rel=1e-10)
    assert middle_error == pytest.approx(0, abs=1e-8)  # both spectra hold rounding errors only


def test_without_names_channels_are_one_group_or_numbered() -> None:
    pred, target = fields("set0")
    metric = RelativeLp()
    metric.update(pred, target)
    expected = errors.median(errors.relative_lp_error(pred, target))
    assert metric.compute()["median_relative_l1_error"] == expected[0]
    single = VRMSE()
    single.update(pred, target)
    assert single.compute()["channel2/median_vrmse_error"] == errors.median(errors.vrmse(pred, target))[2]


def test_horizon_error_equals_the_error_of_each_frame() -> None:
    pred, target = torch.randn(2, 5, 4, 4, 8, 8).double()
    horizon = HorizonError(GROUPS, scored=[("rho",), ("u", "v")])
    horizon.update(pred[:3], target[:3])
    horizon.update(pred[3:], target[3:])
    report = horizon.compute()
    for frame in range(4):
        metric = RelativeLp(GROUPS, scored=[("rho",), ("u", "v")])
        metric.update(pred[:, frame], target[:, frame])
        single = metric.compute()
        assert report["uv/median"][frame] == single["uv/median_relative_l1_error"]
        assert report["scored/median"][frame] == single["scored_median_relative_l1_error"]


def test_mean_spectra_of_equal_fields_coincide() -> None:
    metric = MeanSpectra(num_channels=2, height=16, width=16)
    field = torch.randn(4, 2, 16, 16)
    for part in field.split(2):
        metric.update(part, part)
    spectra = metric.compute()
    assert torch.equal(spectra["prediction"], spectra["truth"])
    assert spectra["error"].abs().max() == 0
    assert torch.allclose(spectra["truth"], errors.power_spectrum(field).mean(0).float())


SAMPLE_METRICS = [
    RelativeLp(GROUPS, p=1),
    RelativeLp(GROUPS, p=2),
    LpError(GROUPS),
    RMSE(["rho", "u", "v", "p"]),
    VRMSE(["rho", "u", "v", "p"], scored=["rho"]),
    SpectralError(GROUPS),
    SpectralError(),
]


@pytest.mark.parametrize(
    "metric", SAMPLE_METRICS, ids=lambda m: m.kind if hasattr(m, "p") else type(m).__name__
)
def test_metrics_vanish_on_identical_fields_and_hold_no_fields(metric: SampleErrors) -> None:
    field = torch.randn(3, 4, 16, 16)
    metric.reset()
    metric.update(field, field.clone())
    assert all(value == 0 for value in metric.compute().values())
    assert metric.samples().numel() <= 3 * 4 * 3
    assert metric.state_dict() == {}


def test_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        errors.rmse(torch.zeros(2, 1, 4, 4), torch.zeros(2, 3, 4, 4))
    with pytest.raises(ValueError, match="cover 4 channels"):
        RelativeLp(GROUPS).update(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4))
    with pytest.raises(ValueError, match="increasing"):
        SpectralError(GROUPS, bands=[0, 9, 4])


@pytest.mark.dist
def test_medians_are_taken_over_all_processes(tmp_path: Path) -> None:
    pred, target = fields("set0")
    args = (2, str(tmp_path / "store"), str(tmp_path), RelativeLp(GROUPS), pred, target)
    torch.multiprocessing.spawn(gather, args=args, nprocs=2)
    golden = CASES["set0"]["train_metrics"]
    for rank in range(2):
        report = json.loads((tmp_path / f"{rank}.json").read_text())
        assert {key: report[key] for key in golden} == pytest.approx(golden, rel=1e-12, abs=0)
