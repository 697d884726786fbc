"""``thalweg sample``: images that depend on seed and index alone, schedulers of all kinds, clear errors."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel
from PIL import Image

from thalweg.apps.sample import sample
from thalweg.diffusion.export import save_pipeline
from thalweg.diffusion.s3.space import SearchSpace
from thalweg.diffusion.schedules import Flow, NoiseSchedule, VPDiscrete
from thalweg.diffusion.solvers.schedule import SolverSchedule
from thalweg.diffusion.solvers.scheduler import SearchedScheduler

NOISE = VPDiscrete(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")


def unet(classes: int | None) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4, num_class_embeds=classes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pipeline with the classes zero, one and two."""
    path = tmp_path_factory.mktemp("pipeline")
    save_pipeline(path, unet(4), NOISE, "v", ["zero", "one", "two"])
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pipeline without classes."""
    path = tmp_path_factory.mktemp("plain")
    DDPMPipeline(unet(None), DDIMScheduler(clip_sample=False)).save_pretrained(path)
    return path


def schedule(noise: NoiseSchedule = NOISE, nfe: int = 4) -> SolverSchedule:
    space = SearchSpace(noise=noise, nfe=nfe)
    return space.schedule(space.seeds()[0])


def files(out: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(out.glob("0*.png"))]


def draw(folder: Path, out: Path, **options: Any) -> list[bytes]:
    sample(pipeline=str(folder), out=str(out), **{"nfe": 3, "device": "cpu", **options})
    return files(out)


@pytest.mark.parametrize("scheduler", [None, "EulerAncestralDiscreteScheduler"])
def test_an_image_depends_on_seed_and_index_alone(
    folder: Path, tmp_path: Path, scheduler: str | None
) -> None:
    options = {"count": 2, "guidance_scale": 2.0, "scheduler": scheduler}
    first = draw(folder, tmp_path / "a", batch=4, **options)
    assert len(set(first)) == 6
    assert draw(folder, tmp_path / "b", batch=4, **options) == first
    assert draw(folder, tmp_path / "c", batch=1, **options) == first
    other = draw(folder, tmp_path / "d", seed=100, **options)
    assert not set(other) & set(first)
    two = draw(folder, tmp_path / "e", seed=2, classes=("one", 1), guidance_scale=2.0, scheduler=scheduler)
    assert two == first[2:4]


def test_the_report_names_files_classes_and_evaluations(folder: Path, tmp_path: Path) -> None:
    draw(folder, tmp_path, classes=(2, "zero"), count=2, scheduler="HeunDiscreteScheduler", nfe=5)
    report = json.loads((tmp_path / "sample.json").read_text())
    assert [row["file"] for row in report["images"]] == [f"0000{i}.png" for i in range(4)]
    assert [row["shows"] for row in report["images"]] == [2, 2, 0, 0]
    assert report["nfe"] == 5
    assert report["scheduler_class"] == "HeunDiscreteScheduler"
    for name, side in (("00000.png", 8), ("grid.png", 2 * 64 + 16)):
        with Image.open(tmp_path / name) as image:
            assert image.size == (side, side)


def test_searched_schedules_come_from_folders_and_files(folder: Path, plain: Path, tmp_path: Path) -> None:
    made = SearchedScheduler.from_schedules(
        [schedule()], prediction_type="v_prediction", noise_schedule=NOISE.to_dict()
    )
    made.save_pretrained(tmp_path / "search" / "scheduler")
    schedule().save(tmp_path / "schedule.json")
    sources = [tmp_path / "search", tmp_path / "search" / "scheduler", tmp_path / "schedule.json"]
    drawn = [
        draw(folder, tmp_path / str(i), scheduler=str(source), nfe=4) for i, source in enumerate(sources)
    ]
    assert drawn[0] == drawn[1] == drawn[2]
    assert len(drawn[0]) == 3
    report = json.loads((tmp_path / "0" / "sample.json").read_text())
    assert (report["scheduler_class"], report["nfe"]) == ("SearchedScheduler", 4)
    epsilon = draw(plain, tmp_path / "plain", scheduler=str(sources[2]), nfe=4, count=2)
    assert len(epsilon) == 2


def test_mistakes_are_one_clear_error(folder: Path, plain: Path, tmp_path: Path) -> None:
    def fails(match: str, pipeline: Path = folder, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            draw(pipeline, tmp_path / "never", **options)
        assert not (tmp_path / "never").exists()

    made = SearchedScheduler.from_schedules([schedule()], prediction_type="epsilon")
    made.save_pretrained(tmp_path / "epsilon")
    schedule(Flow()).save(tmp_path / "flow.json")
    schedule(replace(NOISE, beta_end=0.012)).save(tmp_path / "other.json")
    schedule().save(tmp_path / "right.json")
    fails("there is no folder", tmp_path / "none")
    fails("has no model_index.json", tmp_path)
    fails("class 'three' is unknown, allowed: zero, one, two, 0, 1, 2", classes=("three",))
    fails("ClassImagePipeline takes classes, but prompts were given", prompts=("a dog",))
    fails("DDPMPipeline takes neither classes nor prompts, but classes were given", plain, classes=(1,))
    fails("no schedule for 5 evaluations; there are: 4", scheduler=str(tmp_path / "right.json"), nfe=5)
    fails("is for networks of epsilon, but the pipeline's gives v_pred", scheduler=str(tmp_path / "epsilon"))
    fails("for another noise schedule: at node 0", scheduler=str(tmp_path / "flow.json"), nfe=4)
    fails("for another noise schedule", scheduler=str(tmp_path / "other.json"), nfe=4)
    fails("is no folder, no file and no class of diffusers; those for .*DDIM", scheduler="DDIMM")
    fails("'DDIMPipeline' is no scheduler of diffusers", scheduler="DDIMPipeline")
    fails("is for flow matching; this network predicts v", scheduler="FlowMatchEulerDiscreteScheduler")
    fails("cannot ask the network 4 times; near it: 3, 5", scheduler="HeunDiscreteScheduler", nfe=4)
    fails("does not scale noise", plain, scheduler="EulerDiscreteScheduler")
    fails("gives its generator to every step", plain, scheduler="UniPCMultistepScheduler")
    fails("has no option negative_prompt", negative_prompt="a dog")
