"""Rollouts: equal to pipelines of diffusers, by number of image alone, by the policy that is asked."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_policy import SPEC, move, pipeline, transformer
from torch import Tensor

from thalweg.diffusion.nft.embeddings import sd3_encoder
from thalweg.diffusion.nft.policy import LoraPolicy
from thalweg.diffusion.nft.rollout import (
    Sampler,
    decode,
    image_noise,
    latent_shape,
    noisy_rollout,
    rollout,
    sample_latents,
    sampler_of,
    velocity_of,
)
from thalweg.diffusion.nft.samplers import OdeSolver
from thalweg.diffusion.nft.timesteps import flow_match_sigmas
from thalweg.diffusion.schedules import Flow, VPLinear
from thalweg.diffusion.solvers.grids import nodes
from thalweg.diffusion.solvers.linear import LinearSchedule
from thalweg.diffusion.solvers.named import named
from thalweg.diffusion.solvers.scheduler import SearchedScheduler

PROMPTS = ["a red fox", "two dogs"]
SIZE = {"height": 16, "width": 16}
SHAPE = (4, 8, 8)


def drawn(pipe: Any, steps: int, x_T: Tensor, output: str = "latent", guidance: float = 1.0) -> Tensor:
    """What the pipeline gives."""
    found = pipe(
        PROMPTS, negative_prompt=[""] * 2, latents=x_T, num_inference_steps=steps, output_type=output,
        guidance_scale=guidance, max_sequence_length=12, **SIZE,
    ).images  # fmt: skip
    return found if isinstance(found, Tensor) else torch.stack(found)


def noise(numbers: range = range(2)) -> Tensor:
    return image_noise(SHAPE, numbers, seed=3, epoch=4)


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_euler_is_the_pipeline(guidance: float, tmp_path: Path) -> None:
    """Latents and images, with guidance and without."""
    pipe, x_T = pipeline(tmp_path), noise()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    encode = sd3_encoder(pipe, 12)
    sampler = sampler_of(OdeSolver(name="flow"), 5)
    condition, negative = encode(PROMPTS), encode([""] * 2)
    velocity = velocity_of(pipe.transformer, condition, guidance=guidance, negative=negative)
    latents = sample_latents(velocity, sampler, x_T)
    expected = drawn(pipe, 5, x_T, guidance=guidance)
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    images = decode(pipe.vae, latents)
    torch.testing.assert_close(images, drawn(pipe, 5, x_T, "pt", guidance), rtol=1e-4, atol=1e-4)
    assert images.shape == (2, 3, 16, 16)
    assert images.std() > 0.01


def searched() -> SearchedScheduler:
    """Two schedules as searches give them: steps, and weights with a fractional label."""
    flow = Flow(shift=3.0)
    steps = named("unipc", nodes(flow, 4, "shift"), order=2)
    weights = LinearSchedule.of(named("dpmpp", nodes(flow, 3, "shift", t_end=0.02, end="keep"), order=2))  # type: ignore[arg-type]
    return SearchedScheduler.from_schedules(
        [steps, weights], prediction_type="flow_prediction", noise_schedule=flow.to_dict()
    )


@pytest.mark.parametrize("nfe", [3, 4])
def test_searched_schedulers_plug_in(nfe: int, tmp_path: Path) -> None:
    """As objects, folders and files, equal to a pipeline with that scheduler, and as many evaluations."""
    pipe, x_T, scheduler = pipeline(tmp_path), noise(), searched()
    pipe.scheduler = scheduler
    condition = sd3_encoder(pipe, 12)(PROMPTS)
    expected = drawn(pipe, nfe, x_T)
    scheduler.save_pretrained(tmp_path / "scheduler")
    scheduler.schedules[nfe].save(tmp_path / "schedule.json")
    calls: list[int] = []
    pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    for source in (
        scheduler,
        str(tmp_path / "scheduler"),
        tmp_path / "schedule.json",
        scheduler.schedules[nfe],
    ):
        sampler = sampler_of(source, nfe)
        found = sample_latents(velocity_of(pipe.transformer, condition), sampler, x_T)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert len(calls) == sampler.nfe == nfe
        calls.clear()


def test_training_times_are_the_levels_of_the_evaluations() -> None:
    assert sampler_of(OdeSolver(), 10).levels == pytest.approx(flow_match_sigmas(10)[:-1])
    sampler = sampler_of(searched(), 4)
    assert sampler.levels == [node.sigma for node in searched().schedules[4].nodes[:-1]]


def test_noise_is_that_of_the_image_whatever_the_batch() -> None:
    everything = image_noise(SHAPE, range(24), seed=1, epoch=2)
    parts = [image_noise(SHAPE, numbers, seed=1, epoch=2) for numbers in (range(5), range(5, 24))]
    assert torch.equal(torch.cat(parts), everything)
    turned = image_noise(SHAPE, [7, 3], seed=1, epoch=2)
    assert torch.equal(turned, everything[[7, 3]])
    others = [image_noise(SHAPE, range(24), seed=s, epoch=e) for s, e in ((1, 3), (2, 2), (2, 1))]
    rows = torch.cat([everything, *others]).flatten(1)
    assert len(rows.unique(dim=0)) == 4 * 24
    assert (torch.corrcoef(rows) - torch.eye(len(rows))).abs().max() < 0.35  # 5.6 deviations
    assert abs(rows.mean()) < 4 / rows.numel() ** 0.5
    assert abs(rows.var() - 1) < 4 * (2 / rows.numel()) ** 0.5


def test_copies_of_a_prompt_differ_and_batches_do_not_matter(tmp_path: Path) -> None:
    pipe = pipeline(tmp_path)
    one = sd3_encoder(pipe, 12)(PROMPTS[:1])
    policy, sampler = LoraPolicy(pipe.transformer, SPEC), sampler_of(OdeSolver(), 4)

    def run(numbers: list[int], slice_size: int) -> Any:
        condition = {name: value.expand(len(numbers), *value.shape[1:]) for name, value in one.items()}
        return rollout(
            policy, sampler, condition, numbers, shape=SHAPE, seed=1, epoch=0, vae=pipe.vae,
            slice_size=slice_size,
        )  # fmt: skip

    whole, parts = run([0, 1, 2, 3, 4], 2), [run([0, 1], 8), run([2, 3, 4], 1)]
    torch.testing.assert_close(
        whole.latents, torch.cat([part.latents for part in parts]), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(whole.images, torch.cat([part.images for part in parts]), rtol=1e-4, atol=1e-4)
    assert whole.images.min() >= 0
    assert whole.images.max() <= 1
    assert torch.pdist(whole.latents.flatten(1)).min() > 0.1


def test_the_policy_that_is_asked_samples() -> None:
    policy, sampler = LoraPolicy(transformer(), SPEC), sampler_of(OdeSolver(), 3)
    condition = {"encoder_hidden_states": torch.ones(2, 5, 16), "pooled_projections": torch.ones(2, 16)}

    def run(who: Any) -> Tensor:
        return rollout(policy, sampler, condition, [0, 1], shape=SHAPE, seed=1, epoch=0, who=who).latents

    before = run("old")
    move(policy, size=0.3)
    assert torch.equal(run("old"), before)
    assert torch.equal(run("reference"), before)
    assert not torch.allclose(run("current"), before, atol=1e-3)
    policy.follow("old", 0.0)
    torch.testing.assert_close(run("old"), run("current"), rtol=1e-4, atol=1e-4)
    assert not run("current").requires_grad
    with pytest.raises(ValueError, match="encoder_hidden_states has 2 rows for 3 states"):
        rollout(policy, sampler, condition, [0, 1, 2], shape=SHAPE, seed=1, epoch=0)
    assert policy.network.active_adapters() == ["current"]


def test_noisy_rollouts_have_noise_by_image_and_step() -> None:
    """Without it they are Euler's; with it they depend on the number of an image, and not on its batch."""
    policy, sigmas = LoraPolicy(transformer(), SPEC), flow_match_sigmas(4)
    condition = {"encoder_hidden_states": torch.ones(3, 5, 16), "pooled_projections": torch.ones(3, 16)}

    def run(numbers: list[int], **options: Any) -> list[Tensor]:
        some = {name: value[: len(numbers)] for name, value in condition.items()}
        found = noisy_rollout(policy, sigmas, some, numbers, shape=SHAPE, seed=1, epoch=0, **options)
        return list(found.states)

    plain = rollout(
        policy, sampler_of(OdeSolver(name="flow"), 4), condition, [0, 1, 2], shape=SHAPE, seed=1, epoch=0
    )
    torch.testing.assert_close(run([0, 1, 2], eta=0.0)[-1], plain.latents, rtol=1e-4, atol=1e-4)
    noisy = run([0, 1, 2])
    assert torch.equal(noisy[0], run([0, 1, 2], eta=0.0)[0])
    assert not torch.allclose(noisy[1], run([0, 1, 2], eta=0.0)[1], atol=0.1)
    torch.testing.assert_close(run([2])[-1], noisy[-1][2:], rtol=1e-4, atol=1e-4)
    draws = torch.stack([image_noise(SHAPE, [0], seed=1, epoch=0, step=i).flatten() for i in range(5)])
    assert (torch.corrcoef(draws) - torch.eye(5)).abs().max() < 0.3  # 4.8 deviations


