"""All2all pairs, lead times, splits and look-ups agree with the published loader."""

import json

import numpy as np
import pytest
from golden import golden_files

from thalweg.pde.data.pairs import PairRule, num_train, part_range
from thalweg.pde.problem import Splits

CASES = json.loads(golden_files("poseidon", "all2all.json")[0].read_text())


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['settings']['which']}-{case['length']}")
def test_pairs_equal_the_published_loader(case: dict) -> None:
    settings = case["settings"]
    splits = Splits(total=settings["N_max"], val=settings["N_val"], test=settings["N_test"])
    allowed = settings.get("allowed_time_transitions")
    rule = PairRule(
        max_num_time_steps=settings["max_num_time_steps"],
        time_step_size=settings["time_step_size"],
        fix_input_to_time_step=settings.get("fix_input_to_time_step"),
        allowed_time_transitions=allowed and tuple(allowed),
    )
    pairs = rule.pairs()
    assert pairs.tolist() == case["pairs"]
    np.testing.assert_allclose(
        (pairs[:, 1] - pairs[:, 0]) / settings["T"], case["lead_time"], rtol=0, atol=1e-15
    )
    assert num_train(splits, settings["num_trajectories"]) == case["resolved_num_trajectories"]
    trajectories = part_range(splits, settings["which"], settings["num_trajectories"])
    assert trajectories.start == case["first_trajectory"]
    assert len(trajectories) * len(pairs) == case["length"]
    for look in case["lookup"]:
        trajectory, pair = divmod(look["index"], len(pairs))
        assert trajectories[trajectory] == look["trajectory"]
        assert pairs[pair].tolist() == [look["t_in"], look["t_out"]]


def test_splits_are_disjoint_and_in_order() -> None:
    splits = Splits(total=40, val=4, test=6)
    train, val, test = (part_range(splits, part) for part in ("train", "val", "test"))
    assert [*train, *val, *test] == list(range(40))


@pytest.mark.parametrize("number", [0, -3, 31])
def test_impossible_number_of_trajectories_is_refused(number: int) -> None:
    with pytest.raises(ValueError, match=rf"num_trajectories={number} .*choose 1\.\.30"):
        num_train(Splits(total=40, val=4, test=6), number)


def test_rule_without_pairs_is_refused() -> None:
    with pytest.raises(ValueError, match=r"allowed_time_transitions=\(9,\) leaves no pair"):
        PairRule(max_num_time_steps=3, time_step_size=1, allowed_time_transitions=(9,)).pairs()
