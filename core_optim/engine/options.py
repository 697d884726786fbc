"""Options of an algorithm: default, allowed values, a line of explanation; checked where they are given."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Coerce = Callable[[Any], Any]


@dataclass(frozen=True)
class Check:
    """What values an option may take: ``coerce`` returns the value in its own type or raises ValueError."""

    coerce: Coerce
    allowed: str


@dataclass(frozen=True)
class Option:
    """One option of an algorithm."""

    default: Any
    check: Check
    doc: str


def _fail() -> Any:
    raise ValueError


def at_least(low: float, high: float = math.inf) -> Check:
    """A finite number in [low, high]; a 0-d CPU tensor counts as a number."""

    def coerce(value: Any) -> float | Tensor:
        if isinstance(value, Tensor):
            # a learning rate may be kept in a tensor; reading one on a GPU would wait for the device
            return value if value.dim() == 0 and value.device.type == "cpu" else _fail()
        if isinstance(value, bool) or not isinstance(value, int | float):
            _fail()
        return float(value) if low <= value <= high and math.isfinite(value) else _fail()

    return Check(coerce, f"a number >= {low:g}" + ("" if math.isinf(high) else f" and <= {high:g}"))


def more_than(low: float) -> Check:
    """A finite number above low."""
    inner = at_least(low)
    return Check(
        lambda v: inner.coerce(v) if float(inner.coerce(v)) > low else _fail(), f"a number > {low:g}"
    )


def share(*, open_above: bool = True) -> Check:
    """A number in [0, 1), or [0, 1]."""
    inner = at_least(0.0, 1.0)

    def coerce(value: Any) -> float:
        found = float(inner.coerce(value))
        return _fail() if open_above and found == 1.0 else found

    return Check(coerce, "a number in [0, 1)" if open_above else "a number in [0, 1]")


def _pair(value: Any) -> tuple[float, ...]:
    one = share().coerce
    return tuple(one(v) for v in value) if isinstance(value, tuple | list) and len(value) == 2 else _fail()


BETAS = Check(_pair, "two numbers in [0, 1)")


def integer(low: int, high: int | None = None) -> Check:
    """A whole number in [low, high]."""

    def coerce(value: Any) -> int:
        whole = isinstance(value, int) and not isinstance(value, bool)
        return value if whole and value >= low and (high is None or value <= high) else _fail()

    return Check(coerce, f"an integer >= {low}" + ("" if high is None else f" and <= {high}"))


FLAG = Check(lambda v: v if isinstance(v, bool) else _fail(), "true or false")


def choice(*allowed: Any) -> Check:
    """One of a few values."""
    return Check(
        lambda v: v if any(v == a and type(v) is type(a) for a in allowed) else _fail(),
        ", ".join(map(str, allowed)),
    )


def either(*checks: Check) -> Check:
    """A value that one of several checks accepts; the first that does decides its type."""

    def coerce(value: Any) -> Any:
        for check in checks:
            try:
                return check.coerce(value)
            except ValueError:
                continue
        return _fail()

    return Check(coerce, " or ".join(check.allowed for check in checks))


def mapping(keys: str) -> Check:
    """A table of further settings, passed on as it is."""
    return Check(lambda v: dict(v) if isinstance(v, Mapping) else _fail(), f"a table with {keys}")


NONE = Check(lambda v: v if v is None else _fail(), "none")


def resolve(owner: str, options: Mapping[str, Option], given: Mapping[str, Any]) -> dict[str, Any]:
    """All options of an algorithm, the given ones in the place of their defaults.

    Args:
        owner: Whose options, for the messages.
        options: What exists.
        given: What the user asked for; may name nothing else.

    Raises:
        ValueError: For an unknown option or a value that is not allowed.
    """
    if unknown := sorted(set(given) - set(options)):
        near = difflib.get_close_matches(unknown[0], options, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"{owner}: option {unknown[0]!r} is unknown, allowed: {', '.join(options)}{hint}")
    found = {}
    for name, option in options.items():
        value = given.get(name, option.default)
        try:
            found[name] = option.check.coerce(value)
        except ValueError:
            raise ValueError(f"{owner}: {name} is {value!r}, allowed: {option.check.allowed}") from None
    return found
