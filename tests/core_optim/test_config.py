"""A config file becomes an OptimConfig, and wrong values are named."""

import dataclasses

import pytest
from jsonargparse import ArgumentError, ArgumentParser

from thalweg.core_optim.config import GroupRule, OptimConfig, ScheduleConfig


def parse(**optim: object) -> OptimConfig:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--optim", type=OptimConfig, default=OptimConfig())
    return parser.instantiate(parser.parse_object({"optim": optim})).optim


def test_yaml_like_tree_becomes_nested_dataclasses() -> None:
    config = parse(
        lr=1e-3,
        betas=[0.9, 0.95],
        schedule={"name": "wsd", "warmup_ratio": 0.05},
        groups=[{"name": "bias", "pattern": "bias", "weight_decay": 0.0}],
    )
    assert config == OptimConfig(
        lr=1e-3,
        betas=(0.9, 0.95),
        schedule=ScheduleConfig(name="wsd", warmup_ratio=0.05),
        groups=[GroupRule(name="bias", pattern="bias", weight_decay=0.0)],
    )


def test_unknown_key_is_refused() -> None:
    with pytest.raises(ArgumentError, match="learning_rate"):
        parse(learning_rate=1e-3)


def test_configs_are_frozen_and_keyword_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        OptimConfig().lr = 1.0  # type: ignore[misc]
    with pytest.raises(TypeError):
        ScheduleConfig("cosine")  # type: ignore[misc]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OptimConfig(lr=-1.0), "optimizer 'adamw': lr is -1.0, allowed: a number >= 0"),
        (lambda: OptimConfig(betas=(0.9, 1.0)), r"betas is \(0.9, 1.0\), allowed: two numbers in \[0, 1\)"),
        (lambda: OptimConfig(eps=0.0), "eps is 0.0"),
        (lambda: GroupRule(name="a", pattern="x", weight_decay=-0.1), "group rule 'a': weight_decay is -0.1"),
        (
            lambda: GroupRule(name="a", pattern="("),
            "group rule 'a': pattern '\\(' is not a regular expression",
        ),
        (lambda: GroupRule(name="", pattern="x"), "name is ''"),
        (lambda: ScheduleConfig(warmup_ratio=1.5), "schedule 'cosine': warmup_ratio is 1.5"),
        (lambda: ScheduleConfig(warmup_steps=-1), "warmup_steps is -1"),
        (lambda: ScheduleConfig(warmup_steps=5, warmup_ratio=0.1), "exclude each other"),
    ],
)
def test_errors_name_owner_value_and_what_is_allowed(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]
