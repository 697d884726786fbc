"""The objective of DiffusionNFT: golden values, gradients, what follows from its definition."""

from pathlib import Path
from typing import Any

import pytest
import torch
from golden_nft import arrays, case_names, cases
from torch import Tensor

from thalweg.diffusion.nft import nft_loss
from thalweg.diffusion.nft.advantage import optimality
from thalweg.diffusion.nft.loss import branch_losses
from thalweg.diffusion.order import generator

GOLDEN = cases("loss")
ABOVE_FLOOR = [(path, case) for path, case in GOLDEN if case["input"] != "floor"]
"""Without the input whose x_t - t u - x0 is rounding alone in float32."""
NAMES = ("v", "v_old", "v_ref", "x_t", "x0", "t", "advantages")
SETTINGS = ("beta", "kl_weight", "adv_clip_max", "adv_mode", "weighting")


def golden_input(path: Path, case: dict[str, Any], dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    table = {
        name: arrays(path)[f"input.{case['input']}.{name}"].to(dtype, copy=True) for name in (*NAMES, "eps")
    }
    return [table[name] for name in NAMES], table["eps"]


def random_batch(
    dtype: torch.dtype = torch.float64, distance: float = 0.3, batch: int = 5
) -> tuple[list[Tensor], Tensor]:
    stream = generator(7)
    x0, noise, v_old, d, e = (
        torch.randn(batch, 3, 4, 4, generator=stream, dtype=torch.float64) for _ in range(5)
    )
    t = torch.linspace(0.1, 1.0, batch, dtype=torch.float64)
    x_t = (1 - t[:, None, None, None]) * x0 + t[:, None, None, None] * noise
    advantage = torch.randn(batch, generator=stream, dtype=torch.float64)
    values = (v_old + distance * d, v_old, v_old + 0.2 * e, x_t, x0, t, advantage)
    return [a.to(dtype) for a in values], noise.to(dtype)


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize(("path", "case"), GOLDEN, ids=case_names(GOLDEN))
def test_golden_values(path: Path, case: dict[str, Any]) -> None:
    given, noise = golden_input(path, case, torch.float64)
    given[0].requires_grad_()
    loss, metrics = nft_loss(*given, **{key: case[key] for key in SETTINGS}, noise=noise)
    loss.backward()
    for name, expected in case["scalars"].items():
        assert metrics[name].item() == pytest.approx(expected, rel=max(case["rtol"], 1e-9), abs=1e-12), name
    assert loss.item() == metrics["total_loss"].item()
    gradient = arrays(path)[f"case.{case['case']}.grad_v"]
    torch.testing.assert_close(given[0].grad, gradient, rtol=0, atol=case["rtol"] * case["grad_abs_max"])
    branches = branch_losses(
        *given[:2], *given[3:6], beta=case["beta"], weighting=case["weighting"], noise=noise
    )
    r = optimality(given[-1], adv_clip_max=case["adv_clip_max"], adv_mode=case["adv_mode"])
    found = {"r": r, "loss_plus": branches.plus, "loss_minus": branches.minus}
    found |= {"weight_plus": branches.weight_plus, "weight_minus": branches.weight_minus}
    for name, expected in case["per_sample"].items():
        values = torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(found[name].detach(), values, rtol=max(case["rtol"], 1e-9), atol=1e-12)


@pytest.mark.parametrize(("path", "case"), ABOVE_FLOOR, ids=case_names(ABOVE_FLOOR))
def test_float32_is_as_good_as_its_inputs(path: Path, case: dict[str, Any]) -> None:
    given, noise = golden_input(path, case, torch.float32)
    given[0].requires_grad_()
    loss, _ = nft_loss(*given, **{key: case[key] for key in SETTINGS}, noise=noise)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(case["scalars"]["total_loss"], rel=2e-6)
    assert relative(given[0].grad, arrays(path)[f"case.{case['case']}.grad_v"].float()) < 5e-6


@pytest.mark.parametrize("weighting", ["adaptive_x0", "velocity"])
def test_only_the_trained_velocity_gets_a_gradient(weighting: str) -> None:
    given, noise = random_batch()
    for value in (*given, noise):
        value.requires_grad_()
    loss, metrics = nft_loss(
        *given, beta=0.5, kl_weight=0.1, adv_clip_max=5, weighting=weighting, noise=noise
    )
    loss.backward()
    assert given[0].grad is not None
    assert all(value.grad is None for value in (*given[1:], noise))
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("adv_clip_max", [3.0, 5.0])
def test_first_gradient_is_advantage_weighted_matching(beta: float, adv_clip_max: float) -> None:
    """At v = v_old it is 2 A t^2 (v_old - v_target) / (D m) per sample, whatever beta and A_max are."""
    given, noise = random_batch(distance=0.0)
    v, _, _, x_t, x0, t, advantage = given
    v.requires_grad_()
    nft_loss(*given, beta=beta, kl_weight=0, adv_clip_max=adv_clip_max)[0].backward()
    t4 = t[:, None, None, None]
    m = (x_t - t4 * v.detach() - x0).abs().mean((1, 2, 3))
    each = (2 * advantage * t**2 / (v[0].numel() * m * len(t)))[:, None, None, None]
    torch.testing.assert_close(v.grad, each * (v.detach() - (noise - x0)), rtol=1e-9, atol=1e-15)


def test_minimum_per_sample_extrapolates() -> None:
    """With plain velocities the least loss of a sample is at v_old + (2 r - 1) / beta (target - v_old)."""
    given, noise = random_batch()
    beta, clip = 0.25, 2.0
    r = optimality(given[-1], adv_clip_max=clip)[:, None, None, None]
    best = given[1] + (2 * r - 1) / beta * (noise - given[4] - given[1])
    given[0] = best.requires_grad_()
    settings: dict[str, Any] = {"beta": beta, "kl_weight": 0, "adv_clip_max": clip, "weighting": "velocity"}
    nft_loss(*given, **settings, noise=noise)[0].backward()
    assert best.grad.abs().max() < 1e-14


def test_data_space_is_velocity_space_times_t_squared() -> None:
    given, noise = random_batch()
    v, v_old, _, x_t, x0, t, _ = given
    data = branch_losses(v, v_old, x_t, x0, t, beta=0.3)
    plain = branch_losses(v, v_old, x_t, x0, t, beta=0.3, weighting="velocity", noise=noise)
    torch.testing.assert_close(data.plus * data.weight_plus, t**2 * plain.plus)
    torch.testing.assert_close(data.minus * data.weight_minus, t**2 * plain.minus)


def test_noise_of_the_velocity_form_may_be_left_out() -> None:
    given, noise = random_batch()
    settings: dict[str, Any] = {"beta": 1.0, "kl_weight": 0, "adv_clip_max": 5, "weighting": "velocity"}
    torch.testing.assert_close(nft_loss(*given, **settings)[0], nft_loss(*given, **settings, noise=noise)[0])
    given[5][0] = 0
    with pytest.raises(ValueError, match="pass noise"):
        nft_loss(*given, **settings)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_raised(dtype: torch.dtype) -> None:
    """It costs the rounding of the inputs and no more; squares of small distances do not vanish."""
    given, _ = random_batch(dtype)
    exact = [value.double() for value in given]
    settings: dict[str, Any] = {"beta": 0.1, "kl_weight": 0.1, "adv_clip_max": 5}
    (loss, _), (expected, _) = (nft_loss(*values, **settings) for values in (given, exact))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    near = torch.full((2, 8), 2.0**-13, dtype=dtype)
    zero = torch.zeros_like(near)
    one = torch.ones(2, dtype=dtype)
    _, metrics = nft_loss(near, zero, zero, zero, zero, one, one, **settings)
    assert metrics["kl_div"].item() == metrics["old_deviate"].item() == 2.0**-26


def test_reference_may_be_left_out() -> None:
    given, _ = random_batch()
    settings: dict[str, Any] = {"beta": 0.1, "adv_clip_max": 5}
    loss, metrics = nft_loss(*given[:2], None, *given[3:], kl_weight=0, **settings)
    expected, more = nft_loss(*given, kl_weight=0, **settings)
    assert loss.item() == expected.item()
    assert more.keys() - metrics.keys() == {"kl_div", "kl_div_loss", "old_kl_div"}
    with pytest.raises(ValueError, match="needs v_ref"):
        nft_loss(*given[:2], None, *given[3:], kl_weight=1e-4, **settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": 0.0}, "beta is 0.0"),
        ({"adv_clip_max": -1}, "adv_clip_max is -1"),
        ({"adv_mode": "some"}, "adv_mode is 'some', allowed: all, positive_only"),
        ({"weighting": "x0"}, "weighting is 'x0', allowed: adaptive_x0, velocity"),
        ({"t": torch.ones(2)}, r"t has shape \(2,\), needed: \(5,\)"),
        ({"advantage": torch.ones(5, 1)}, r"advantage has shape \(5, 1\)"),
        ({"v_old": torch.ones(5, 3, 4)}, r"v_old has shape \(5, 3, 4\), needed: \(5, 3, 4, 4\)"),
    ],
)
def test_wrong_arguments(changes: dict[str, Any], message: str) -> None:
    given = dict(zip(("v", "v_old", "v_ref", "x_t", "x0", "t", "advantage"), random_batch()[0], strict=True))
    settings = {"beta": 1.0, "kl_weight": 0.0, "adv_clip_max": 5}
    with pytest.raises(ValueError, match=message):
        nft_loss(**given | settings | changes)