def test_latents_of_half_precision_networks_are_float32() -> None:
    condition = {"encoder_hidden_states": torch.ones(2, 5, 16), "pooled_projections": torch.ones(2, 16)}
    policy, sampler = LoraPolicy(transformer(torch.bfloat16), SPEC), sampler_of(OdeSolver(), 3)
    found = rollout(policy, sampler, condition, [0, 1], shape=SHAPE, seed=1, epoch=0)
    assert found.latents.dtype == torch.float32
    assert not torch.equal(found.latents, found.latents.bfloat16().float())
    assert found.images is None


def test_decoding_undoes_scale_and_shift(tmp_path: Path) -> None:
    """latents = (z - shift) scale."""
    vae = pipeline(tmp_path).vae
    z = torch.randn(3, *SHAPE)
    with torch.no_grad():
        expected = (vae.decode(z).sample / 2 + 0.5).clamp(0, 1)
    latents = (z - vae.config.shift_factor) * vae.config.scaling_factor
    for slice_size in (1, 2, 8):
        torch.testing.assert_close(
            decode(vae, latents, slice_size=slice_size), expected, rtol=1e-4, atol=1e-5
        )


def test_shapes_of_latents(tmp_path: Path) -> None:
    pipe = pipeline(tmp_path)
    assert latent_shape(pipe, 16, 8) == (4, 8, 4)
    with pytest.raises(ValueError, match="height is 18, allowed: multiples of 4"):
        latent_shape(pipe, 18, 16)


