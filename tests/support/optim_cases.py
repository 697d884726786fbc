"""Every registered optimizer with the options of its tests, and tensors of awkward shapes."""

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from thalweg.core_optim import registry
from thalweg.core_optim.engine.groups import COMMON
from thalweg.core_optim.engine.optimizer import CoreOptimizer
from thalweg.core_optim.engine.rule import ElementRule

Shapes = dict[str, tuple[int, ...]]
SHAPES: Shapes = {
    "odd": (5, 6),
    "vector": (7,),
    "conv": (4, 3, 2, 2),
    "short": (1, 6),
    "single": (1,),
    "even": (4, 4),
}
"""Rows that two processes cannot share evenly, one dimension, four, and fewer rows than processes."""


def written() -> list[str]:
    """Names of the registered rules whose module exists."""
    found = []
    for name, target in sorted(registry.RULES.items()):
        if importlib.util.find_spec(f"thalweg.core_optim.rules.{target.split(':')[0]}"):
            found.append(name)
    return found


def element_rules() -> list[str]:
    return [name for name in written() if isinstance(registry.rule(name), ElementRule)]


def matrix_rules() -> list[str]:
    return [name for name in written() if name not in element_rules()]


@dataclass(frozen=True)
class Case:
    """A rule with options."""

    rule: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return " ".join([self.rule, *(f"{k}={v}" for k, v in self.options.items())])


VARIANTS: dict[str, list[dict[str, Any]]] = {
    "sgd": [{"momentum": 0.9, "nesterov": True, "dampening": 0.0}],
    "adabelief": [{"rectify": False, "amsgrad": True}],
    "adamp": [{"delta": 100.0, "nesterov": True}],
    "sgdp": [{"momentum": 0.9, "delta": 0.5}],
    "sgdsai": [{"normalize": True}],
    "adammini": [{"block": "tensor"}, {"block": "full"}, {"block": "heads", "heads": 2}],
    "mars": [{"variant": "lion"}, {"first": "grad"}],
    "schedulefree_adamw": [{"warmup_steps": 3}],
    "frugal": [
        {"update_gap": 2},
        {"split": "coord", "update_gap": 2},
        {"split": "svd", "update_gap": 2, "rho": 0.5},
    ],
    "mfac": [{"num_grads": 3, "momentum": 0.9}],
    "kron": [{"merge_dims": "square"}],
    "muon": [{"nesterov": False, "adjust_lr": "match_rms_adamw"}, {"heads": 2, "ns_dtype": "fp32"}],
    "scion": [{"constrained": False}, {"norm": "RowNorm"}],
    "swan": [{"variant": "diagonal"}, {"centre": True}],
    "soap": [{"precondition_frequency": 2, "precondition_1d": True}],
}
"""Options that take other paths through a rule than its defaults."""


def cases() -> list[Case]:
    """Each rule with weight decay: as it is, with its variants, and cautious."""
    found = []
    for name in written():
        options = registry.rule(name).options
        usual: dict[str, Any] = {"weight_decay": 0.1} if "weight_decay" in options else {}
        found.append(Case(name, usual))
        found += [Case(name, {**usual, **extra}) for extra in VARIANTS.get(name, [])]
        if not options.get("cautious", COMMON["cautious"]).default and name != "schedulefree_adamw":
            found.append(Case(name, {**usual, "cautious": True}))
    return found


SPECTRAL: Shapes = {"odd": (5, 3), "vector": (3,), "even": (4, 3)}
"""Shapes of complex parameters."""


def weights(shapes: Shapes = SHAPES, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Multiples of 1/64 of at most 8 bits, which bf16 holds."""
    source = torch.Generator().manual_seed(1)
    return {k: _whole_numbers(s, source, dtype) / 64 for k, s in shapes.items()}


def gradients(step: int, shapes: Shapes = SHAPES, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The same for every process, of at most 8 bits."""
    source = torch.Generator().manual_seed(100 + step)
    return {k: _whole_numbers(s, source, dtype) / 128 for k, s in shapes.items()}


def _whole_numbers(shape: tuple[int, ...], source: torch.Generator, dtype: torch.dtype) -> Tensor:
    if dtype.is_complex:
        return torch.view_as_complex(_whole_numbers((*shape, 2), source, dtype.to_real()))
    return torch.randint(-120, 121, shape, generator=source).to(dtype)


def make(case: Case, named: Iterable[tuple[str, Tensor]], **options: Any) -> CoreOptimizer:
    """The optimizer of a case; parameters that its rule refuses are Lion's."""
    rule = registry.rule(case.rule)
    options = {**case.options, **options}
    complete = {k: o.default for k, o in {**COMMON, **rule.options}.items()} | options
    taken, rest = [], []
    for name, parameter in named:
        refused = rule.refuse(parameter, complete) or (parameter.is_complex() and case.rule in matrix_rules())
        (rest if refused else taken).append((name, parameter))
    assert taken, f"{case.label} refuses everything"
    groups: list[dict[str, Any]] = [{"params": taken}]
    if rest:
        groups.append({"params": rest, "rule": "lion"})
    return registry.create(case.rule, groups, **options)
