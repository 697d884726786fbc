"""Schedules: exact values at marked steps, and properties that hold for all settings."""

import itertools
import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from thalweg.core_optim.config import ScheduleConfig
from thalweg.core_optim.schedules import bind, factor, warmup_steps

NAMES = ("cosine", "linear", "constant", "wsd")
ratios = st.floats(0.0, 1.0)
configs = st.builds(
    ScheduleConfig,
    name=st.sampled_from(NAMES),
    warmup_ratio=ratios,
    final_ratio=ratios,
    decay_ratio=ratios,
    decay_shape=st.sampled_from(("linear", "cosine", "sqrt")),
)


def values(config: ScheduleConfig, total: int) -> list[float]:
    return [factor(config, step, total) for step in range(total + 1)]


def test_cosine_without_warmup_by_hand() -> None:
    expected = [1.0, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125), 0.0]
    assert values(ScheduleConfig(name="cosine"), 4) == pytest.approx(expected)


def test_linear_with_warmup_and_final_ratio_by_hand() -> None:
    config = ScheduleConfig(name="linear", warmup_steps=2, final_ratio=0.2)
    assert values(config, 6) == pytest.approx([0.0, 0.5, 1.0, 0.8, 0.6, 0.4, 0.2])


def test_wsd_by_hand() -> None:
    config = ScheduleConfig(name="wsd", warmup_steps=2, decay_ratio=0.4, final_ratio=0.0)
    assert values(config, 10) == pytest.approx([0, 0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0])


def test_sqrt_decay_by_hand() -> None:
    config = ScheduleConfig(name="wsd", decay_ratio=1.0, decay_shape="sqrt")
    assert values(config, 4) == pytest.approx([1.0, 0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75), 0.0])


def test_constant_needs_no_total_and_others_do() -> None:
    assert factor(ScheduleConfig(name="constant", warmup_steps=4), 2) == 0.5
    for config in (ScheduleConfig(name="cosine"), ScheduleConfig(name="constant", warmup_ratio=0.1)):
        with pytest.raises(ValueError, match=r"needs the number of optimizer steps.*trainer\.max_steps"):
            bind(config, None)


@settings(deadline=None)
@given(ratio=ratios, total=st.integers(1, 100_000))
def test_warmup_ratio_is_rounded_up_to_whole_steps(ratio: float, total: int) -> None:
    steps = warmup_steps(ScheduleConfig(warmup_ratio=ratio), total)
    assert ratio * total - 1e-6 <= steps < ratio * total + 1


@pytest.mark.parametrize("total", [100, 1000, 30_000])
def test_round_off_adds_no_step_of_warmup(total: int) -> None:
    for percent in range(1, 100):
        config = ScheduleConfig(warmup_ratio=percent / 100)
        assert warmup_steps(config, total) == percent * total // 100


@settings(max_examples=200, deadline=None)
@given(config=configs, total=st.integers(1, 300))
def test_rises_to_the_peak_then_never_rises_again(config: ScheduleConfig, total: int) -> None:
    curve = values(config, total)
    peak = warmup_steps(config, total)
    assert all(0.0 <= value <= 1.0 for value in curve)
    assert all(a < b for a, b in itertools.pairwise(curve[:peak]))
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(curve[peak:]))


@settings(max_examples=200, deadline=None)
@given(config=configs, total=st.integers(1, 300), beyond=st.integers(0, 50))
def test_ends_at_the_final_ratio_and_stays_there(config: ScheduleConfig, total: int, beyond: int) -> None:
    assume(warmup_steps(config, total) < total)
    expected = 1.0 if config.name == "constant" else config.final_ratio
    if config.name == "wsd":
        assume(round(config.decay_ratio * total) > 0)
    assert factor(config, total + beyond, total) == pytest.approx(expected, abs=1e-12)


@settings(deadline=None)
@given(config=configs, total=st.integers(2, 300))
def test_warmup_reaches_the_peak_exactly(config: ScheduleConfig, total: int) -> None:
    warmup = warmup_steps(config, total)
    assume(0 < warmup < total)
    assert factor(config, 0, total) == 0.0
    assert factor(config, warmup, total) == 1.0 or (config.name == "wsd" and config.decay_ratio == 1.0)


@settings(deadline=None)
@given(config=configs, total=st.integers(1, 300), step=st.integers(0, 400))
def test_bound_schedule_is_the_function(config: ScheduleConfig, total: int, step: int) -> None:
    assert bind(config, total)(step) == factor(config, step, total)


@pytest.mark.parametrize("warmup", [0, 7])
def test_cosine_equals_torch_cosine_annealing(warmup: int) -> None:
    """torch reaches the same curve by recursion; ours is its closed form, shifted by the warm-up."""
    import torch

    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20, eta_min=0.1)
    config = ScheduleConfig(name="cosine", warmup_steps=warmup, final_ratio=0.1)
    for step in range(21):
        assert factor(config, step + warmup, 20 + warmup) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
