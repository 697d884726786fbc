"""Fitted weights of whole pipelines: the pixel sampler, and black boxes through their scheduler."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipeline import save_tiny_pipeline
from tiny_pipelines import build

from thalweg.diffusion.s3.image_model import ImageSampler
from thalweg.diffusion.s3.objective import Score
from thalweg.diffusion.s3.objectives import OBJECTIVES
from thalweg.diffusion.s3.pipeline_model import PipelineSampler
from thalweg.diffusion.s3.pool import InlinePool, ObjectiveRef, ProcessPool
from thalweg.diffusion.s3.samplers import FITTED, FittedObjective
from thalweg.diffusion.s3.seeds import gits_seeds
from thalweg.diffusion.s3.space import SearchSpace
from thalweg.diffusion.solvers.linear import LinearSchedule
from thalweg.diffusion.solvers.schedule import SolverSchedule

SHOWN: dict[str, dict[str, Any]] = {
    "sd": {"prompts": ["a red fox", "a tree"], "guidance_scale": 3.0},
    "sd3": {"prompts": ["a red fox", "a tree"], "guidance_scale": 3.0},
    "dit": {"classes": [3, 7], "guidance_scale": 2.0},
    "ddpm": {},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tiny")
    save_tiny_pipeline(path)
    return str(path)


def coarse(noise: Any, nfe: int = 4) -> tuple[SearchSpace, SolverSchedule]:
    """DDIM on a plain grid, and the space of such grids."""
    space = SearchSpace(noise=noise, nfe=nfe, only_times=True)
    schedule = space.schedule(space.seeds()[0])
    assert isinstance(schedule, SolverSchedule)
    return space, schedule


@pytest.mark.parametrize("name", SHOWN)
def test_a_black_box_follows_its_teacher(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Not from a folder: diffusers 0.42 does not load SD3 without its third text encoder by itself.
    pipe = build(name, tmp_path)
    monkeypatch.setattr("thalweg.diffusion.s3.pipeline_model.open_pipeline", lambda *_: pipe)
    sampler = PipelineSampler("cpu", name, count=5, batch=3, **SHOWN[name])
    _, plain = coarse(sampler.noise)
    target = sampler.draw(sampler.teacher(20))
    found, states = sampler.fit(plain, steps=20)
    assert found.nodes == plain.nodes
    torch.testing.assert_close(sampler.draw(found), states, rtol=1e-3, atol=1e-3)
    gap, before = ((x - target).flatten(1).norm(dim=1) for x in (states, sampler.draw(plain)))
    assert float((gap / before).median()) < 0.7
    again, _ = sampler.fit(plain, count=2, steps=20)
    assert again != found


def test_pixels_follow_their_teacher_in_any_batches(folder: str) -> None:
    sampler = ImageSampler("cpu", folder, count=8)
    _, plain = coarse(sampler.noise)
    target = sampler.draw(sampler.teacher(20))
    found, states = sampler.fit(plain, steps=20)
    torch.testing.assert_close(sampler.draw(found), states, rtol=1e-4, atol=1e-4)
    gap, before = ((x - target).flatten(1).norm(dim=1) for x in (states, sampler.draw(plain)))
    assert float((gap / before).median()) < 0.7
    batched, other = ImageSampler("cpu", folder, count=8, batch=3).fit(plain, steps=20)
    torch.testing.assert_close(other, states, rtol=1e-3, atol=1e-3)
    assert batched.nodes == found.nodes


def test_any_objective_takes_fitted_weights_and_processes_give_the_same(folder: str) -> None:
    options = {"folder": folder, "count": 6, "teacher_steps": 20, "objective": OBJECTIVES["multiscale"]}
    reference = ObjectiveRef(function=FITTED, options=options)
    objective = reference.make("cpu")
    assert isinstance(objective, FittedObjective)
    space, plain = coarse(objective.objective.sampler.noise)
    score = objective(plain)
    assert isinstance(score, Score)
    assert score.weights is not None
    assert objective.objective.evaluations == 6 * plain.nfe
    found = LinearSchedule(nodes=plain.nodes, weights=score.weights)
    again = objective(found)
    assert again.weights is None
    assert again.value == pytest.approx(score.value, rel=1e-3)
    tasks = [(i, space.schedule(genes)) for i, genes in enumerate(space.seeds()[:3])]
    pool = ProcessPool(reference, workers=1)
    try:
        assert dict(pool.scores(tasks)) == dict(InlinePool(objective).scores(tasks))
    finally:
        pool.close()


def test_dynamic_programming_finds_grids_on_the_path(folder: str) -> None:
    sampler = ImageSampler("cpu", folder, count=4)
    space = SearchSpace(noise=sampler.noise, nfe=4, only_times=True)
    path = sampler.path(20)
    found = gits_seeds(space, path)
    assert 1 <= len(found) <= 3
    known = {node.t for node in path.nodes}
    for genes in found:
        assert len(genes.times) == 4
        assert all(min(abs(t - k) for k in known if k is not None) < 0.05 for t in genes.times)
    late = replace(space, noise=replace(space.noise, t_start=0.8))
    assert {genes.times[0] for genes in gits_seeds(late, path)} == {0.8}


def test_a_precision_is_one_that_is_known(folder: str) -> None:
    low = ImageSampler("cpu", folder, count=2, dtype="bfloat16")
    _, plain = coarse(low.noise)
    assert low.draw(plain).dtype == torch.float32
    exact = ImageSampler("cpu", folder, count=2).draw(plain)
    gap = (low.draw(plain) - exact).norm() / exact.norm()
    assert 1e-6 < float(gap) < 0.1
    with pytest.raises(ValueError, match="dtype is 'int8', allowed: float32, bfloat16, float16"):
        PipelineSampler("cpu", folder, count=1, dtype="int8")


def test_objectives_that_draw_no_samples_are_refused() -> None:
    options = {"objective": "search_objectives:objective"}
    with pytest.raises(ValueError, match="search_objectives:objective' is not one of samples"):
        ObjectiveRef(function=FITTED, options=options).make("cpu")
