"""Parameter groups of the core optimizer: which options they have, completed and checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from thalweg.core_optim.engine.options import FLAG, NONE, Option, choice, either, resolve
from thalweg.core_optim.engine.rule import DECAYS

COMMON: dict[str, Option] = {
    "maximize": Option(False, FLAG, "ascend instead of descend"),
    "decay": Option(
        None,
        either(NONE, choice(*DECAYS)),
        "how weight decay enters; the algorithm's own way if not given",
    ),
    "cautious": Option(False, FLAG, "drop the entries of an update that the gradient opposes"),
    "state_dtype": Option(
        None,
        either(NONE, choice("bfloat16", "parameter")),
        "dtype of the moments: the parameter's, or fp32 for half precision, if not given",
    ),
    "stochastic_rounding": Option(False, FLAG, "round bf16 parameters and states stochastically"),
    "complex": Option(
        "real",
        choice("real", "modulus"),
        "second moments of real and imaginary part apart, or of the modulus",
    ),
}
"""Options that every algorithm has."""

LABELS = ("params", "param_names", "name", "rule", "initial_lr")
"""Keys of a group that are not options."""


def plain(number: Any) -> float:
    """A number out of a 0-d CPU tensor or a number."""
    return float(number)


def complete_group(
    group: Mapping[str, Any],
    own_rule: str,
    own_options: Mapping[str, Any],
    owner: str,
    current: Mapping[str, Any],
) -> dict[str, Any]:
    """A group with its rule and all of its options.

    Args:
        group: What the user wrote.
        own_rule: Rule of the optimizer.
        own_options: Options the optimizer was made with; a group with another rule does not inherit them.
        owner: The group, for messages.
        current: Defaults of the optimizer, which schedulers and users may have changed.

    Raises:
        ValueError: For an unknown rule or option, or a value that is not allowed.
    """
    from thalweg.core_optim.registry import rule as lookup

    name = group.get("rule", own_rule)
    rule = lookup(name)
    options = {**rule.options, **{k: v for k, v in COMMON.items() if k not in rule.options}}
    given = {k: v for k, v in group.items() if k not in LABELS}
    label = f"{owner} {group['name']!r}" if "name" in group else owner
    inherited = {k: v for k, v in own_options.items() if name == own_rule or k in COMMON}
    changed = {k: current[k] for k in options if k in current} if name == own_rule else {}
    text = f"{label} ({name}{_members(group)})" if owner.startswith("group") else owner
    found = resolve(text, options, {**inherited, **changed, **given})
    return {**{k: v for k, v in group.items() if k in LABELS}, "rule": name, **found}


def _members(group: Mapping[str, Any]) -> str:
    """Names of the first parameters of a group, for messages."""
    names = list(group.get("param_names", ()))
    params = group["params"]
    if not names and isinstance(params, list | tuple):
        names = [p[0] for p in params if isinstance(p, tuple)]
    if not names:
        return ""
    return f": {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"


def fill_missing(groups: list[dict[str, Any]], before: list[dict[str, Any]]) -> None:
    """Give loaded groups the keys that a checkpoint of another version or of torch's own class lacks."""
    for group, old in zip(groups, before):
        for key, value in old.items():
            if key not in group or (group[key] is None and value is not None and key not in COMMON):
                group[key] = value
        for key in [k for k in group if k in _OF_TORCH and k not in old]:
            del group[key]
        if "betas" in group and isinstance(group["betas"], list):
            group["betas"] = tuple(group["betas"])


_OF_TORCH = ("amsgrad", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay")
