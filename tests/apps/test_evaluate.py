"""``thalweg evaluate`` on checkpoints of a real ``thalweg fit``."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import xarray
import yaml
from poseidon_runs import QUIET, fit_config, write_data

from thalweg.apps.cli import main
from thalweg.pde.data.normalize import normalizer_for
from thalweg.pde.data.trajectories import open_problem
from thalweg.pde.evaluation import Evaluator, plan

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), "CE-RP", "Wave-Layer", samples=20, frames=9)


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "fit.yaml").write_text(yaml.safe_dump(fit_config(data, folder)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["thalweg"])
        main(["fit", "--config", str(folder / "fit.yaml")])
    return folder / "run" / "one"


def evaluate(run: Path, data: Path, out: Path, *options: str) -> dict[str, Any]:
    words = (f"--ckpt={run}", "--dataset=CE-RP", f"--path={data}", f"--out={out}", "--plots=false")
    main(["evaluate", *words, *options])
    result: dict[str, Any] = json.loads((out / "metrics.json").read_text())
    return result


def test_results_carry_numbers_and_protocol(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from thalweg.apps.networks import load_network

    report = evaluate(run, data, tmp_path, "--plots=true", "--save_predictions=true")
    loaded = load_network(str(run))
    reader = open_problem("CE-RP", data)
    normalizer = normalizer_for(reader.spec, reader.constants)
    evaluator = Evaluator(loaded.network, reader, normalizer, plan(reader.spec, reader.frames))
    expected = evaluator.run([18, 19]).report()
    assert report["metrics"] == expected["metrics"]
    assert report["per_sample"]["sample"] == [18, 19]
    assert report["protocol"]["frames"] == [2, 4, 6, 8]
    assert report["protocol"]["samples"] == 2
    assert report["training"] == {"datasets": ["CE-RP"], "num_trajectories": 4, "pretrained": None}
    assert (report["model"]["weights"], report["model"]["class"]) == ("ema", "ScOT")
    assert len(report["model"]["sha256"]) == 64
    assert report["data"]["constants"]["origin"] == "published"
    assert {"thalweg", "torch", "commit"} <= set(report["provenance"])
    with xarray.open_dataset(tmp_path / "predictions.nc", engine="h5netcdf") as found:
        assert dict(found.sizes) == {"source": 2, "sample": 2, "time": 4, "x": 16, "y": 16}
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".nc", ".png"}
    assert "CE-RP, direct: median relative L1 error" in capsys.readouterr().out


def test_averaged_and_raw_weights_differ(run: Path, data: Path, tmp_path: Path) -> None:
    key = "scored_median_relative_l1_error"
    values = {
        weights: evaluate(run, data, tmp_path, f"--weights={weights}")["metrics"]["normalised"][key]
        for weights in ("auto", "ema", "raw")
    }
    assert values["auto"] == values["ema"] != values["raw"]


def test_an_exported_folder_scores_as_its_checkpoint(run: Path, data: Path, tmp_path: Path) -> None:
    main(["export", f"--ckpt={run / 'checkpoints' / 'last.ckpt'}", f"--to={tmp_path / 'hub'}"])
    from_run = evaluate(run, data, tmp_path / "a")
    from_hub = evaluate(tmp_path / "hub", data, tmp_path / "b", "--trajectories=4")
    assert from_hub["metrics"] == from_run["metrics"]
    assert from_hub["training"] == {"num_trajectories": 4}


def test_rollouts_and_resolutions(run: Path, data: Path, tmp_path: Path) -> None:
    rollout = evaluate(run, data, tmp_path, "--mode=accumulation", "--ar_pattern=2,6", "--final_time=8")
    assert rollout["protocol"]["frames"] == [2, 8]
    assert rollout["horizon"]["frames"] == [2, 8]
    grids = evaluate(run, data, tmp_path, "--mode=resolution", "--resolutions=8,16", "--horizon=false")
    assert set(grids["resolutions"]) == {"8", "16"}
    native = evaluate(run, data, tmp_path, "--horizon=false")
    assert grids["resolutions"]["16"]["metrics"] == native["metrics"]
    assert grids["resolutions"]["8"]["metrics"] != native["metrics"]


def test_results_of_several_runs_make_a_curve(run: Path, data: Path, tmp_path: Path) -> None:
    for count in (2, 4, 8):
        evaluate(run, data, tmp_path / f"model_{count}", f"--trajectories={count}")
    main(["gains", f"--curve.fno={tmp_path}/model_*/metrics.json", f"--out={tmp_path}", "--plots=false"])
    report = json.loads((tmp_path / "gains.json").read_text())
    assert report["curves"]["fno"]["trajectories"] == [2, 4, 8]
    assert report["gains"][0]["accuracy_gain"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dataset=Wave-Layer"], "'Wave-Layer' has 2 input channels"),
        (["--dataset=CE-RB"], "CE-RP"),
        (["--ckpt=nowhere"], "nowhere"),
        (["--ar_steps=2", "--ar_pattern=1,1"], "exclude each other"),
        (["--ar_pattern=1;2"], "separated by commas"),
        (["--final_time=20"], "final 20"),
        (["--limit=0"], "no test trajectories"),
        (["--mode=resolution", "--resolutions=64"], "at most 16"),
    ],
)
def test_user_errors_are_one_line(
    run: Path, data: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match=message):
        evaluate(run, data, tmp_path, *options)
    assert not (tmp_path / "metrics.json").exists()
