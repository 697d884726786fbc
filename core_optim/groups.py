"""Parameter groups from regular expressions on parameter names and from what parameters are for.

Groups are disjoint and complete: each trainable parameter lands in exactly one group, that of the first rule
that matches it, or in the group ``default``. Each group states its algorithm and all of its options.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from thalweg.core_optim.config import AlgorithmConfig, GroupRule, OptimConfig
from thalweg.core_optim.engine.groups import COMMON, complete_group
from thalweg.core_optim.engine.rule import Rule
from thalweg.core_optim.kinds import SPECIAL, kinds_of
from thalweg.core_optim.memory import state_bytes_of
from thalweg.core_optim.registry import RULES, rule

DEFAULT = "default"
"""Name of the group of parameters that no rule matches."""
OUTSIDE = "fallback"
"""What the names of groups end with that hold what an algorithm is not for."""


def parameter_groups(
    module: nn.Module, config: OptimConfig, extra_rules: Sequence[GroupRule] = ()
) -> list[dict[str, Any]]:
    """Groups for an optimizer: ``name``, ``params``, ``param_names``, ``rule`` and every option.

    Frozen parameters are left out; a tied parameter counts once and is matched under each of its names.
    Groups appear in the order of their rules and empty ones are omitted. Where an algorithm is for hidden
    matrices, the other members of its groups follow in a group of their own.

    Args:
        module: Owner of the parameters.
        config: Defaults and the user's rules, which are tried first.
        extra_rules: Rules that the module brings along, tried after those of the user.

    Raises:
        ValueError: If a rule that is not optional gets no parameter, if two rules share a name, if nothing
            is trainable, or if an algorithm or one of its options is unknown or not allowed.
    """
    rules = [*config.groups, *extra_rules]
    _check_unique(rules)
    aliases = _names_by_parameter(module)
    kinds = kinds_of(module)
    members = _assign(rules, aliases, kinds)
    by_name = {entry.name: entry for entry in rules}
    groups = []
    for name, params in members.items():
        for label, part, options in _split(name, params, by_name.get(name), config, kinds):
            group = {
                "name": label,
                "params": part,
                "param_names": [aliases[p][0] for p in part],
                **options,
            }
            groups.append(_complete(group, config))
    if not groups:
        raise ValueError(
            f"{type(module).__name__} has no trainable parameter, so there is nothing to optimise"
        )
    return groups


def _complete(group: dict[str, Any], config: OptimConfig) -> dict[str, Any]:
    if config.name in RULES:
        return complete_group(group, config.name, {}, "group", {})
    # an optimizer without gradients has one algorithm, and of the options only these by group
    return {k: v for k, v in group.items() if k in ("name", "params", "param_names", "lr", "weight_decay")}


def describe(groups: Sequence[Mapping[str, Any]]) -> str:
    """Table of the groups for people: size, algorithm, rates and state, one line per group and a total."""
    header = ("group", "tensors", "parameters", "lr", "weight_decay", "rule", "state")
    rows = [
        (
            str(g.get("name", number)),
            str(len(g["params"])),
            f"{_count(g):,}",
            # LambdaLR keeps the peak in initial_lr and overwrites lr with the current value.
            f"{float(g.get('initial_lr', g['lr'])):g}",
            f"{g['weight_decay']:g}" if "weight_decay" in g else "",
            str(g.get("rule", "")),
            human(state_bytes_of(g)) if "rule" in g else "",
        )
        for number, g in enumerate(groups)
    ]
    tensors = sum(len(g["params"]) for g in groups)
    state = human(sum(state_bytes_of(g) for g in groups)) if all("rule" in g for g in groups) else ""
    total = ("total", str(tensors), f"{sum(map(_count, groups)):,}", "", "", "", state)
    table = [header, *rows, total]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    lines = (
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
        for row in table
    )
    return "\n".join(line.rstrip() for line in lines)


def human(size: float) -> str:
    """Bytes in the largest unit that leaves a number above 1."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024.0:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024.0
    return f"{size:.1f} TiB"


def _count(group: Mapping[str, Any]) -> int:
    return sum(p.numel() for p in group["params"])