def test_bad_samplers_are_refused(tmp_path: Path) -> None:
    vp = named("ddim", nodes(VPLinear(), 3, "uniform_t"))
    with pytest.raises(ValueError, match="whose sum is not 1; allowed: schedules of a rectified flow"):
        sampler_of(vp)
    with pytest.raises(ValueError, match="prediction_type 'epsilon' and clip_data None, allowed: flow_pred"):
        sampler_of(SearchedScheduler.from_schedules([vp]))  # type: ignore[list-item]
    with pytest.raises(ValueError, match="num_steps is 7, allowed by the schedules there are: 3, 4"):
        sampler_of(searched(), 7)
    with pytest.raises(ValueError, match="num_steps is None, allowed by the schedules there are: 3, 4"):
        sampler_of(searched())
    with pytest.raises(ValueError, match="num_steps is 5, allowed for this schedule: 4"):
        sampler_of(searched().schedules[4], 5)
    with pytest.raises(ValueError, match="num_steps is missing"):
        sampler_of(OdeSolver())
    with pytest.raises(ValueError, match="solver is a FlowMatchEulerDiscreteScheduler, allowed: OdeSolver"):
        sampler_of(FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match="is neither the folder of a SearchedScheduler nor a file"):
        sampler_of(tmp_path / "nothing")


def test_faults_of_sampling_are_told() -> None:
    network, sampler, x_T = transformer(), sampler_of(OdeSolver(), 2), noise()
    condition = {"encoder_hidden_states": torch.ones(2, 5, 16), "pooled_projections": torch.ones(2, 16)}
    with pytest.raises(ValueError, match="guidance is 2, which needs negative"):
        velocity_of(network, condition, guidance=2)
    condition["pooled_projections"][1] = torch.nan
    with pytest.raises(ArithmeticError, match="1 of 2 samples are not finite, the first is number 1"):
        sample_latents(velocity_of(network, condition), sampler, x_T)
    with pytest.raises(ValueError, match="slice_size is 0"):
        decode(None, x_T, slice_size=0)
    assert isinstance(sampler, Sampler)
