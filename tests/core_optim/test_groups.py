"""Groups are disjoint, complete and in the order of their rules, for any rules."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from thalweg.core_optim.config import GroupRule, OptimConfig
from thalweg.core_optim.groups import describe, parameter_groups


class Net(nn.Module):
    """Embedding tied to the head, a norm, a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.head = nn.Linear(4, 5)
        self.head.weight = self.embed.weight


def names(groups: list[dict]) -> dict[str, list[str]]:
    return {group["name"]: group["param_names"] for group in groups}


def test_first_matching_rule_wins_and_the_rest_is_default() -> None:
    rules = [GroupRule(name="norm", pattern=r"body\.1\."), GroupRule(name="bias", pattern=r"bias$")]
    assert names(parameter_groups(Net(), OptimConfig(groups=rules))) == {
        "norm": ["body.1.weight", "body.1.bias"],
        "bias": ["body.0.bias", "head.bias"],
        "default": ["embed.weight", "body.0.weight"],
    }


def test_user_rules_come_before_those_of_the_module() -> None:
    own = [GroupRule(name="mine", pattern="head", lr=1.0)]
    module_rules = [GroupRule(name="bias", pattern="bias")]
    found = names(parameter_groups(Net(), OptimConfig(groups=own), module_rules))
    assert "head.bias" in found["mine"]
    assert "head.bias" not in found["bias"]


def test_tied_parameter_counts_once_and_matches_under_each_name() -> None:
    rules = [GroupRule(name="head", pattern=r"^head\.weight$")]
    assert names(parameter_groups(Net(), OptimConfig(groups=rules)))["head"] == ["embed.weight"]


def test_frozen_parameters_are_left_out_and_may_leave_a_rule_empty() -> None:
    groups = parameter_groups(Net(), OptimConfig(groups=[GroupRule(name="cold", pattern="frozen")]))
    assert list(names(groups)) == ["default"]
    assert not any("frozen" in name for name in names(groups)["default"])


def test_each_group_states_all_hyperparameters() -> None:
    rule = GroupRule(name="bias", pattern="bias", lr=0.1, betas=(0.5, 0.6))
    config = OptimConfig(lr=0.2, weight_decay=0.3, eps=1e-6, groups=[rule])
    bias, default = parameter_groups(Net(), config)
    keys = ("lr", "weight_decay", "betas", "eps")
    assert [bias[k] for k in keys] == [0.1, 0.3, (0.5, 0.6), 1e-6]
    assert [default[k] for k in keys] == [0.2, 0.3, (0.9, 0.999), 1e-6]


def test_a_zero_of_a_rule_is_a_value_and_no_gap() -> None:
    rule = GroupRule(name="bias", pattern="bias", lr=0.0, weight_decay=0.0)
    (bias, _) = parameter_groups(Net(), OptimConfig(lr=1.0, weight_decay=1.0, groups=[rule]))
    assert (bias["lr"], bias["weight_decay"]) == (0.0, 0.0)


@settings(deadline=None)
@given(
    patterns=st.lists(st.sampled_from(["bias", "weight", "body", "head", "^e", r"\.0\.", "x"]), max_size=5)
)
def test_groups_are_disjoint_and_complete(patterns: list[str]) -> None:
    net = Net()
    rules = [GroupRule(name=f"g{i}", pattern=p, optional=True) for i, p in enumerate(patterns)]
    members = [p for g in parameter_groups(net, OptimConfig(groups=rules)) for p in g["params"]]
    assert len(members) == len(set(members))
    assert set(members) == {p for p in net.parameters() if p.requires_grad}


def test_rule_without_parameters_is_named_unless_optional() -> None:
    typo = GroupRule(name="norms", pattern="layernom")
    with pytest.raises(
        ValueError, match=r"'norms' \(pattern 'layernom'\) matches no parameter; .*embed\.weight"
    ):
        parameter_groups(Net(), OptimConfig(groups=[typo]))
    shadowed = [GroupRule(name="all", pattern="."), GroupRule(name="bias", pattern="bias")]
    with pytest.raises(ValueError, match=r"'bias'.* matches only parameters that earlier rules took"):
        parameter_groups(Net(), OptimConfig(groups=shadowed))
    optional = GroupRule(name="norms", pattern="layernom", optional=True)
    assert list(names(parameter_groups(Net(), OptimConfig(groups=[optional])))) == ["default"]


def test_names_of_groups_are_unique() -> None:
    twice = [GroupRule(name="a", pattern="bias"), GroupRule(name="a", pattern="weight")]
    with pytest.raises(ValueError, match="group name 'a' is used by two rules"):
        parameter_groups(Net(), OptimConfig(groups=twice))
    with pytest.raises(ValueError, match="'default' is reserved"):
        parameter_groups(Net(), OptimConfig(groups=[GroupRule(name="default", pattern="bias")]))


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(ValueError, match="Linear has no trainable parameter"):
        parameter_groups(nn.Linear(2, 2).requires_grad_(False), OptimConfig())


def test_table_counts_tensors_and_parameters_and_keeps_the_peak_rate() -> None:
    groups = parameter_groups(
        nn.Linear(10, 200), OptimConfig(lr=0.5, groups=[GroupRule(name="bias", pattern="bias", lr=2.0)])
    )
    optimizer = torch.optim.AdamW(groups)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    lines = [line.split() for line in describe(optimizer.param_groups).splitlines()]
    assert lines[1][:4] == ["bias", "1", "200", "2"]
    assert lines[2][:4] == ["default", "1", "2,000", "0.5"]
    assert lines[1][5:] == ["adamw", "1.6", "KiB"]  # two moments of 200 numbers, and a count
    assert lines[3][:3] == ["total", "2", "2,200"]
