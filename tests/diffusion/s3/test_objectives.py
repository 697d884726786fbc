"""Objectives by name on small pipelines: no distance of the teacher, prefixes, noise, black boxes."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from tiny_pipeline import tiny_unet
from tiny_pipelines import build
from torch import Tensor

from thalweg.diffusion.pipeline import ClassImagePipeline
from thalweg.diffusion.s3.descent import Settings
from thalweg.diffusion.s3.examples import evaluate
from thalweg.diffusion.s3.image_model import ImageSampler, image_examples, teacher_schedule
from thalweg.diffusion.s3.objective import HOPELESS
from thalweg.diffusion.s3.objectives import OBJECTIVES, l2_distance, pyramid_distance, teacher
from thalweg.diffusion.s3.pipeline_model import PipelineSampler
from thalweg.diffusion.s3.pool import InlinePool, ObjectiveRef
from thalweg.diffusion.s3.refine import refine
from thalweg.diffusion.s3.space import SearchSpace
from thalweg.diffusion.schedules import VPDiscrete
from thalweg.diffusion.solvers.linear import LinearSchedule
from thalweg.diffusion.solvers.schedule import SolverSchedule

NOISE = VPDiscrete(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
STEPS = 12
COUNT = 12
FEATURES = {"features": "classifier", "images": "digits"}
EXTRA: dict[str, dict[str, Any]] = {
    "teacher": {},
    "multiscale": {},
    "features": FEATURES,
    "fid": {**FEATURES, "reference": "teacher"},
    "kid": {**FEATURES, "reference": "teacher"},
    "reward": {"function": "rewards_of_test:brightness"},
}


def brightness(images: Tensor) -> Tensor:
    return images.mean(dim=(1, 2, 3))


def brightness_of_zeros(images: Tensor, shown: list[Any]) -> Tensor:
    return torch.tensor([float(x.mean()) if what == 0 else 0.0 for x, what in zip(images, shown)])


def one_number(images: Tensor) -> Tensor:
    return images.mean()


def nothing_known(images: Tensor) -> Tensor:
    return images.mean(dim=(1, 2, 3)) * float("nan")


@pytest.fixture(scope="module", autouse=True)
def _surroundings(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("THALWEG_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setitem(sys.modules, "rewards_of_test", sys.modules[__name__])
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Ten classes of 8 x 8 images, from random weights."""
    unet = tiny_unet(num_class_embeds=11)
    path = tmp_path_factory.mktemp("pipeline")
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing", prediction_type="v_prediction")
    names = [str(k) for k in range(10)]
    ClassImagePipeline(unet, scheduler, class_names=names, null_label=10).save_pretrained(path)
    return str(path)


def make(name: str, folder: str, **options: Any) -> Any:
    settings = {"folder": folder, "count": COUNT, **EXTRA[name], **options}
    if name != "reward":
        settings.setdefault("teacher_steps", STEPS)
    return ObjectiveRef(function=OBJECTIVES[name], options=settings).make("cpu")


def schedule(nfe: int, number: int = 0) -> SolverSchedule:
    space = SearchSpace(noise=NOISE, nfe=nfe)
    return space.schedule(space.seeds()[number])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_scores_the_same_again_on_prefixes_and_for_both_kinds_of_schedule(
    name: str, folder: str
) -> None:
    objective = make(name, folder)
    coarse = schedule(4)
    ((_, score),) = InlinePool(objective).scores([(0, coarse)])
    assert objective(coarse) == score
    assert (score.count, len(objective)) == (COUNT, COUNT)
    assert 0 <= score.noise < float("inf")
    assert objective.evaluations == 2 * 4 * COUNT
    assert objective(LinearSchedule.of(coarse)).value == pytest.approx(score.value, rel=1e-3, abs=1e-5)
    # Samples of a batch are rounded differently in batches of other sizes.
    few = objective(coarse, 7)
    assert few.count == 7
    if name in ("teacher", "multiscale", "features"):
        # The median of a prefix lies among the distances of the prefix, whatever comes after.
        again = make(name, folder, count=COUNT, batch=7)(coarse, 7)
        assert few.value == pytest.approx(again.value, rel=1e-3)


