"""SearchedScheduler in pipelines that start from an image, and in those that change states on the way."""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
)
from pipeline_schedules import STEPS, same, searched
from tiny_pipelines import build, inputs

from thalweg.diffusion.library import like

KINDS = {
    "img2img": ("sd", StableDiffusionImg2ImgPipeline),
    "inpaint": ("sd", StableDiffusionInpaintPipeline),
    "sd3-img2img": ("sd3", StableDiffusion3Img2ImgPipeline),
}


def pipeline(kind: str, folder: Path) -> DiffusionPipeline:
    name, cls = KINDS[kind]
    options = {} if name == "sd3" else {"requires_safety_checker": False}
    pipe = cls(**build(name, folder).components, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: DiffusionPipeline, kind: str, strength: float) -> np.ndarray:
    image = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    given: dict[str, Any] = {**inputs(KINDS[kind][0]), "image": image, "strength": strength}
    if kind == "inpaint":
        mask = torch.zeros(2, 1, 16, 16)
        mask[..., :8] = 1
        given["mask_image"] = mask
    else:
        given = {key: value for key, value in given.items() if key not in ("height", "width")}
    return pipe(**given, num_inference_steps=STEPS).images


@pytest.mark.parametrize("strength", [0.4, 0.6, 1.0])
@pytest.mark.parametrize(
    ("kind", "family"),
    [
        ("img2img", "DDIMScheduler"),
        ("img2img", "DPMSolverMultistepScheduler"),
        ("inpaint", "DDIMScheduler"),
        ("sd3-img2img", "FlowMatchEulerDiscreteScheduler"),
    ],
)
def test_from_an_image_it_draws_what_the_scheduler_of_its_solver_draws(
    kind: str, family: str, strength: float, tmp_path: Path
) -> None:
    pipe = pipeline(kind, tmp_path)
    theirs = like(pipe.scheduler.config, getattr(diffusers, family))
    pipe.scheduler = theirs
    expected = draw(pipe, kind, strength)
    pipe.scheduler = same(theirs)
    found = draw(pipe, kind, strength)
    assert expected.std() > 0.02
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4)
    assert pipe.scheduler.begin_index == STEPS - round(strength * STEPS)


@pytest.mark.parametrize("kind", KINDS)
def test_searched_schedules_start_at_any_node(kind: str, tmp_path: Path) -> None:
    pipe = pipeline(kind, tmp_path)
    pipe.scheduler = searched(pipe.scheduler)
    images = [draw(pipe, kind, strength) for strength in (0.2, 0.4, 0.6, 0.8, 1.0)]
    assert np.isfinite(images).all()
    distances = [np.abs(image - images[0]).mean() for image in images[1:]]
    assert distances == sorted(distances)
