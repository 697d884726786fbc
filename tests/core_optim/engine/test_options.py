"""Options are checked where they are given, and errors name the group, its parameters and what is allowed."""

from typing import Any

import pytest
import torch
from optim_cases import Case, make, weights, written
from torch import Tensor, nn

from thalweg.core_optim import registry
from thalweg.core_optim.engine.groups import COMMON
from thalweg.core_optim.engine.optimizer import CoreOptimizer
from thalweg.core_optim.engine.rule import DECAYS


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape or (2, 3)))


WRONG: list[Any] = [-1.0, float("nan"), float("inf"), "much", True, None, [0.1], torch.ones(2)]


@pytest.mark.parametrize("value", WRONG, ids=str)
@pytest.mark.parametrize("rule", written())
def test_rates_are_checked(rule: str, value: Any) -> None:
    with pytest.raises(ValueError, match=r"lr is .*, allowed: a number >= 0"):
        registry.create(rule, [parameter()], lr=value)


@pytest.mark.parametrize("rule", written())
def test_defaults_are_allowed_and_checked_again_as_given(rule: str) -> None:
    options = {**COMMON, **registry.rule(rule).options}
    given = {name: option.default for name, option in options.items()}
    group = registry.create(rule, [parameter()], **given).param_groups[0]
    for name, value in given.items():
        assert group[name] == value
        assert type(group[name]) is type(value)


@pytest.mark.parametrize("rule", written())
def test_every_option_refuses_nonsense(rule: str) -> None:
    for name, option in {**COMMON, **registry.rule(rule).options}.items():
        with pytest.raises(ValueError, match=f"{name} is <object .*, allowed: ") as caught:
            registry.create(rule, [parameter()], **{name: object()})
        assert option.check.allowed in str(caught.value)


@pytest.mark.parametrize("rule", written())
def test_unknown_options_are_refused_with_those_there_are(rule: str) -> None:
    title = registry.rule(rule).title
    with pytest.raises(ValueError, match=f"^{title}: option 'learning_rate' is unknown, allowed: lr, "):
        registry.create(rule, [parameter()], learning_rate=0.1)


def test_group_and_parameters_are_named() -> None:
    groups = [
        {"params": [("a.weight", parameter())]},
        {"params": [(f"b.{i}", parameter()) for i in range(5)], "weight_decay": -2.0},
    ]
    message = r"^group 1 \(adamw: b\.0, b\.1, b\.2, \.\.\.\): weight_decay is -2\.0, allowed: a number >= 0$"
    with pytest.raises(ValueError, match=message):
        registry.create("adamw", groups)
    groups[1] |= {"name": "heads", "weight_decay": 0.0, "momentum": 0.9}
    with pytest.raises(ValueError, match=r"^group 1 'heads' \(adamw: b\.0.*: option 'momentum' is unknown"):
        registry.create("adamw", groups)


def test_added_groups_are_checked_and_left_out_if_wrong() -> None:
    optimizer = registry.create("adamw", [parameter()])
    heads = {"rule": "adammini", "block": "heads", "heads": 5}
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"betas": (0.9, 1.0)}, r"group 1 \(adamw\): betas is \(0\.9, 1\.0\)"),
        ({"rule": "adamx"}, "optimizer 'adamx' is unknown"),
        (heads, r"group 1 \(adammini\), parameter number 0 of shape \(2, 3\): .*5 heads"),
    ]
    for options, message in wrong:
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group({"params": [parameter()], **options})
        assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [parameter()], "rule": "lion", "lr": 0.5})
    assert optimizer.param_groups[1]["lr"] == 0.5
    assert optimizer.param_groups[1]["betas"] == (0.9, 0.99)


@pytest.mark.parametrize(
    ("given", "near"), [("adam", "adamw"), ("AdamW", "adamw"), ("moun", "muon"), ("lions", "lion")]
)
def test_near_names_are_offered(given: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"optimizer '{given}' is unknown, allowed: .*did you mean .*{near}"):
        registry.create(given, [parameter()])
    with pytest.raises(ValueError, match=f"optimizer '{given}' is unknown"):
        registry.create("sgd", [{"params": [parameter()], "rule": given}])


@pytest.mark.parametrize("betas", [[0.5, 0.75], (0.5, 0.75)])
def test_betas_may_be_a_list_as_yaml_gives_them(betas: Any) -> None:
    optimizer = registry.create("adamw", [parameter()], betas=betas)
    assert optimizer.param_groups[0]["betas"] == (0.5, 0.75)


@pytest.mark.parametrize(
    "betas", [(0.9,), (0.9, 0.99, 0.999), 0.9, (0.9, 1.0), (-0.1, 0.9), ("a", "b"), None]
)
def test_betas_are_two_numbers_below_one(betas: Any) -> None:
    with pytest.raises(ValueError, match=r"AdamW: betas is .*, allowed: two numbers in \[0, 1\)"):
        registry.create("adamw", [parameter()], betas=betas)