@pytest.mark.parametrize("name", sorted(set(OBJECTIVES) - {"reward"}))
def test_the_teacher_itself_is_best_and_more_evaluations_are_better(name: str, folder: str) -> None:
    objective = make(name, folder)
    best = objective(teacher_schedule(NOISE, STEPS))
    values = [objective(schedule(nfe)).value for nfe in (8, 5, 3)]
    assert best.value == pytest.approx(0, abs=1e-6)
    assert values == sorted(values)
    assert best.value < values[0]


@pytest.mark.parametrize("name", ["fid", "kid"])
def test_distances_to_real_images_tell_noise_from_digits(name: str, folder: str) -> None:
    objective = make(name, folder, reference="digits", images=None, count=40)
    score = objective(schedule(4))
    assert score.value > 0
    assert 0 < score.noise < score.value
    assert objective(schedule(4), 1000) == score
    with pytest.raises(ValueError, match="images 'cats' is no folder and no packaged set"):
        make(name, folder, reference="cats", images="digits")


def test_rewards_are_negated_and_may_ask_for_the_classes(folder: str) -> None:
    sampler = ImageSampler("cpu", folder, COUNT)
    images = sampler.images(sampler.draw(schedule(4)))
    plain = make("reward", folder, batch=64)(schedule(4))
    assert plain.value == pytest.approx(-float(images.mean()), abs=1e-6)
    zeros = make("reward", folder, batch=64, function="rewards_of_test:brightness_of_zeros")(schedule(4))
    assert zeros.value == pytest.approx(-float(images[[0, 10]].mean()) * 2 / COUNT, abs=1e-6)
    assert make("reward", folder, function="rewards_of_test:nothing_known")(schedule(4)).value == HOPELESS
    with pytest.raises(ValueError, match=r"gave \(\) scores for 12 images"):
        make("reward", folder, function="rewards_of_test:one_number")(schedule(4))
    with pytest.raises(ValueError, match="reward 'nowhere' is not module:function"):
        make("reward", folder, function="nowhere")


def test_states_that_are_not_finite_are_hopeless(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OBJECTIVES:
        objective = make(name, folder, **({} if name == "reward" else {"teacher_steps": 2}))
        bad = torch.full((COUNT, 1, 8, 8), float("nan"))
        monkeypatch.setattr(objective.sampler, "draw", lambda *_, bad=bad: bad)
        assert objective(schedule(4)).value == HOPELESS


def test_the_pyramid_sees_wrong_brightness_before_wrong_pixels() -> None:
    a = torch.zeros(2, 1, 16, 16)
    bright = a + 0.1
    pixels = 0.1 * torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0)).sign()
    assert l2_distance(a, bright).tolist() == pytest.approx(l2_distance(a, pixels + a).tolist())
    flat = pyramid_distance(a, bright)
    assert flat.tolist() == pytest.approx([0.4, 0.4])  # four levels, no gradient
    smooth = sum(0.1 / 2**k for k in range(4))  # independent signs fall by averaging
    rms = pyramid_distance(a, pixels + a) - 2 * 0.1  # each neighbour differs by 0 or 0.2
    assert rms.mean().item() == pytest.approx(smooth, rel=0.15)
    with pytest.raises(ValueError, match="needed: \\(B, C, H, W\\)"):
        pyramid_distance(a[0], a[0])


PROMPTS = {"sd": {"prompts": ["a red fox", "a tree"]}, "dit": {"classes": [3, 7]}}


