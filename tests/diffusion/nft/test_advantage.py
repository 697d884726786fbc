"""Advantages and optimality probabilities: golden values and invariances."""

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from golden_nft import case_names, cases
from hypothesis import given
from hypothesis import strategies as st

from thalweg.diffusion.nft import group_advantage
from thalweg.diffusion.nft.advantage import AdvMode, optimality, reward_statistics

GOLDEN = cases("advantage")


@pytest.mark.parametrize(("path", "case"), GOLDEN, ids=case_names(GOLDEN))
@pytest.mark.parametrize("std", ["global", "group"])
def test_golden_advantages(path: Path, case: dict[str, Any], std: Any) -> None:
    expected = case[f"{std}_std"]
    rewards = torch.tensor(case["rewards"], dtype=torch.float32)
    found = group_advantage(rewards, case["prompts"], std=std)
    values = torch.tensor(expected["advantages"], dtype=torch.float64)
    torch.testing.assert_close(found, values, rtol=1e-9, atol=1e-12)
    for key, r in expected["r"].items():
        mode, clip = key.split("/")
        probabilities = optimality(values, adv_mode=mode, adv_clip_max=float(clip))
        torch.testing.assert_close(probabilities, torch.tensor(r, dtype=torch.float64), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("path", "case"), GOLDEN, ids=case_names(GOLDEN))
def test_golden_statistics(path: Path, case: dict[str, Any]) -> None:
    found, expected = reward_statistics(case["rewards"], case["prompts"]), case["stats"]
    assert found.groups == expected["distinct_prompts"]
    for name in ("population_std", "group_size", "zero_std_ratio", "reward_std_mean"):
        assert getattr(found, name) == pytest.approx(expected[name], rel=1e-9, abs=1e-12), name
    tops = {str(top): mean for top, mean in found.mean_of_top.items()}
    assert tops == pytest.approx(expected["mean_of_top"], rel=1e-9, abs=1e-12)


rewards_strategy = st.lists(st.floats(-8, 8, width=32).map(lambda x: round(x, 2)), min_size=2, max_size=24)


@given(rewards=rewards_strategy, seed=st.integers(0, 9), std=st.sampled_from(["global", "group"]))
def test_advantages_sum_to_zero_and_follow_a_shuffle(rewards: list[float], seed: int, std: Any) -> None:
    rng = np.random.default_rng(seed)
    groups = rng.integers(0, 3, len(rewards))
    advantage = group_advantage(rewards, groups, std=std)
    for g in set(groups.tolist()):
        assert advantage[groups == g].sum().abs() < 1e-6 * max(1.0, advantage.abs().max().item())
    order = rng.permutation(len(rewards))
    shuffled = group_advantage(np.array(rewards)[order], groups[order], std=std)
    torch.testing.assert_close(shuffled, advantage[torch.from_numpy(order)], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("std", ["global", "group"])
def test_only_the_epsilon_knows_units(std: Any) -> None:
    rewards = torch.tensor([1.0, 2.0, 4.0, 0.0, 1.0, 5.0], dtype=torch.float64) * 1e6
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    base = group_advantage(rewards, groups, std=std)
    torch.testing.assert_close(
        group_advantage(rewards * 8 - 3e6, groups, std=std), base, rtol=1e-9, atol=1e-9
    )


def test_by_hand() -> None:
    # groups (0, 2) and (1, 5): means 1 and 3, deviations 1 and 2; all: mean 2, variance (4 + 0 + 1 + 9) / 4
    rewards, groups = [0.0, 1.0, 2.0, 5.0], [10, 20, 10, 20]
    of_group = group_advantage(rewards, groups, std="group").tolist()
    assert of_group == pytest.approx([-1 / 1.0001, -2 / 2.0001, 1 / 1.0001, 2 / 2.0001], rel=1e-12)
    of_all = group_advantage(rewards, groups).tolist()
    assert of_all == pytest.approx([a / (3.5**0.5 + 1e-4) for a in (-1, -2, 1, 2)], rel=1e-12)


@pytest.mark.parametrize("mode", get_args(AdvMode))
def test_optimality_is_a_rising_probability(mode: Any) -> None:
    advantage = torch.linspace(-9, 9, 37, dtype=torch.float64)
    r = optimality(advantage, adv_clip_max=5, adv_mode=mode)
    assert r.min() >= 0
    assert r.max() <= 1
    assert (r.diff() >= 0).all()
    assert r[18] == 0.5  # no advantage


@pytest.mark.parametrize(
    ("rewards", "groups", "std", "message"),
    [
        ([1.0, float("nan")], [0, 0], "global", "1 of 2 rewards are not finite: nan of image 1"),
        ([1.0, float("inf")], [0, 0], "group", "inf of image 1"),
        ([1.0, 2.0], [0], "global", r"shape \(2,\) with 1 groups"),
        ([], [], "global", "N > 0"),
        ([1.0], [0], "batch", "std is 'batch', allowed: global, group"),
    ],
)
def test_wrong_rewards(rewards: list[float], groups: list[int], std: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group_advantage(rewards, groups, std=std)
