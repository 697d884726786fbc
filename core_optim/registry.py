"""Every optimizer by name: rules as strings, imported when asked for, and the classes made of them."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
from collections.abc import Iterable
from typing import Any

from thalweg.core_optim.engine.groups import COMMON
from thalweg.core_optim.engine.optimizer import CoreOptimizer
from thalweg.core_optim.engine.rule import Rule

RULES: dict[str, str] = {
    "sgd": "sgd:SGD",
    "adamw": "adamw:AdamW",
    "nadamw": "nadamw:NAdamW",
    "cadamw": "adamw:CAdamW",
    "adabelief": "adabelief:AdaBelief",
    "diffgrad": "diffgrad:DiffGrad",
    "adamp": "projected:AdamP",
    "sgdp": "projected:SGDP",
    "sgdsai": "sgdsai:SGDSaI",
    "lion": "lion:Lion",
    "adammini": "adammini:AdamMini",
    "mars": "mars:MARS",
    "schedulefree_adamw": "schedulefree:ScheduleFreeAdamW",
    "muon": "muon:Muon",
    "scion": "scion:Scion",
    "soap": "soap:SOAP",
    "kron": "kron:Kron",
    "swan": "swan:SWAN",
    "frugal": "frugal:FRUGAL",
    "mfac": "mfac:MFAC",
}
"""Name in configs -> module and class under thalweg.core_optim.rules."""

CLASSES: dict[str, str] = {target.split(":")[1]: name for name, target in RULES.items()}
"""Importable class -> name in configs."""


def names() -> list[str]:
    """Names of all rules, sorted."""
    return sorted(RULES)


def check_name(name: str, allowed: Iterable[str]) -> None:
    """Refuse an unknown optimizer.

    Raises:
        ValueError: Naming what is allowed and the nearest names.
    """
    known = sorted(allowed)
    if name not in known:
        near = difflib.get_close_matches(str(name).lower(), known, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"optimizer {name!r} is unknown, allowed: {', '.join(known)}{hint}")


@functools.cache
def rule(name: str) -> Rule:
    """The rule of a name.

    Raises:
        ValueError: If there is none; near names are offered.
    """
    check_name(name, RULES)
    module, kind = RULES[name].split(":")
    found = getattr(importlib.import_module(f"thalweg.core_optim.rules.{module}"), kind)()
    assert found.name == name
    assert isinstance(found, Rule)
    return found


@functools.cache
def optimizer_class(name: str) -> type[CoreOptimizer]:
    """Optimizer class of one rule, with the rule's options in its signature."""
    found = rule(name)
    parameters = [
        inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD),
        inspect.Parameter("params", inspect.Parameter.POSITIONAL_OR_KEYWORD),
    ]
    own = {key: option.default for key, option in found.options.items()}
    common = {key: option.default for key, option in COMMON.items() if key not in own}
    engine: dict[str, Any] = {"kernel": "auto", "foreach": None, "compile": False, "seed": 0}
    for key, default in own.items():
        # lr may come by position, as in torch.optim
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD if key == "lr" else inspect.Parameter.KEYWORD_ONLY
        parameters.append(inspect.Parameter(key, kind, default=default))
    parameters.sort(key=lambda p: p.kind)
    for key, default in {**common, **engine}.items():
        parameters.append(inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=default))
    signature = inspect.Signature(parameters)

    def __init__(self: CoreOptimizer, params: Iterable[Any], *args: Any, **kwargs: Any) -> None:
        unknown = sorted(set(kwargs) - set(signature.parameters))
        if unknown:
            allowed = ", ".join(list(signature.parameters)[2:])
            raise ValueError(f"{found.title}: option {unknown[0]!r} is unknown, allowed: {allowed}")
        given = dict(signature.bind(self, params, *args, **kwargs).arguments)
        del given["self"], given["params"]
        CoreOptimizer.__init__(self, params, name, **given)

    __init__.__signature__ = signature  # type: ignore[attr-defined]
    return type(
        found.title,
        (CoreOptimizer,),
        {
            "RULE": name,
            "__init__": __init__,
            "__doc__": _docstring(found),
            "__module__": "thalweg.core_optim",
        },
    )


def create(name: str, params: Iterable[Any], **options: Any) -> CoreOptimizer:
    """Optimizer of a name over parameters or groups of them.

    Raises:
        ValueError: If the name is unknown, an option is, or a value is not allowed.
    """
    return optimizer_class(name)(params, **options)


def _docstring(found: Rule) -> str:
    lines = [found.summary, "", f"Source: {found.source}", "", "Args:"]
    lines.append("    params: Parameters or groups of them.")
    lines += [f"    {k}: {o.doc} (allowed: {o.check.allowed})." for k, o in found.options.items()]
    return "\n".join(lines)
