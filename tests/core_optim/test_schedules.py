"""Schedules: exact values at marked steps, and properties that hold for all settings."""

import itertools
import math
import typing

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from thalweg.core_optim.config import ScheduleConfig
from thalweg.core_optim.schedules import bind, factor, warmup_steps

NAMES = typing.get_args(typing.get_type_hints(ScheduleConfig)["name"])
MONOTONE = tuple(name for name in NAMES if name != "cyclic")
WHOLE_RUN = tuple(name for name in MONOTONE if name not in ("constant", "inverse-sqrt"))
ratios = st.floats(0.0, 1.0)


def configs(names: tuple[str, ...] = NAMES) -> st.SearchStrategy[ScheduleConfig]:
    def make(name: str, final_ratio: float, **rest: object) -> ScheduleConfig:
        final = 0.0 if name == "linear-to-zero" else final_ratio
        return ScheduleConfig(name=name, final_ratio=final, **rest)  # type: ignore[arg-type]

    return st.builds(
        make,
        name=st.sampled_from(names),
        warmup_ratio=ratios,
        final_ratio=ratios,
        decay_ratio=ratios,
        decay_shape=st.sampled_from(("linear", "cosine", "sqrt")),
        power=st.floats(0.1, 10.0),
        timescale=st.integers(0, 100),
        cycles=st.integers(1, 10),
        cycle_rise=st.floats(0.0, 0.9),
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


def test_a_share_of_warmup_needs_a_total() -> None:
    with pytest.raises(ValueError, match=r"warmup_ratio 0\.1 needs the number of optimizer steps"):
        bind(ScheduleConfig(name="constant", warmup_ratio=0.1), None)


def test_one_minus_sqrt_is_the_curve_of_wsd_over_the_whole_run() -> None:
    wsd = ScheduleConfig(name="wsd", decay_ratio=1.0, decay_shape="sqrt", final_ratio=0.1)
    whole = ScheduleConfig(name="one-minus-sqrt", final_ratio=0.1)
    assert values(whole, 9) == pytest.approx(values(wsd, 9))


def test_power_by_hand_and_of_one_is_linear() -> None:
    config = ScheduleConfig(name="power", power=3.0, final_ratio=0.2, warmup_steps=1)
    assert values(config, 3) == pytest.approx([0.0, 1.0, 0.2 + 0.8 / 8, 0.2])
    line = ScheduleConfig(name="linear", final_ratio=0.3, warmup_steps=2)
    straight = ScheduleConfig(name="power", power=1.0, final_ratio=0.3, warmup_steps=2)
    assert values(straight, 9) == values(line, 9)


def test_inverse_sqrt_after_warmup_is_that_of_the_transformer() -> None:
    """Vaswani et al. 2017: min(step / w^1.5, 1 / sqrt(step)), here in units of its peak 1 / sqrt(w)."""
    config = ScheduleConfig(name="inverse-sqrt", warmup_steps=4)
    theirs = [min(step / 4**1.5, step**-0.5) / 4**-0.5 for step in range(1, 200)]
    assert [factor(config, step) for step in range(1, 200)] == pytest.approx(theirs)


def test_inverse_sqrt_with_a_timescale_and_a_least_factor() -> None:
    config = ScheduleConfig(name="inverse-sqrt", timescale=10, final_ratio=0.25, warmup_steps=3)
    assert factor(config, 13) == pytest.approx(1 / math.sqrt(2))
    assert factor(config, 33) == pytest.approx(0.5)
    assert factor(config, 10**6) == 0.25


def test_linear_to_zero_is_proportional_to_the_optimal_last_iterate_rates() -> None:
    """Zamani & Glineur 2023, Defazio et al. 2023: step t of 1 to T has a rate proportional to T + 1 - t."""
    config = ScheduleConfig(name="linear-to-zero")
    rates = [factor(config, step, 8) for step in range(8)]
    assert rates == pytest.approx([(8 + 1 - t) / 8 for t in range(1, 9)])
    assert factor(config, 8, 8) == 0.0
    with pytest.raises(ValueError, match=r"'linear-to-zero': final_ratio is 0\.1, allowed: 0"):
        ScheduleConfig(name="linear-to-zero", final_ratio=0.1)


def test_cyclic_restarts_by_hand() -> None:
    config = ScheduleConfig(name="cyclic", cycles=2, warmup_steps=2, final_ratio=0.5)
    assert values(config, 10) == pytest.approx([0, 0.5, 1, 0.875, 0.75, 0.625, 1, 0.875, 0.75, 0.625, 0.5])


def test_cyclic_triangles_by_hand() -> None:
    config = ScheduleConfig(name="cyclic", cycles=2, cycle_rise=0.5)
    assert values(config, 8) == pytest.approx([1, 0.75, 0.5, 0.25, 0, 0.5, 1, 0.5, 0])


def test_cyclic_of_one_cosine_cycle_is_cosine() -> None:
    cycle = ScheduleConfig(name="cyclic", cycles=1, decay_shape="cosine", warmup_steps=3, final_ratio=0.1)
    cosine = ScheduleConfig(name="cosine", warmup_steps=3, final_ratio=0.1)
    assert values(cycle, 20) == values(cosine, 20)


def test_cyclic_cosine_equals_torch_warm_restarts() -> None:
    import torch

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=8, eta_min=0.1)
    config = ScheduleConfig(name="cyclic", cycles=4, decay_shape="cosine", final_ratio=0.1)
    for step in range(32):
        assert factor(config, step, 32) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("name", ["constant", "inverse-sqrt"])
