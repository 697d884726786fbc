"""Parameter groups from regular expressions on parameter names.

Groups are disjoint and complete: each trainable parameter lands in exactly one group, that of the first rule
that matches it, or in the group ``default``. Each group states all of its hyper-parameters.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from thalweg.core_optim.config import GroupRule, OptimConfig

DEFAULT = "default"
"""Name of the group of parameters that no rule matches."""


def parameter_groups(
    module: nn.Module, config: OptimConfig, extra_rules: Sequence[GroupRule] = ()
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer: ``name``, ``params``, ``param_names`` and every hyper-parameter.

    Frozen parameters are left out; a tied parameter counts once and is matched under each of its names.
    Groups appear in the order of their rules and empty ones are omitted.

    Args:
        module: Owner of the parameters.
        config: Defaults and the user's rules, which are tried first.
        extra_rules: Rules that the module brings along, tried after those of the user.

    Raises:
        ValueError: If a rule that is not optional gets no parameter, if two rules share a name, or if nothing
            is trainable.
    """
    rules = [*config.groups, *extra_rules]
    _check_unique(rules)
    aliases = _names_by_parameter(module)
    members = _assign(rules, aliases)
    by_name = {rule.name: rule for rule in rules}
    groups = [
        {
            "name": name,
            "params": params,
            "param_names": [aliases[p][0] for p in params],
            **_hyperparameters(by_name.get(name), config),
        }
        for name, params in members.items()
        if params
    ]
    if not groups:
        raise ValueError(
            f"{type(module).__name__} has no trainable parameter, so there is nothing to optimise"
        )
    return groups


def describe(groups: Sequence[dict[str, Any]]) -> str:
    """Table of the groups for people: size and hyper-parameters, one line per group and a total."""
    header = ("group", "tensors", "parameters", "lr", "weight_decay", "betas", "eps")
    rows = [
        (
            str(g["name"]),
            str(len(g["params"])),
            f"{sum(p.numel() for p in g['params']):,}",
            # LambdaLR keeps the peak in initial_lr and overwrites lr with the current value.
            f"{g.get('initial_lr', g['lr']):g}",
            f"{g['weight_decay']:g}",
            ", ".join(f"{b:g}" for b in g["betas"]),
            f"{g['eps']:g}",
        )
        for g in groups
    ]
    tensors = sum(len(g["params"]) for g in groups)
    parameters = sum(p.numel() for g in groups for p in g["params"])
    table = [header, *rows, ("total", str(tensors), f"{parameters:,}", "", "", "", "")]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    lines = (
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
        for row in table
    )
    return "\n".join(line.rstrip() for line in lines)


def _assign(
    rules: Sequence[GroupRule], aliases: dict[nn.Parameter, list[str]]
) -> dict[str, list[nn.Parameter]]:
    """Trainable parameters per rule, then those of no rule; frozen ones count as matched."""
    members: dict[str, list[nn.Parameter]] = {}
    claimed: set[nn.Parameter] = set()
    for rule in rules:
        matching = [p for p, names in aliases.items() if any(re.search(rule.pattern, n) for n in names)]
        fresh = [p for p in matching if p not in claimed]
        if not fresh and not rule.optional:
            raise ValueError(_unused(rule, rules, bool(matching), aliases))
        claimed.update(fresh)
        members[rule.name] = [p for p in fresh if p.requires_grad]
    members[DEFAULT] = [p for p in aliases if p not in claimed and p.requires_grad]
    return members


def _names_by_parameter(module: nn.Module) -> dict[nn.Parameter, list[str]]:
    """All names of each parameter in definition order; a tied parameter has several."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return names


def _hyperparameters(rule: GroupRule | None, config: OptimConfig) -> dict[str, Any]:
    def pick(own: Any, default: Any) -> Any:
        return default if own is None else own

    return {
        "lr": pick(rule and rule.lr, config.lr),
        "weight_decay": pick(rule and rule.weight_decay, config.weight_decay),
        "betas": tuple(pick(rule and rule.betas, config.betas)),
        "eps": pick(rule and rule.eps, config.eps),
    }


def _check_unique(rules: Sequence[GroupRule]) -> None:
    seen = {DEFAULT}
    for rule in rules:
        if rule.name in seen:
            kind = "reserved for what no rule matches" if rule.name == DEFAULT else "used by two rules"
            raise ValueError(f"group name {rule.name!r} is {kind}; give each rule a name of its own")
        seen.add(rule.name)


def _unused(
    rule: GroupRule, rules: Sequence[GroupRule], matches: bool, aliases: dict[nn.Parameter, list[str]]
) -> str:
    start = f"group rule {rule.name!r} (pattern {rule.pattern!r}) "
    if matches:
        earlier = ", ".join(repr(r.name) for r in rules[: rules.index(rule)])
        return f"{start}matches only parameters that earlier rules took ({earlier}); reorder or remove it"
    examples = ", ".join(names[0] for names in list(aliases.values())[:3])
    return f"{start}matches no parameter; names look like {examples}; fix it or mark it optional"
