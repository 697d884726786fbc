"""``thalweg refine`` on a small real pipeline."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline
from tiny_pipeline import save_tiny_pipeline

from thalweg.apps.cli import main
from thalweg.diffusion.draw import scheduler_of
from thalweg.diffusion.from_diffusers import network_of
from thalweg.diffusion.solvers.grids import nodes
from thalweg.diffusion.solvers.named import named
from thalweg.diffusion.solvers.scheduler import SearchedScheduler

SIZES = ["--images=digits", "--iterations=3", "--examples=32", "--batch=16", "--fresh=16"]


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("THALWEG_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("pipeline")
    save_tiny_pipeline(folder)
    config = DDPMPipeline.from_pretrained(folder).scheduler.config
    noise, _ = network_of(config)
    known = [named("dpmpp", nodes(noise, count, "uniform_t"), order=2) for count in (3, 4)]
    scheduler_of(config, known).save_pretrained(folder / "search" / "scheduler")
    return ["refine", f"--model={folder}", f"--scheduler={folder / 'search'}", *SIZES]


def test_it_writes_a_scheduler_that_the_pipeline_takes_and_goes_on_from_what_there_is(
    words: list[str], tmp_path: Path
) -> None:
    main([*words, f"--out={tmp_path}", "--nfe=[4]"])
    first = (tmp_path / "refined_4.json").read_text()
    main([*words, f"--out={tmp_path}"])
    assert (tmp_path / "refined_4.json").read_text() == first
    rows = json.loads((tmp_path / "results.json").read_text())["schedules"]
    assert [row["nfe"] for row in rows] == [3, 4]
    assert all(len(row["error"]) == len(row["frechet"]) == 2 for row in rows)
    pipe = DDPMPipeline.from_pretrained(words[1].removeprefix("--model="))
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = SearchedScheduler.from_pretrained(tmp_path / "scheduler")
    images = pipe(2, num_inference_steps=4, output_type="pt").images
    assert torch.isfinite(torch.as_tensor(images)).all()


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ("--nfe=[3,9]", r"nfe \[9\] are not in .*, allowed: \[3, 4\]"),
        ("--batch=2", "batch is 2, allowed: 8 and more"),
        ("--weight=-1", "weight is -1.0, allowed: 0 and more"),
        ("--iterations=0", "iterations is 0, allowed: 1 or more"),
        ("--model=nowhere", "nowhere is no pipeline's folder"),
    ],
)
def test_what_cannot_be_done_is_refused(words: list[str], tmp_path: Path, given: str, complaint: str) -> None:
    with pytest.raises(SystemExit, match=complaint):
        main([*words, f"--out={tmp_path}", given])
