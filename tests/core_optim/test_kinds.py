"""What parameters are for, in the networks of the suite, and the groups that follow from it."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from poseidon_runs import scot
from torch import nn

from thalweg.core_optim.build import build
from thalweg.core_optim.config import FallbackConfig, GroupRule, OptimConfig, ScheduleConfig
from thalweg.core_optim.groups import parameter_groups
from thalweg.core_optim.kinds import SPECIAL, kinds_of

CONSTANT = ScheduleConfig(name="constant")


class Attention(nn.Module):
    """A block of a transformer with a fused projection."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.qkv = nn.Linear(6, 18)
        self.out = nn.Linear(6, 6, bias=False)


class Language(nn.Module):
    """Embedding, two blocks, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 6)
        self.positions = nn.Parameter(torch.zeros(4, 6))
        self.project = nn.Linear(6, 6)
        self.blocks = nn.ModuleList([Attention(), Attention()])
        self.head = nn.Linear(6, 11, bias=False)


def named_kinds(module: nn.Module) -> dict[str, set[str]]:
    kinds = kinds_of(module)
    return {name: kinds[parameter] for name, parameter in module.named_parameters()}


def test_kinds_come_from_modules() -> None:
    found = named_kinds(Language())
    assert found["tokens.weight"] == {"embedding", "matrix"}
    assert found["blocks.0.norm.weight"] == {"norm", "vector"}
    assert found["blocks.0.qkv.weight"] == {"matrix"}
    assert found["blocks.0.qkv.bias"] == {"bias", "vector"}
    assert found["head.weight"] == {"head", "matrix"}
    assert found["project.weight"] == {"embedding", "matrix"}  # the first linear map


def test_tied_weights_are_all_that_their_places_are() -> None:
    net = Language()
    net.head.weight = net.tokens.weight
    assert named_kinds(net)["tokens.weight"] == {"embedding", "head", "matrix"}


def test_conditional_norms_and_ends_of_the_operator_transformer() -> None:
    found = named_kinds(scot())
    assert "norm" in found["embeddings.norm.weight.weight"]
    assert {"embedding", "conv"} <= found["embeddings.patch_embeddings.projection.weight"]
    assert any("head" in kinds for name, kinds in found.items() if "patch_recovery" in name)
    hidden = [name for name, kinds in found.items() if not kinds & SPECIAL]
    assert any("attention" in name for name in hidden)
    assert not any("patch_recovery" in name or "patch_embed" in name for name in hidden)


def test_low_rank_adapters_of_peft() -> None:
    net = get_peft_model(Language(), LoraConfig(r=2, target_modules=["qkv"]))
    rules = [
        GroupRule(name="a", kind="lora_a", weight_decay=0.0),
        GroupRule(name="b", kind="lora_b", lr=16.0),
    ]
    a, b = parameter_groups(net, OptimConfig(lr=1.0, groups=rules))
    assert [len(a["params"]), len(b["params"])] == [2, 2]
    assert all("lora_A" in name for name in a["param_names"])
    assert (b["lr"], a["lr"]) == (16.0, 1.0)


def test_hidden_matrices_go_to_muon_and_the_rest_to_the_fallback() -> None:
    config = OptimConfig(name="muon", lr=0.02, weight_decay=0.1, fallback=FallbackConfig(lr=3e-3))
    groups = {g["name"]: g for g in parameter_groups(Language(), config)}
    assert groups["default"]["param_names"] == [
        "blocks.0.qkv.weight", "blocks.0.out.weight", "blocks.1.qkv.weight", "blocks.1.out.weight"
    ]  # fmt: skip
    assert (groups["default"]["rule"], groups["default"]["lr"]) == ("muon", 0.02)
    rest = groups["default_fallback"]
    assert (rest["rule"], rest["lr"], rest["weight_decay"]) == ("adamw", 3e-3, 0.0)
    assert {"tokens.weight", "head.weight", "project.weight", "positions"} <= set(rest["param_names"])


def test_frugal_splits_hidden_matrices_only() -> None:
    groups = {g["name"]: g for g in parameter_groups(Language(), OptimConfig(name="frugal", lr=0.1))}
    assert groups["default"]["proj"] is True
    assert groups["default_fallback"]["proj"] is False
    assert groups["default_fallback"]["lr"] == 0.1


def test_groups_mix_algorithms_in_one_optimizer() -> None:
    """One state dict, one schedule; each group with the options of its own algorithm."""
    rules = [
        GroupRule(name="heads", pattern="qkv.weight", rule="muon", lr=0.02, options={"heads": 3}),
        GroupRule(name="lookup", kind="embedding", rule="lion", lr=1e-4),
    ]
    config = OptimConfig(lr=1e-3, options={"cautious": True}, groups=rules, schedule=CONSTANT)
    optimizer = build(Language(), config, None)["optimizer"]
    found = {g["name"]: g for g in optimizer.param_groups}
    assert [found[n]["rule"] for n in ("heads", "lookup", "default")] == ["muon", "lion", "adamw"]
    assert found["heads"]["heads"] == 3
    assert found["lookup"]["betas"] == (0.9, 0.99)
    assert all(group["cautious"] for group in optimizer.param_groups)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (OptimConfig(name="soap", options={"precondition_freq": 3}), "did you mean precondition_frequency"),
        (OptimConfig(name="lion", eps=1e-6), "option 'eps' is unknown"),
        (OptimConfig(groups=[GroupRule(name="x", kind="lora_a")]), r"'x' \(kind 'lora_a'\) matches no"),
        (OptimConfig(groups=[GroupRule(name="x", kind="norm", rule="loin")]), "did you mean lion"),
        (OptimConfig(name="mezo", betas=(0.9, 0.9)), "'mezo' has no betas"),
        (OptimConfig(name="mezo", options={"num_direction": 2}), "'num_direction' is unknown"),
    ],
)
def test_mistakes_are_named(config: OptimConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(Language(), OptimConfig(**{**vars(config), "schedule": CONSTANT}), None)


def test_a_rule_selects_something() -> None:
    with pytest.raises(ValueError, match=r"neither a pattern nor a kind \(allowed: norm, bias"):
        GroupRule(name="all")