def test_endless_schedules_need_no_total(name: str) -> None:
    config = ScheduleConfig(name=name, warmup_steps=4)  # type: ignore[arg-type]
    assert bind(config, None)(2) == 0.5


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("constant", "inverse-sqrt")])
def test_all_others_need_a_total(name: str) -> None:
    with pytest.raises(ValueError, match=r"needs the number of optimizer steps.*trainer\.max_steps"):
        bind(ScheduleConfig(name=name), None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value"),
    [("power", 0.0), ("timescale", -1), ("cycles", 0), ("cycle_rise", 1.0), ("cycle_rise", -0.1)],
)
def test_bad_options_are_named(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{field} is {value}, allowed: "):
        ScheduleConfig(**{field: value})  # type: ignore[arg-type]


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
@given(config=configs(MONOTONE), total=st.integers(1, 300))
def test_rises_to_the_peak_then_never_rises_again(config: ScheduleConfig, total: int) -> None:
    curve = values(config, total)
    peak = warmup_steps(config, total)
    assert all(0.0 <= value <= 1.0 for value in curve)
    assert all(a < b for a, b in itertools.pairwise(curve[:peak]))
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(curve[peak:]))


@settings(max_examples=200, deadline=None)
@given(config=configs(("cyclic", *WHOLE_RUN)), total=st.integers(1, 300), beyond=st.integers(0, 50))
def test_ends_at_the_final_ratio_and_stays_there(config: ScheduleConfig, total: int, beyond: int) -> None:
    assume(warmup_steps(config, total) < total)
    if config.name == "wsd":
        assume(round(config.decay_ratio * total) > 0)
    assert factor(config, total + beyond, total) == pytest.approx(config.final_ratio, abs=1e-12)


@settings(deadline=None)
@given(config=configs(), total=st.integers(2, 300))
def test_warmup_reaches_the_peak_exactly(config: ScheduleConfig, total: int) -> None:
    warmup = warmup_steps(config, total)
    assume(0 < warmup < total)
    assert factor(config, 0, total) == 0.0
    assert factor(config, warmup, total) == 1.0 or (config.name == "wsd" and config.decay_ratio == 1.0)


@settings(deadline=None)
@given(config=configs(), total=st.integers(1, 300), step=st.integers(0, 400))
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
