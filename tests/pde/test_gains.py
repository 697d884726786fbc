"""Gains on curves whose answers can be worked out by hand."""

import csv
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thalweg.pde.gains import (
    ScalingCurve,
    accuracy_gain,
    compare,
    efficiency_gain,
    fit_power_law,
    read_curve,
)

# E = 8 S^-1/2 for the reference, E = 8 S^-1 for the model.
FNO = ScalingCurve(name="fno", samples=(1, 16, 64, 256, 1024), errors=(8, 2, 1, 0.5, 0.25))
MODEL = ScalingCurve(name="model", samples=(1, 4, 64), errors=(8, 2, 0.125))


def test_accuracy_gain_is_the_ratio_of_errors() -> None:
    assert accuracy_gain(MODEL, FNO, 64) == pytest.approx(1 / 0.125)
    assert accuracy_gain(MODEL, FNO, 16) == pytest.approx(2 / 0.5)  # between 4 and 64, on the power law


def test_efficiency_gain_counts_the_samples_saved() -> None:
    # E_1024(fno) = 1/4 is reached by the model at S = 32.
    assert efficiency_gain(MODEL, FNO, 1024) == pytest.approx(1024 / 32)
    assert efficiency_gain(FNO, FNO, 256) == pytest.approx(1)


def test_efficiency_gain_is_zero_if_the_error_is_never_reached() -> None:
    worse = ScalingCurve(name="worse", samples=(1, 1024), errors=(9, 3))
    assert efficiency_gain(worse, FNO, 1024) == 0
    (gain,) = compare([worse], FNO, ag_samples=256, eg_samples=1024)
    assert gain.efficiency == "0 (error not reached)"
    assert accuracy_gain(worse, FNO, 1024) == pytest.approx(1 / 12)


def test_a_model_better_from_the_start_gets_a_lower_bound() -> None:
    strong = ScalingCurve(name="strong", samples=(8, 1024), errors=(0.1, 0.01))
    base, gain = compare([FNO, strong], FNO, ag_samples=256, eg_samples=1024)
    assert (gain.efficiency_gain, gain.lower_bound) == (1024 / 8, True)
    assert (base.efficiency, gain.efficiency) == ("1.00", "at least 128.00")
    assert (base.accuracy_gain, base.efficiency_gain, base.lower_bound) == (1, pytest.approx(1), False)


def test_the_first_crossing_counts_on_a_bumpy_curve() -> None:
    bumpy = ScalingCurve(name="bumpy", samples=(1, 2, 4, 8), errors=(4, 1, 2, 0.5))
    assert bumpy.samples_for(1) == 2
    assert bumpy.samples_for(0.5) == 8
    assert bumpy.samples_for(0.1) is None


@given(
    coefficient=st.floats(1e-3, 1e3),
    exponent=st.floats(0.05, 2),
    samples=st.lists(st.integers(1, 10**5), min_size=2, max_size=8, unique=True),
)
def test_power_law_fit_recovers_exact_laws(coefficient: float, exponent: float, samples: list[int]) -> None:
    curve = ScalingCurve.from_points("law", [(s, coefficient * s**-exponent) for s in samples])
    law = fit_power_law(curve)
    assert law is not None
    assert law.exponent == pytest.approx(exponent, rel=1e-6, abs=1e-9)
    assert law.coefficient == pytest.approx(coefficient, rel=1e-6)


def test_power_law_of_a_single_point_does_not_exist() -> None:
    assert fit_power_law(ScalingCurve(name="one", samples=(4,), errors=(1,))) is None


def test_nothing_is_extrapolated() -> None:
    with pytest.raises(ValueError, match="1 to 64 samples, not 128"):
        accuracy_gain(MODEL, FNO, 128)


@pytest.mark.parametrize(
    ("samples", "errors"), [((), ()), ((1, 1), (2, 2)), ((1,), (0,)), ((1,), (float("nan"),))]
)
def test_impossible_curves_are_refused(samples: tuple, errors: tuple) -> None:
    with pytest.raises(ValueError, match="curve 'x'"):
        ScalingCurve(name="x", samples=samples, errors=errors)


def test_curves_are_read_from_csv_json_and_evaluations(tmp_path: Path) -> None:
    rows = list(zip(FNO.samples, FNO.errors))
    with (tmp_path / "fno.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("trajectories", "error"), *rows])
    (tmp_path / "table.json").write_text(json.dumps({"trajectories": FNO.samples, "error": FNO.errors}))
    (tmp_path / "rows.json").write_text(json.dumps([{"trajectories": s, "error": e} for s, e in rows]))
    for samples, error in rows:
        folder = tmp_path / "runs" / str(samples)
        folder.mkdir(parents=True)
        result = {
            "metrics": {"normalised": {"scored_median_relative_l1_error": error}},
            "training": {"num_trajectories": samples},
        }
        (folder / "metrics.json").write_text(json.dumps(result))
    pattern = f"{tmp_path}/runs/1*/metrics.json,{tmp_path}/runs/64,{tmp_path}/runs/256/metrics.json"
    sources = [*(str(tmp_path / name) for name in ("fno.csv", "table.json", "rows.json", "runs")), pattern]
    for source in sources:
        assert read_curve("fno", source) == FNO


def test_unusable_sources_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no curve file 'nowhere\.csv'"):
        read_curve("x", "nowhere.csv")
    (tmp_path / "bad.csv").write_text("n,error\n1,2\n")
    with pytest.raises(ValueError, match=r"bad\.csv is not a curve"):
        read_curve("x", str(tmp_path / "bad.csv"))
    (tmp_path / "m.json").write_text(json.dumps({"metrics": {"normalised": {}}, "training": {}}))
    with pytest.raises(ValueError, match="how many trajectories"):
        read_curve("x", str(tmp_path / "m.json"))
    (tmp_path / "a.json").write_text(json.dumps([{"trajectories": 4, "error": 1.0}]))
    (tmp_path / "b.json").write_text(json.dumps([{"trajectories": 4, "error": 2.0}]))
    with pytest.raises(ValueError, match="occur twice"):
        read_curve("x", f"{tmp_path}/a.json,{tmp_path}/b.json")
