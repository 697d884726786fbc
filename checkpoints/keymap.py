"""Key maps as data: ordered rules that turn the parameter names of one layout into those of another.

Every rule sees the name that the rules before it left behind. Rules hold strings only, so that a map needs no
model class, can be printed, and can be read backwards where each of its steps can.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rename:
    """Replace each occurrence of a regular expression in a name."""

    pattern: str
    """Regular expression, searched anywhere in the name."""
    to: str
    """Replacement, with group references such as ``\\1``."""
    back: tuple[str, str] | None = None
    """Pattern and replacement that undo the step; None if it cannot be undone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Drop:
    """Leave out names that contain a regular expression."""

    pattern: str
    """Regular expression, searched anywhere in the name."""
    reason: str
    """Why the tensor is not needed, for reports."""


Rule = Rename | Drop


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyReport:
    """What a map did to a set of names."""

    mapping: dict[str, str]
    """Source name to target name, for all names that were kept."""
    dropped: dict[str, str]
    """Source name to reason, for all names left out."""

    @property
    def renamed(self) -> dict[str, str]:
        """Names that changed."""
        return {source: target for source, target in self.mapping.items() if source != target}

    @property
    def unmatched(self) -> tuple[str, ...]:
        """Names that no rule changed."""
        return tuple(source for source, target in self.mapping.items() if source == target)

    @property
    def collisions(self) -> dict[str, tuple[str, ...]]:
        """Target names that several sources claim, with these sources."""
        sources: dict[str, list[str]] = {}
        for source, target in self.mapping.items():
            sources.setdefault(target, []).append(source)
        return {target: tuple(names) for target, names in sources.items() if len(names) > 1}

    def summary(self) -> str:
        """One line of counts, then what was renamed (grouped by kind of change) and dropped."""
        kept, renamed, dropped = len(self.mapping), len(self.renamed), len(self.dropped)
        lines = [f"{kept} tensors kept, {renamed} of them renamed, {dropped} dropped"]
        kinds: dict[str, list[str]] = {}
        for source, target in self.renamed.items():
            kinds.setdefault(_change(source, target), []).append(f"{source} -> {target}")
        for kind, examples in kinds.items():
            lines.append(f"  renamed {kind}: {len(examples)}, e.g. {examples[0]}")
        lines += [f"  dropped {name}: {reason}" for name, reason in self.dropped.items()]
        return "\n".join(lines)


class KeyMap:
    """An ordered list of rules, applied to the names of a state dict.

    Args:
        rules: Rules in order of application.
    """

    def __init__(self, rules: Sequence[Rule]) -> None:
        self.rules = tuple(rules)

    def trace(self, names: Iterable[str]) -> KeyReport:
        """What the map would do to these names, collisions included."""
        mapping: dict[str, str] = {}
        dropped: dict[str, str] = {}
        for source in names:
            target = source
            for rule in self.rules:
                if isinstance(rule, Rename):
                    target = re.sub(rule.pattern, rule.to, target)
                elif re.search(rule.pattern, target):
                    dropped[source] = rule.reason
                    break
            else:
                mapping[source] = target
        return KeyReport(mapping=mapping, dropped=dropped)

    def apply(self, state: Mapping[str, Value]) -> tuple[dict[str, Value], KeyReport]:
        """The state under its new names, in its old order, and the report.

        Raises:
            ValueError: If two names would become one.
        """
        report = self.trace(state)
        if report.collisions:
            target, sources = next(iter(report.collisions.items()))
            raise ValueError(
                f"{len(report.collisions)} names are claimed twice, e.g. {' and '.join(sources)} would both"
                f" become {target!r}; remove one of them from the checkpoint"
            )
        return {target: state[source] for source, target in report.mapping.items()}, report

    def inverse(self) -> KeyMap:
        """The way back, made of those steps that can be undone, in opposite order.

        Names that only such steps touched return to what they were; see ``one_way`` for the others.
        """
        return KeyMap(
            [
                Rename(pattern=rule.back[0], to=rule.back[1], back=(rule.pattern, rule.to))
                for rule in reversed(self.rules)
                if isinstance(rule, Rename) and rule.back is not None
            ]
        )

    @property
    def one_way(self) -> tuple[Rule, ...]:
        """Rules without a way back."""
        return tuple(rule for rule in self.rules if not isinstance(rule, Rename) or rule.back is None)


def _change(source: str, target: str) -> str:
    """Kind of a change in words: a prefix cut away, or another last part."""
    if source.endswith(target):
        return f"without prefix {source[: len(source) - len(target)]!r}"
    old, new = source.rsplit(".", 1)[-1], target.rsplit(".", 1)[-1]
    return f"{old} to {new}" if old != new else "inside the name"