@pytest.mark.parametrize("name", PROMPTS)
def test_any_pipeline_is_judged_as_a_black_box(name: str, tmp_path: Path) -> None:
    path = tmp_path / "saved"
    build(name, tmp_path).save_pretrained(path)
    options = {**PROMPTS[name], "count": 5, "batch": 2, "guidance_scale": 2.0, "teacher_steps": 20}
    noise = PipelineSampler("cpu", str(path), count=1, **PROMPTS[name]).noise
    space = SearchSpace(noise=noise, nfe=3)
    coarse = space.schedule(space.seeds()[0])
    objective = make("teacher", str(path), **options)
    score = objective(coarse)
    assert objective.sampler.output == ("latent" if name == "sd" else "pt")
    assert score.value > 1e-2
    assert objective(coarse) == score
    assert objective(teacher_schedule(noise, 20)).value == pytest.approx(0, abs=1e-5)
    assert objective(LinearSchedule.of(coarse)).value == pytest.approx(score.value, rel=1e-3)
    # Prompts come in turn, and the noise of a sample does not depend on those drawn with it.
    states = objective.sampler.draw(coarse)
    torch.testing.assert_close(objective.sampler.draw(coarse, 3), states[:3], rtol=1e-4, atol=1e-4)
    alone = PipelineSampler("cpu", str(path), 1, seed=1, guidance_scale=2.0, **second(PROMPTS[name]))
    torch.testing.assert_close(alone.draw(coarse)[0], states[1], rtol=1e-4, atol=1e-4)
    images = make("reward", str(path), **{k: v for k, v in options.items() if k != "teacher_steps"})
    assert -1 < images(coarse).value < 0


def test_a_flow_pipeline_is_judged_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # diffusers 0.42 does not load a folder without the third text encoder by itself.
    pipe = build("sd3", tmp_path)
    monkeypatch.setattr("thalweg.diffusion.s3.pipeline_model.open_pipeline", lambda *_: pipe)
    objective = make("teacher", "sd3", count=3, guidance_scale=2.0, prompts=["a fox"])
    space = SearchSpace(noise=objective.sampler.noise, nfe=3)
    assert objective(teacher_schedule(objective.sampler.noise, STEPS)).value == pytest.approx(0, abs=1e-5)
    assert objective(space.schedule(space.seeds()[0])).value > 1e-2
    assert objective.sampler.output == "latent"


def second(options: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {key: values[1:] for key, values in options.items()}


def test_what_a_pipeline_does_not_take_is_named(folder: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ClassImagePipeline takes classes, but prompts were given"):
        make("teacher", folder, prompts=["a fox"])
    with pytest.raises(ValueError, match="there is no folder"):
        make("teacher", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="ClassImagePipeline has no option height"):
        PipelineSampler("cpu", folder, 1, options={"height": 16})
    latents = PipelineSampler("cpu", folder, 1)
    assert latents.output == "pt"  # it has no latents
    chosen = make("teacher", folder, classes=[3])
    assert chosen.sampler.shown == [3] * COUNT


def test_refining_an_image_model_makes_it_no_worse_on_noises_it_has_not_seen(folder: str) -> None:
    denoiser, examples = image_examples("cpu", folder, 20, teacher_steps=20)
    assert examples.condition is not None
    assert examples.condition.tolist() == [*range(10)] * 2
    train, validation = examples.pick(slice(0, 10)), examples.pick(slice(10, None))
    settings = Settings(iterations=15, learning_rates=(0.02,), evaluate_every=5)
    start = schedule(3)
    found = refine(start, denoiser, train, validation, noise_schedule=NOISE, settings=settings)
    assert found.start_error == pytest.approx(evaluate(start, denoiser, validation), rel=1e-6)
    assert found.error < found.start_error
    assert evaluate(found.schedule, denoiser, validation) == pytest.approx(found.error, rel=1e-6)
    # The objective agrees: of the same noises it has the same distances.
    judged = teacher("cpu", folder, count=20, teacher_steps=20)
    errors = l2_distance(judged.sampler.draw(start), judged.target)[10:]
    assert float(errors.quantile(0.5)) == pytest.approx(found.start_error, rel=1e-3)


def test_the_denoiser_of_refinement_differentiates_by_all_but_the_weights(folder: str) -> None:
    denoiser, examples = image_examples("cpu", folder, 2, teacher_steps=5)
    levels = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.6, 0.8, 400.0)]
    x = examples.x_T.clone().requires_grad_()
    out = denoiser(x, *levels, examples.condition)
    assert out.dtype == x.dtype
    gradients = torch.autograd.grad(out.square().sum(), [x, *levels])
    assert all(bool(torch.isfinite(g).all()) and float(g.abs().sum()) > 0 for g in gradients)
    with pytest.raises(ValueError, match="labels of the nodes"):
        denoiser(x, levels[0], levels[1], None, examples.condition)
