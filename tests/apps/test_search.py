"""``thalweg search`` on a small real pipeline: the scheduler it writes, its continuing, its errors."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel

from thalweg.apps.cli import main
from thalweg.diffusion.solvers.scheduler import SearchedScheduler

SIZES = ["--nfe=[3,4]", "--budget=150", "--samples=8"]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
    )
    folder = tmp_path_factory.mktemp("pipeline")
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    DDPMPipeline(unet.eval(), scheduler).save_pretrained(folder)
    return folder


def test_a_search_writes_a_scheduler_that_the_pipeline_takes(pipeline: Path, tmp_path: Path) -> None:
    main(["search", f"--model={pipeline}", f"--out={tmp_path}", *SIZES])
    rows = json.loads((tmp_path / "results.json").read_text())["schedules"]
    assert [row["nfe"] for row in rows] == [3, 4]
    assert all(row["error"] <= row["best_known_solver_error"] for row in rows)
    loaded = DDPMPipeline.from_pretrained(pipeline)
    loaded.set_progress_bar_config(disable=True)
    loaded.scheduler = SearchedScheduler.from_pretrained(tmp_path / "scheduler")
    images = loaded(2, num_inference_steps=4, output_type="np").images
    assert images.shape == (2, 8, 8, 1)
    assert np.isfinite(images).all()
    before = (tmp_path / "scheduler" / "scheduler_config.json").read_text()
    main(["search", f"--model={pipeline}", f"--out={tmp_path}", *SIZES])  # nothing is left to do
    assert (tmp_path / "scheduler" / "scheduler_config.json").read_text() == before


def test_a_folder_without_a_pipeline_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["search", f"--model={tmp_path}"])
    assert "is no pipeline's folder" in str(stop.value.code) + capsys.readouterr().err
