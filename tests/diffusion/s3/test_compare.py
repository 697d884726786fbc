"""The schedulers of diffusers as rivals: how their variants are chosen and scored."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipeline import save_tiny_pipeline
from tiny_pipelines import build

from thalweg.diffusion.draw import network
from thalweg.diffusion.library import library_schedulers
from thalweg.diffusion.s3.compare import ends, ranked, rivals, spread
from thalweg.diffusion.s3.objective import summarise
from thalweg.diffusion.s3.objectives import teacher
from thalweg.diffusion.s3.samplers import SampleObjective

FAMILIES = ("DDIM", "DEISMultistep", "HeunDiscrete")


@pytest.fixture(scope="module")
def objective(tmp_path_factory: pytest.TempPathFactory) -> SampleObjective:
    folder = tmp_path_factory.mktemp("pipeline")
    save_tiny_pipeline(folder)
    return teacher("cpu", str(folder), count=10, teacher_steps=12)


def test_a_class_stands_by_the_variant_with_the_least_error_on_the_first_starts(objective: Any) -> None:
    order = ranked(objective, 4, screen=6, families=FAMILIES)
    assert set(order) == {"DDIM", "DEISMultistep"}  # Heun asks the network an odd number of times

    def error(entry: Any, count: int) -> float:
        end = ends(entry, objective, 4, count=count)
        assert end is not None
        return summarise((end - objective.target[:count]).flatten(1).norm(dim=1)).value

    for entries in order.values():
        errors = [error(entry, 6) for entry in entries]
        assert errors == sorted(errors)
    found = rivals(objective, 4, screen=6, families=FAMILIES)
    assert {rival.family: rival.name for rival in found} == {k: v[0].name for k, v in order.items()}
    assert [rival.score.value for rival in found] == sorted(rival.score.value for rival in found)
    assert found[0].score.value == pytest.approx(error(order[found[0].family][0], 10))
    assert {rival.family: rival.variants for rival in found} == {k: len(v) for k, v in order.items()}


def test_ends_are_none_where_a_scheduler_cannot_do_it(objective: Any) -> None:
    heun = next(e for e in library_schedulers(objective.sampler.config).values() if "Heun" in e.name)
    assert ends(heun, objective, 4) is None
    end = ends(heun, objective, 5, count=3)
    assert end is not None
    assert len(end) == 3
    assert torch.isfinite(end).all()


def test_variants_are_thinned_at_equal_distances_and_bad_names_refused(objective: Any) -> None:
    assert spread(list(range(10)), 4) == [0, 3, 6, 9]
    assert spread([1, 2], 5) == [1, 2]
    with pytest.raises(ValueError, match="unknown scheduler Eulr; allowed: DDIM, "):
        ranked(objective, 4, families=["Eulr"])
    with pytest.raises(ValueError, match="variants is 0, allowed: 1 and more"):
        ranked(objective, 4, most=0)


@pytest.mark.parametrize("name", ["sd", "sd3", "dit"])
def test_black_boxes_have_rivals_too(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = build(name, tmp_path)
    monkeypatch.setattr("thalweg.diffusion.s3.pipeline_model.open_pipeline", lambda *_: pipe)
    shown: dict[str, Any] = {"classes": [3, 7]} if name == "dit" else {"prompts": ["a red fox"]}
    latents = teacher("cpu", name, count=4, batch=3, teacher_steps=12, **shown)
    kind = {"sd3": "FlowMatchEulerDiscrete"}.get(name, "DPMSolverMultistep")
    (rival,) = rivals(latents, 4, screen=2, families=[kind], most=2)
    calls: list[int] = []
    handle = network(pipe).register_forward_pre_hook(lambda *_: calls.append(1))
    entry = library_schedulers(latents.sampler.config)[rival.name]
    end = ends(entry, latents, 4, count=3)
    handle.remove()
    assert len(calls) == 4
    assert end is not None
    assert latents.target is not None
    assert end.shape == latents.target[:3].shape
    own = summarise((end - latents.target[:3]).flatten(1).norm(dim=1)).value
    assert latents.judge(end).value == pytest.approx(own)
    assert 0 < rival.score.value < 1e6
