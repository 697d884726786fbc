"""Advantage Weighted Matching and Flow-GRPO against formulas and automatic derivatives."""

import math
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from thalweg.diffusion.nft.loss import nft_loss
from thalweg.diffusion.nft.policy_gradient import (
    Matching,
    awm_loss,
    clipped_policy_loss,
    grpo_loss,
    matching_loss,
)
from thalweg.diffusion.nft.stochastic import gaussian_step
from thalweg.diffusion.nft.timesteps import flow_match_sigmas
from thalweg.diffusion.order import generator


def batch(distance: float = 0.3, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor]:
    stream = generator(11)
    x0, noise, v_old, d, e = (torch.randn(4, 3, 2, generator=stream, dtype=torch.float64) for _ in range(5))
    t = torch.tensor([0.2, 0.5, 0.8, 1.0], dtype=torch.float64)
    x_t = (1 - t[:, None, None]) * x0 + t[:, None, None] * noise
    advantage = torch.tensor([1.5, -0.7, 0.2, -3.0], dtype=torch.float64)
    values = (v_old + distance * d, v_old, v_old + 0.2 * e, x_t, x0, t, advantage)
    return [value.to(dtype) for value in values], noise.to(dtype)


def derivative(loss: Tensor, v: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(loss, v)
    return found


def test_matching_is_advantage_times_squared_error() -> None:
    given, noise = batch()
    v, _, v_ref, _, x0, _, a = given
    v.requires_grad_()
    loss, metrics = awm_loss(*given, kl_weight=0.3, adv_clip_max=1.0, old_weight=0.1, noise=noise)
    clipped = a.clamp(-1, 1)[:, None, None]
    by_hand = (2 * clipped * (v - (noise - x0)) + 0.6 * (v - v_ref) + 0.2 * (v - given[1])) / v.numel()
    torch.testing.assert_close(derivative(loss, v), by_hand.detach())
    total = metrics["policy_loss"] + 0.3 * metrics["kl_div"] + 0.1 * metrics["old_deviate"]
    torch.testing.assert_close(metrics["total_loss"], total)


@pytest.mark.parametrize("weighting", get_args(Matching))
def test_matching_weights_by_their_derivative(weighting: Any) -> None:
    given, noise = batch()
    v, target, t = given[0].requires_grad_(), noise - given[4], given[5]
    found = derivative(matching_loss(v, target, t, weighting=weighting, power=0.25).sum(), v)
    error = (v - target).square().mean((1, 2)).detach()
    weight = {"uniform": torch.ones(4), "t": t, "t_squared": t**2, "huber": t * (error + 1e-10) ** -0.75}
    expected = (2 * (v - target) / v[0].numel()).detach() * weight[weighting][:, None, None]
    torch.testing.assert_close(found, expected)


def test_huber_is_zero_and_smooth_at_the_target() -> None:
    v = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    loss = matching_loss(v, torch.ones(2, 3, dtype=torch.float64), torch.ones(2), weighting="huber").sum()
    assert loss.item() == 0
    assert derivative(loss, v).abs().max() == 0


def test_ratios_start_as_plain_matching() -> None:
    """At v = v_old the gradients with and without ratios are equal, and no ratio is clipped."""
    given, noise = batch(distance=0.0)
    v = given[0].requires_grad_()
    plain, _ = awm_loss(*given, kl_weight=0, adv_clip_max=5, noise=noise)
    ratio, metrics = awm_loss(*given, kl_weight=0, adv_clip_max=5, clip_range=0.2, noise=noise)
    torch.testing.assert_close(derivative(ratio, v), derivative(plain, v))
    assert metrics["ratio"] == 1
    assert metrics["clip_fraction"] == metrics["approx_kl"] == 0


def test_matching_and_nft_begin_in_the_same_direction() -> None:
    """Per sample, both first gradients are multiples of A (v_old - target)."""
    given, noise = batch(distance=0.0)
    v = given[0].requires_grad_()
    awm = derivative(awm_loss(*given, kl_weight=0, adv_clip_max=5, noise=noise)[0], v)
    nft = derivative(nft_loss(*given, beta=0.1, kl_weight=0, adv_clip_max=5)[0], v)
    cosine = torch.nn.functional.cosine_similarity(awm.flatten(1), nft.flatten(1))
    torch.testing.assert_close(cosine, torch.ones(4, dtype=torch.float64))


def test_clipping_by_hand() -> None:
    ratios = torch.tensor([1.3, 1.3, 0.6, 0.6, 1.1], dtype=torch.float64)
    advantage = torch.tensor([2.0, -2.0, 2.0, -2.0, 9.0], dtype=torch.float64)
    log_prob = ratios.log().requires_grad_()
    loss, metrics = clipped_policy_loss(log_prob, torch.zeros_like(ratios), advantage, clip_range=0.2)
    # gains beyond the range are cut at 1.2 and 0.8; losses are not; the last advantage is 5
    assert loss.item() == pytest.approx((-2 * 1.2 + 2 * 1.3 - 2 * 0.6 + 2 * 0.8 - 5 * 1.1) / 5, rel=1e-12)
    by_hand = torch.tensor([0, 2 * 1.3, -2 * 0.6, 0, -5 * 1.1], dtype=torch.float64) / 5
    torch.testing.assert_close(derivative(loss, log_prob), by_hand)
    assert metrics["clip_fraction"].item() == 0.8
    assert metrics["ratio"].item() == pytest.approx(4.9 / 5)
    assert metrics["approx_kl"].item() == pytest.approx(ratios.log().square().mean().item() / 2)


def test_first_gradient_of_grpo_is_reinforce() -> None:
    """-mean(A grad log p), whose derivative by v is that of the Gaussian step, by hand."""
    given, _ = batch()
    v, x, prev, a = given[0].requires_grad_(), given[3], given[4], given[6]
    step = gaussian_step("flow", flow_match_sigmas(10), 3, 0.7)
    log_prob = step.log_prob(prev, step.mean(x, v))
    loss, _ = grpo_loss(log_prob, log_prob.detach(), a)
    mean = step.mean(x, v).detach()
    score = step.v * (prev - mean) / step.std**2 / v[0].numel()
    torch.testing.assert_close(derivative(loss, v), -a[:, None, None] * score / len(a))


def test_divergence_of_grpo_is_that_of_gaussians() -> None:
    given, _ = batch()
    log_prob, mean, mean_ref, std = given[6], given[0].requires_grad_(), given[2], 0.3
    loss, metrics = grpo_loss(
        log_prob, log_prob, given[6], kl_weight=0.04, mean=mean, mean_ref=mean_ref, std=std
    )
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, std), normal(mean_ref, std)).mean().detach()
    torch.testing.assert_close(metrics["kl_loss"], expected)
    torch.testing.assert_close(metrics["total_loss"], metrics["policy_loss"] + 0.04 * expected)
    torch.testing.assert_close(
        derivative(loss, mean), 0.04 * (mean - mean_ref).detach() / std**2 / mean.numel()
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    given, noise = batch(dtype=dtype)
    settings: dict[str, Any] = {"kl_weight": 0.1, "adv_clip_max": 5, "clip_range": 0.2, "weighting": "t"}
    loss, _ = awm_loss(*given, **settings, noise=noise)
    exact, _ = awm_loss(*[value.double() for value in given], **settings, noise=noise.double())
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    with pytest.raises(ValueError, match=f"log_prob is {dtype}, allowed: torch.float32"):
        clipped_policy_loss(given[6], given[6], given[6], clip_range=0.1)


def test_wrong_arguments() -> None:
    given, noise = batch()
    settings: dict[str, Any] = {"kl_weight": 0, "adv_clip_max": 5, "noise": noise}
    for changes, message in (
        ({"weighting": "none"}, "weighting is 'none', allowed: uniform, t, t_squared, huber"),
        ({"power": 0.0}, r"power is 0\.0"),
        ({"adv_clip_max": 0}, "adv_clip_max is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            awm_loss(*given, **settings | changes)
    with pytest.raises(ValueError, match="v_old is missing"):
        awm_loss(given[0], None, *given[2:], **settings, clip_range=0.1)
    with pytest.raises(ValueError, match="which needs v_ref"):
        awm_loss(*given[:2], None, *given[3:], **settings | {"kl_weight": 1.0})
    a = given[6]
    with pytest.raises(ValueError, match=r"clip_range is 1\.5, allowed: above 0 to 1"):
        grpo_loss(a, a, a, clip_range=1.5)
    with pytest.raises(ValueError, match=r"kl_weight is 0\.04, which needs mean, mean_ref"):
        grpo_loss(a, a, a, kl_weight=0.04)
    with pytest.raises(ValueError, match=r"advantage has shape \(3,\), needed: \(4,\)"):
        grpo_loss(a, a, a[:3])
    assert math.isfinite(grpo_loss(a, a, a)[0].item())
