"""Stochastic rounding to bf16: right on average, to a neighbour, the same for a part as for the whole."""

import pytest
import torch
from optim_cases import Case, gradients, make, weights
from torch import Tensor, nn

from thalweg.core_optim.engine.random import mix
from thalweg.core_optim.engine.rounding import hashed_bits, stochastic_round


def neighbours(x: Tensor) -> tuple[Tensor, Tensor]:
    """The bf16 numbers towards 0 and away from it, as fp32."""
    bits = x.view(torch.int32) & -0x10000
    return bits.view(torch.float32), (bits + 0x10000).view(torch.float32)


@pytest.mark.parametrize("value", [0.3, -1.001, 1.0 + 2.0**-9, 3e-30, -7e20])
def test_mean_of_many_draws_is_the_number(value: float) -> None:
    n = 200_000
    x = torch.full((n,), value)
    low, high = neighbours(x)
    gap = (high[0] - low[0]).abs().double()
    mean = stochastic_round(x, mix(0, 1, 2) & 0x7FFFFFFF).double().mean()
    # the standard deviation of one draw is at most half a gap
    assert (mean - x[0].double()).abs() < 5 * 0.5 * gap / n**0.5
    nearest = x.bfloat16().double().mean()
    assert (mean - x[0].double()).abs() < (nearest - x[0].double()).abs() / 20


def test_mean_over_keys_is_the_number() -> None:
    x = torch.randn(16)
    draws = torch.stack([stochastic_round(x, mix(7, t, 3) & 0x7FFFFFFF) for t in range(4_000)]).double()
    low, high = neighbours(x)
    error = (draws.mean(0) - x.double()).abs() / (high - low).abs().double()
    assert error.max() < 5 * 0.5 / 4_000**0.5


def test_only_the_two_neighbours_occur() -> None:
    x = torch.cat([torch.randn(100_000), torch.randn(1000) * 1e-38, torch.randn(1000) * 1e37])
    low, high = neighbours(x)
    found = stochastic_round(x, 12345).float()
    assert bool(((found == low) | (found == high)).all())
    assert bool((found == low).any())
    assert bool((found == high).any())


def test_numbers_of_bf16_stay() -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    exact = every[every.isfinite()].float()
    assert torch.equal(stochastic_round(exact, 99).float(), exact)
    extremes = torch.tensor([float("inf"), -float("inf"), 0.0, -0.0])
    assert torch.equal(stochastic_round(extremes, 99).float(), extremes)
    assert bool(stochastic_round(torch.tensor([float("nan")]), 99).isnan())


@pytest.mark.parametrize("cut", [0, 1, 17, 999])
def test_part_gets_the_bits_of_the_whole(cut: int) -> None:
    x = torch.randn(1000)
    whole = stochastic_round(x, 5)
    assert torch.equal(stochastic_round(x[cut:], 5, cut), whole[cut:])
    chosen = torch.randperm(1000)[:100]
    assert torch.equal(stochastic_round(x[chosen], 5, chosen.int()), whole[chosen])


def test_bits_are_uniform_and_differ_between_keys() -> None:
    n = 1 << 18
    one, two = (hashed_bits(n, key, 0, torch.device("cpu")) for key in (1, 2))
    for bits in (one, two):
        counts = torch.bincount(bits >> 8, minlength=256).double()
        # chi-square with 255 degrees of freedom
        assert ((counts - n / 256) ** 2 / (n / 256)).sum() < 255 + 5 * (2 * 255) ** 0.5
    a, b = one.double() - one.double().mean(), two.double() - two.double().mean()
    assert (a * b).mean().abs() / (a.std() * b.std()) < 5 / n**0.5


@pytest.mark.parametrize("rule", ["adamw", "lion", "kron"])
def test_small_updates_of_bf16_weights_add_up(rule: str) -> None:
    def moved(stochastic: bool) -> Tensor:
        p = nn.Parameter(torch.full((64, 64), 1.0, dtype=torch.bfloat16))
        options = {"weight_decay": 0.0, "lr": 1e-4}
        optimizer = make(Case(rule, options), [("p", p)], stochastic_rounding=stochastic)
        for _ in range(100):
            p.grad = torch.ones_like(p) + 0.1 * torch.eye(64, dtype=torch.bfloat16)
            optimizer.step()
        return 1.0 - p.detach().double().mean()

    # an update is 1/40 of half the gap of bf16 below 1
    assert moved(False) == 0.0
    wanted = {"kron": (2e-4, 2e-2)}.get(rule, (0.95e-2, 1.05e-2))
    assert wanted[0] < moved(True) < wanted[1]


def test_states_in_bf16_are_rounded_stochastically() -> None:
    p = nn.Parameter(torch.zeros(4096))
    optimizer = make(Case("adamw", {"state_dtype": "bfloat16"}), [("p", p)], stochastic_rounding=True)
    for _ in range(50):
        p.grad = torch.full_like(p, 0.3)
        optimizer.step()
    v = optimizer.state[p]["exp_avg_sq"]
    assert v.dtype == torch.bfloat16
    assert v.unique().numel() > 2
    assert v.double().mean().item() == pytest.approx(0.09 * (1 - 0.999**50), rel=5e-3)


@pytest.mark.parametrize("state_dtype", [None, "bfloat16"])
def test_lists_and_pieces_of_large_tensors_round_alike(state_dtype: str | None) -> None:
    found = []
    for kernel in ("loop", "foreach"):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(300, 301).bfloat16())
        options = {"state_dtype": state_dtype, "stochastic_rounding": True}
        optimizer = make(Case("lion", {"lr": 1e-3}), [("p", p)], kernel=kernel, **options)
        for _ in range(3):
            p.grad = torch.randn(300, 301).bfloat16()
            optimizer.step()
        found.append((p.detach(), optimizer.state[p]["exp_avg"]))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_seed_and_step_decide_and_nothing_else() -> None:
    def run(seed: int, noise: int) -> dict[str, Tensor]:
        torch.manual_seed(noise)
        named = {k: nn.Parameter(v) for k, v in weights(dtype=torch.bfloat16).items()}
        optimizer = make(Case("adamw"), named.items(), stochastic_rounding=True, seed=seed)
        for step in range(3):
            for name, g in gradients(step, dtype=torch.bfloat16).items():
                named[name].grad = g
            optimizer.step()
        return named

    first, second, other = run(0, 1), run(0, 2), run(1, 1)
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)
