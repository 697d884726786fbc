"""Times of rollouts and training: golden values, diffusers' grids, and what random orders are."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from golden import golden_files

from thalweg.diffusion.nft.timesteps import (
    TrainTimes,
    flow_match_sigmas,
    flow_nodes,
    random_orders,
    train_count,
)
from thalweg.diffusion.order import generator

(GOLDEN,) = (json.loads(path.read_text()) for path in golden_files("nft", "schedules.json"))


@pytest.mark.parametrize("case", GOLDEN["flow_match_euler"], ids=lambda case: str(case["num_steps"]))
def test_golden_grids(case: dict[str, Any]) -> None:
    sigmas = flow_match_sigmas(case["num_steps"], case["shift"])
    assert sigmas == pytest.approx(case["sigmas"], rel=1e-6)
    nodes = flow_nodes(sigmas)
    assert [node.label for node in nodes[:-1]] == pytest.approx(case["timesteps"], rel=1e-6)
    whole = flow_nodes(sigmas, whole_timesteps=True)
    assert [node.label for node in whole[:-1]] == case["sampling_timesteps"]


@pytest.mark.parametrize("shift", [1.0, 1.7, 3.0, 6.0])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 28])
def test_grids_of_diffusers(shift: float, num_steps: int) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(num_steps)
    np.testing.assert_allclose(flow_match_sigmas(num_steps, shift), scheduler.sigmas.numpy(), rtol=1e-6)


def test_golden_counts() -> None:
    for case in GOLDEN["train_timesteps"]["count"]:
        assert train_count(case["num_steps"], case["fraction"]) == case["count"]


def test_golden_selection() -> None:
    case = GOLDEN["train_timesteps"]["selection"]
    orders = torch.tensor(case["permutations"])[:, : case["count"]]
    times = torch.tensor([*case["timesteps"], 0.0], dtype=torch.float64)
    assert times[orders].tolist() == case["used"]
    assert times[orders + 1].tolist() == case["next"]


def test_orders_are_independent_permutations() -> None:
    orders = random_orders(6, 3000, generator(1))
    assert (orders.sort(1).values == torch.arange(6)).all()
    counts = torch.stack([(orders[:, 0] == i).sum() for i in range(6)]).double()
    assert (
        (counts - 500).square() / 500
    ).sum() < 20.5  # chi squared of 5 degrees: one in a thousand is above
    assert len({tuple(order) for order in orders.tolist()}) > 600  # of 720
    assert torch.equal(orders, random_orders(6, 3000, generator(1)))


def test_subsets_have_no_repetition() -> None:
    drawn = TrainTimes(fraction=0.99).draw(10, 200, generator(2))
    assert drawn.shape == (200, 9)
    assert all(len(set(row)) == 9 for row in drawn.tolist())
    assert set(drawn.flatten().tolist()) == set(range(10))


@pytest.mark.parametrize(("num_steps", "count"), [(10, 4), (10, 10), (9, 3), (25, 2)])
def test_strata_hold_one_time_each(num_steps: int, count: int) -> None:
    drawn = TrainTimes(choice="stratified", count=count).draw(num_steps, 4000, generator(3))
    parts = drawn.sort(1).values
    for j in range(count):
        assert parts[:, j].min() == j * num_steps // count
        assert parts[:, j].max() == -(-(j + 1) * num_steps // count) - 1
    shares = torch.bincount(drawn.flatten(), minlength=num_steps) / drawn.numel()
    assert (shares - 1 / num_steps).abs().max() < 0.012  # every level is as likely as the others
    assert drawn[:, 0].float().std() > 0.25 * num_steps  # strata come in any order


def test_wrong_settings() -> None:
    with pytest.raises(ValueError, match=r"fraction 0\.99 of 1 steps leaves 0 times .* allowed: 1 to 1"):
        TrainTimes().draw(1, 4, generator(0))
    with pytest.raises(ValueError, match="count 11 of 10 steps"):
        TrainTimes(count=11).of(10)
    with pytest.raises(ValueError, match=r"fraction is 0\.0"):
        TrainTimes(fraction=0.0)
    with pytest.raises(ValueError, match="choice is 'all', allowed: subset, stratified"):
        TrainTimes(choice="all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_steps is 0"):
        flow_match_sigmas(0)
    with pytest.raises(ValueError, match="shift must be positive"):
        flow_match_sigmas(4, 0.0)
