"""SearchedScheduler inside the pipelines of diffusers: the images of their own schedulers, and its own."""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
from diffusers import DiffusionPipeline
from pipeline_schedules import OURS, STEPS, same, searched
from tiny_pipelines import PIPELINES, build, inputs

from thalweg.diffusion.library import like
from thalweg.diffusion.solvers.scheduler import SearchedScheduler


def draw(pipe: DiffusionPipeline, name: str, steps: int = STEPS, **options: Any) -> np.ndarray:
    return pipe(**inputs(name), num_inference_steps=steps, **options).images


LEFT_OUT = {
    ("ddpm", "EulerDiscreteScheduler"),  # the pipeline does not scale the noise
    ("dit", "EulerDiscreteScheduler"),
    ("ddpm", "UniPCMultistepScheduler"),  # the pipeline gives a generator to a step that takes none
}
"""What diffusers itself cannot do."""
CASES = [
    (name, family)
    for name in PIPELINES
    for family in OURS
    if ("Flow" in family) == (name == "sd3") and (name, family) not in LEFT_OUT
]


@pytest.mark.parametrize(("name", "family"), CASES)
def test_the_solver_of_a_scheduler_on_its_nodes_draws_its_images(
    name: str, family: str, tmp_path: Path
) -> None:
    pipe = build(name, tmp_path)
    # Only with leading spacing does Euler start from unit variance.
    options = {"timestep_spacing": "leading"} if family == "EulerDiscreteScheduler" else {}
    theirs = like(pipe.scheduler.config, getattr(diffusers, family), **options)
    pipe.scheduler = theirs
    expected = draw(pipe, name)
    pipe.scheduler = same(theirs)
    found = draw(pipe, name)
    assert expected.std() > 0.02
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_with_it_is_saved_and_draws_the_same_when_loaded(name: str, tmp_path: Path) -> None:
    pipe = build(name, tmp_path)
    before = draw(pipe, name)
    pipe.scheduler = searched(pipe.scheduler)
    images = draw(pipe, name)
    assert np.isfinite(images).all()
    assert not np.allclose(images, before, atol=1e-2)
    assert np.array_equal(draw(pipe, name), images)
    pipe.save_pretrained(tmp_path / "saved")
    without = {"text_encoder_3": None, "tokenizer_3": None} if name == "sd3" else {}
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "saved", **without)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is type(pipe)
    assert isinstance(loaded.scheduler, SearchedScheduler)
    np.testing.assert_array_equal(draw(loaded, name), images)


def test_the_scheduler_alone_is_taken_by_another_pipeline(tmp_path: Path) -> None:
    pipe = build("sd", tmp_path)
    pipe.scheduler = searched(pipe.scheduler)
    images = draw(pipe, "sd")
    pipe.scheduler.save_pretrained(tmp_path / "scheduler")
    other = build("sd", tmp_path)
    other.scheduler = SearchedScheduler.from_pretrained(tmp_path / "scheduler")
    np.testing.assert_array_equal(draw(other, "sd"), images)


def test_images_of_a_batch_are_those_drawn_alone(tmp_path: Path) -> None:
    pipe = build("sd3", tmp_path)
    pipe.scheduler = searched(pipe.scheduler)
    both = draw(pipe, "sd3")
    for i in range(2):
        given = inputs("sd3")
        one = {key: value[i : i + 1] if isinstance(value, list) else value for key, value in given.items()}
        alone = pipe(**one, num_inference_steps=STEPS).images
        np.testing.assert_allclose(alone[0], both[i], rtol=0, atol=1e-5)
