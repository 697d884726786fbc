"""``thalweg search`` on a small real pipeline: the scheduler it writes, its continuing, its errors."""

import json
from pathlib import Path

import numpy as np
import pytest
from diffusers import DDPMPipeline
from tiny_pipeline import save_tiny_pipeline

from thalweg.apps.cli import main
from thalweg.diffusion.solvers.scheduler import SearchedScheduler

SIZES = ["--nfe=[3,4]", "--budget=36", "--samples=[4,8]", "--fresh=16", "--options.teacher_steps=12"]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    save_tiny_pipeline(folder)
    return folder


def test_a_search_writes_a_scheduler_that_the_pipeline_takes(pipeline: Path, tmp_path: Path) -> None:
    words = ["search", f"--model={pipeline}", f"--out={tmp_path}", *SIZES, "--refine=6", "--examples=8"]
    main([*words, "--variants=2"])
    result = json.loads((tmp_path / "results.json").read_text())
    rows = result["schedules"]
    assert [row["nfe"] for row in rows] == [3, 4]
    assert all(row["error"] <= row["best_known_solver_error"] for row in rows)
    assert all(row["evaluated"] >= 36 and row["network_evaluations"] > 0 for row in rows)
    assert all(row["fitted_error"] > 0 for row in rows)
    families = {rival["family"] for rival in result["comparison"]["4"]["rivals"]}
    assert {"DDIM", "UniPCMultistep", "DPMSolverMultistep", "DEISMultistep"} <= families
    loaded = DDPMPipeline.from_pretrained(pipeline)
    loaded.set_progress_bar_config(disable=True)
    loaded.scheduler = SearchedScheduler.from_pretrained(tmp_path / "scheduler")
    images = loaded(2, num_inference_steps=4, output_type="np").images
    assert images.shape == (2, 8, 8, 1)
    assert np.isfinite(images).all()
    page = (tmp_path / "report.html").read_text()
    assert page.count("<img") == 3  # quality against evaluations, and a grid for each number of them
    before = (tmp_path / "scheduler" / "scheduler_config.json").read_text()
    main([*words, "--no-compare"])  # nothing is left to do
    assert (tmp_path / "scheduler" / "scheduler_config.json").read_text() == before


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (
            ["--objective=fidd"],
            "objective is 'fidd', allowed: teacher, multiscale, features, fid, kid, reward",
        ),
        (["--nfe=[0]"], "nfe is [0], allowed"),
        (["--nfe=[4,4]"], "nfe is [4, 4], allowed"),
        (["--budget=0"], "budget is 0, allowed"),
        (["--samples=[0,4]"], "samples is [0, 4], allowed"),
        (["--refine=-1"], "refine is -1, allowed"),
        (["--pool=slurm"], "pool"),
    ],
)
def test_bad_options_are_named(
    words: list[str], complaint: str, pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["search", f"--model={pipeline}", f"--out={tmp_path}", *words])
    assert complaint in str(stop.value.code) + capsys.readouterr().err


def test_refinement_of_latents_is_refused_before_the_search(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(SystemExit) as stop:
        main(["search", f"--model={tmp_path}", "--refine=5"])
    assert "does not denoise pixels" in str(stop.value.code) + capsys.readouterr().err


def test_a_search_with_other_settings_is_not_continued(pipeline: Path, tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text(json.dumps({"seed": 7}))
    with pytest.raises(SystemExit, match=r"holds a search with .*seed=7 \(now 0\)"):
        main(["search", f"--model={pipeline}", f"--out={tmp_path}"])


def test_a_folder_without_a_pipeline_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["search", f"--model={tmp_path}"])
    assert "is no pipeline's folder" in str(stop.value.code) + capsys.readouterr().err
    for name, advice in (("last.ckpt", "thalweg export --ckpt"), ("model.safetensors", "save_pretrained")):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(SystemExit) as stop:
            main(["search", f"--model={tmp_path / name}"])
        assert advice in str(stop.value.code) + capsys.readouterr().err