def _assign(
    rules: Sequence[GroupRule], aliases: dict[nn.Parameter, list[str]], kinds: Mapping[Tensor, set[str]]
) -> dict[str, list[nn.Parameter]]:
    """Trainable parameters per rule, then those of no rule; frozen ones count as matched."""
    members: dict[str, list[nn.Parameter]] = {}
    claimed: set[nn.Parameter] = set()
    for entry in rules:
        matching = [
            p
            for p, names in aliases.items()
            if any(re.search(entry.pattern, n) for n in names)
            and (entry.kind is None or entry.kind in kinds[p])
        ]
        fresh = [p for p in matching if p not in claimed]
        if not fresh and not entry.optional:
            raise ValueError(_unused(entry, rules, bool(matching), aliases))
        claimed.update(fresh)
        members[entry.name] = [p for p in fresh if p.requires_grad]
    members[DEFAULT] = [p for p in aliases if p not in claimed and p.requires_grad]
    return members


def _split(
    name: str,
    params: list[nn.Parameter],
    entry: GroupRule | None,
    config: OptimConfig,
    kinds: Mapping[Tensor, set[str]],
) -> list[tuple[str, list[nn.Parameter], dict[str, Any]]]:
    """A group, and what its algorithm is not for; parts without members are left out."""
    options = _options(entry, config)
    known = options.get("rule", config.name)
    found = None if known == config.name and known not in RULES else rule(known)
    # a group whose algorithm was chosen by hand gets exactly that
    if found is None or found.outside is None or (entry is not None and entry.rule is not None):
        return [(name, params, options)] if params else []
    complete = complete_group({"params": [], **options}, known, {}, f"group {name!r}", {})
    inside = [p for p in params if _is_hidden(p, kinds[p], found, complete)]
    rest = [p for p in params if p not in set(inside)]
    outside = {**options, **found.outside} if found.outside else _fallback(config.fallback, config.options)
    if not found.outside and entry is not None and entry.weight_decay is not None:
        outside["weight_decay"] = entry.weight_decay
    parts = [(name, inside, options), (f"{name}_{OUTSIDE}", rest, outside)]
    return [part for part in parts if part[1]]


def _is_hidden(parameter: Tensor, kinds: set[str], found: Rule, options: Mapping[str, Any]) -> bool:
    return not kinds & SPECIAL and found.refuse(parameter, options) is None and not parameter.is_complex()


def _options(entry: GroupRule | None, config: OptimConfig) -> dict[str, Any]:
    """Options of a group as the config gives them; those of another algorithm start from its defaults."""
    own = entry.rule if entry is not None else None
    if own in (None, config.name):
        found = _given(config, config.name)
    else:
        found = {"rule": own, **_common(config.options)}
    return {**found, **(_given(entry, found["rule"]) if entry is not None else {})}


def _fallback(config: AlgorithmConfig, options: Mapping[str, Any]) -> dict[str, Any]:
    return {**_common(options), **_given(config, config.name)}


def _given(source: AlgorithmConfig | GroupRule, name: str) -> dict[str, Any]:
    """What a part of the configuration says about an algorithm."""
    values = {key: getattr(source, key) for key in ("lr", "weight_decay", "betas", "eps")}
    said = {k: v for k, v in values.items() if v is not None and not _needless(k, v, name)}
    return {"rule": name, **said, **source.options}


def _common(options: Mapping[str, Any]) -> dict[str, Any]:
    """Of some options those that every algorithm has."""
    return {key: value for key, value in options.items() if key in COMMON}


def _needless(key: str, value: Any, name: str) -> bool:
    """Whether it says no decay to an algorithm that has none."""
    return key == "weight_decay" and value == 0.0 and name in RULES and key not in rule(name).options


def _names_by_parameter(module: nn.Module) -> dict[nn.Parameter, list[str]]:
    """All names of each parameter in definition order; a tied parameter has several."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return names


def _check_unique(rules: Sequence[GroupRule]) -> None:
    seen = {DEFAULT}
    for entry in rules:
        if entry.name in seen:
            kind = "reserved for what no rule matches" if entry.name == DEFAULT else "used by two rules"
            raise ValueError(f"group name {entry.name!r} is {kind}; give each rule a name of its own")
        seen.add(entry.name)


def _unused(
    entry: GroupRule, rules: Sequence[GroupRule], matches: bool, aliases: dict[nn.Parameter, list[str]]
) -> str:
    what = " and ".join(
        f"{key} {value!r}" for key, value in (("pattern", entry.pattern), ("kind", entry.kind)) if value
    )
    start = f"group rule {entry.name!r} ({what}) "
    if matches:
        earlier = ", ".join(repr(r.name) for r in rules[: rules.index(entry)])
        return f"{start}matches only parameters that earlier rules took ({earlier}); reorder or remove it"
    examples = ", ".join(names[0] for names in list(aliases.values())[:3])
    return f"{start}matches no parameter; names look like {examples}; fix it or mark it optional"
