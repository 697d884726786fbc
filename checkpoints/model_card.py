"""Model cards: a template with places to fill, under the YAML front matter that the hub reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import PurePath
from string import Template
from typing import Any

import yaml

UNKNOWN = "Not stated."


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """What a card says."""

    name: str
    """Title of the card."""
    repo: str
    """What a reader passes to ``from_pretrained``: ``org/name`` or a folder name."""
    license: str
    """Licence identifier of the hub, e.g. ``apache-2.0`` or ``other``."""
    summary: str
    """One sentence: size and how the weights came about."""
    tags: tuple[str, ...] = ()
    """Tags for the hub's search."""
    datasets: tuple[str, ...] = ()
    """Names of the training data."""
    metrics: tuple[str, ...] = ()
    """Names of the metrics under which errors are given."""
    base_model: str | None = None
    """Hub name of the model that this one was fine-tuned from."""
    errors: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Data set to metric to value."""
    provenance: Mapping[str, object] = field(default_factory=dict)
    """Checkpoint, step, program versions, checksums and the like."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Configuration of the run; of absolute paths only the last part is shown."""
    fields: Mapping[str, object] = field(default_factory=dict)
    """Further places of the template, e.g. ``channels_in``."""


def render(template: str, card: Card) -> str:
    """Text of a README.md.

    Args:
        template: Name of a template, see ``templates``.
        card: What to fill in.

    Raises:
        ValueError: If there is no such template, or it has a place that the card does not fill.
    """
    if template not in (known := templates()):
        raise ValueError(f"card template {template!r} is unknown, allowed: {', '.join(known)}")
    text = (resources.files("thalweg.checkpoints") / "cards" / f"{template}.md").read_text(encoding="utf-8")
    places = {
        "name": card.name,
        "repo": card.repo,
        "summary": card.summary,
        "training_data": _bullets(card.datasets) or UNKNOWN,
        "errors": _table(card.errors) or UNKNOWN,
        "provenance": _bullets([f"{key}: {value}" for key, value in card.provenance.items()]) or UNKNOWN,
        "config": _code(card.config) or UNKNOWN,
        **card.fields,
    }
    try:
        body = Template(text).substitute(places)
    except KeyError as err:
        raise ValueError(f"card template {template!r} needs a value for {err.args[0]!r}") from None
    return f"---\n{_front_matter(card)}---\n\n{body}"


def templates() -> tuple[str, ...]:
    """Names of the templates."""
    folder = resources.files("thalweg.checkpoints") / "cards"
    return tuple(sorted(entry.name.removesuffix(".md") for entry in folder.iterdir()))


def read_front_matter(text: str) -> dict[str, Any]:
    """The YAML between the first two ``---`` lines of a card; empty if there is none."""
    head, mark, rest = text.lstrip("\ufeff").partition("---\n")
    if head.strip() or not mark or "\n---" not in rest:
        return {}
    found = yaml.safe_load(rest.split("\n---", 1)[0])
    return found if isinstance(found, dict) else {}


def without_machine_paths(value: Any) -> Any:
    """A configuration for others: of absolute paths, which tell about a machine, only the last part stays."""
    if isinstance(value, Mapping):
        return {key: without_machine_paths(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_machine_paths(item) for item in value]
    if isinstance(value, str) and PurePath(value).is_absolute():
        return PurePath(value).name
    return value


def _front_matter(card: Card) -> str:
    entries: dict[str, Any] = {
        "license": card.license,
        "library_name": "thalweg",
        "tags": list(card.tags),
        "datasets": list(card.datasets),
        "metrics": list(card.metrics),
        "base_model": card.base_model,
    }
    return yaml.safe_dump({k: v for k, v in entries.items() if v}, sort_keys=False, allow_unicode=True)


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _table(errors: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown table with one row per data set and one column per metric."""
    if not errors:
        return ""
    metrics = list(dict.fromkeys(name for row in errors.values() for name in row))
    lines = ["| data | " + " | ".join(metrics) + " |", "|---" * (len(metrics) + 1) + "|"]
    for dataset, row in errors.items():
        cells = (f"{row[m]:.4g}" if m in row else "" for m in metrics)
        lines.append(f"| {dataset} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _code(config: Mapping[str, Any]) -> str:
    if not config:
        return ""
    return f"```yaml\n{yaml.safe_dump(without_machine_paths(dict(config)), sort_keys=False)}```"