def test_integers_are_taken_for_numbers_but_not_numbers_for_integers() -> None:
    assert registry.create("adamw", [parameter()], lr=1, weight_decay=0).param_groups[0]["lr"] == 1.0
    with pytest.raises(ValueError, match=r"heads is 1\.0, allowed: an integer >= 1"):
        registry.create("adammini", [parameter()], heads=1.0)


def test_ways_of_decay_are_named() -> None:
    with pytest.raises(ValueError, match="decay is 'late', allowed: none or coupled, decoupled, after"):
        registry.create("adamw", [parameter()], decay="late")
    for way in DECAYS:
        registry.create("adamw", [parameter()], decay=way)


def test_what_schedule_free_weights_cannot_have_is_refused() -> None:
    for options, message in (
        ({"cautious": True}, "cautious is True, allowed: false"),
        ({"decay": "after"}, "decay is 'after', allowed: none"),
        ({"betas": (0.0, 0.9)}, r"betas\[0\] is 0.0, allowed: a number > 0"),
    ):
        with pytest.raises(ValueError, match=message):
            registry.create("schedulefree_adamw", [parameter()], **options)


@pytest.mark.parametrize("rule", written())
def test_sparse_gradients_are_refused_before_anything_moves(rule: str) -> None:
    named = [("dense", parameter(4, 4)), ("sparse", parameter(4, 4))]
    optimizer = make(Case(rule), named)
    named[0][1].grad = torch.ones(4, 4)
    named[1][1].grad = torch.ones(4, 4).to_sparse()
    with pytest.raises(
        ValueError, match=r"does not take sparse gradients \(sparse\): build the embedding with"
    ):
        optimizer.step()
    for _, p in named:
        assert torch.equal(p, torch.ones(4, 4))
        assert not optimizer.state[p] or optimizer.state[p]["step"] == 0


def test_groups_of_other_rules_do_not_inherit_options() -> None:
    groups = [{"params": [parameter()]}, {"params": [parameter()], "rule": "lion"}]
    optimizer = registry.create("adamw", groups, lr=0.5, betas=(0.1, 0.2), cautious=True)
    first, second = optimizer.param_groups
    assert (first["lr"], first["betas"], first["cautious"]) == (0.5, (0.1, 0.2), True)
    assert (second["lr"], second["betas"], second["cautious"]) == (1e-4, (0.9, 0.99), True)
    assert "eps" not in second


def test_groups_with_own_options_keep_them() -> None:
    groups = [{"params": [parameter()], "lr": 0.1}, {"params": [parameter()]}]
    optimizer = registry.create("adamw", groups, lr=0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.5]


def test_what_the_user_passed_is_not_changed() -> None:
    group = {"params": [parameter()], "lr": 0.1}
    before = dict(group)
    registry.create("adamw", [group])
    assert group == before


def test_rate_may_come_by_position_and_other_options_only_by_name() -> None:
    cls = registry.optimizer_class("adamw")
    assert cls([parameter()], 0.25).param_groups[0]["lr"] == 0.25
    with pytest.raises(TypeError):
        cls([parameter()], 0.25, (0.9, 0.99))


def test_torch_refusals_hold() -> None:
    p = parameter()
    with pytest.raises(ValueError, match="empty parameter list"):
        registry.create("adamw", [])
    with pytest.raises(ValueError, match="more than one parameter group"):
        registry.create("adamw", [{"params": [p]}, {"params": [p]}])
    with pytest.raises(ValueError, match="non-leaf"):
        registry.create("adamw", [p * 2])
    with pytest.raises(TypeError):
        registry.create("adamw", p)


def test_optimizer_without_a_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="no rule is given"):
        CoreOptimizer([parameter()])


def test_names_of_parameters_appear_in_refusals() -> None:
    with pytest.raises(ValueError, match=r"group 0 \(frugal\), parameter bias of shape \(3,\): split: svd"):
        registry.create("frugal", [("bias", parameter(3))], split="svd")


def test_repr_shows_rule_and_options() -> None:
    text = repr(registry.create("lion", [parameter()], lr=0.125))
    assert "Lion (" in text
    assert "rule: lion" in text
    assert "lr: 0.125" in text


def test_signatures_list_every_option() -> None:
    import inspect

    for rule in written():
        found = inspect.signature(registry.optimizer_class(rule)).parameters
        assert {*registry.rule(rule).options, *COMMON, "params", "foreach", "compile", "seed"} <= set(found)
        assert found["lr"].default == registry.rule(rule).options["lr"].default


def test_weights_of_the_cases_are_exact_in_bf16() -> None:
    for value in weights().values():
        assert isinstance(value, Tensor)
        assert torch.equal(value.bfloat16().float(), value)
