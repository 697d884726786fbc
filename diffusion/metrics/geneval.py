"""GenEval (Ghosh et al. 2023): does a picture show the objects, counts, colours and positions of its prompt?

A pure function of a prompt's metadata and of the detections in its picture. Three numbers come out:
``correct``, the official criterion; ``strict``, which wants exact counts; and ``score``, the partial credit
that reinforcement learning takes as its reward (DiffusionNFT, arXiv 2509.16117).

The metadata is that of GenEval's files: ``tag``, ``include`` (``class``, ``count``, and perhaps ``color`` and
``position`` = [relation, index of an earlier item]), and perhaps ``exclude``. A detection is a mapping with
``box`` (x1, y1, x2, y2; y points down), ``score`` and, where a prompt asks for one, ``color``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from thalweg.diffusion.metrics.boxes import RELATIONS, iou, relative_position

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
"""The six tasks."""
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
"""Colours of the official prompts."""

Detection = Mapping[str, Any]
Detections = Mapping[str, Sequence[Detection]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """Which detections count, and how near a relation has to be; the defaults are the official ones."""

    threshold: float = 0.3
    """Detections need a higher score."""
    counting_threshold: float = 0.9
    """The same, for the task of counting."""
    max_per_class: int = 16
    """Detections of a class that are kept, the best."""
    nms: float = 1.0
    """Of two detections whose boxes overlap this much, the better one is kept; 1 keeps both."""
    position_threshold: float = 0.1
    """Share of the objects' added sizes that a displacement has to exceed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageScore:
    """Verdict on one picture; ``dict(score)`` and ``score["strict"]`` work as well."""

    correct: bool
    """Official criterion: at least the counts, colours, positions, and nothing that is excluded."""
    strict: bool
    """Exact counts, colours, positions; what is excluded does not matter."""
    score: float
    """Mean of the terms, at most 1."""
    reason: str
    """Why it is not strict, one line for each failure."""
    reason_correct: str
    """Why it is not correct."""
    terms: tuple[tuple[str, float], ...]
    """What the score is the mean of: count, color, position, and what could not be checked."""
    failures: tuple[str, ...]
    """Kinds of failures of the strict criterion: count, color, position, no_target."""

    def keys(self) -> list[str]:
        """Names of the entries."""
        return [field.name for field in fields(self)]

    def __getitem__(self, name: str) -> Any:
        if name not in self.keys():
            raise KeyError(name)
        return getattr(self, name)


def score_image(
    metadata: Mapping[str, Any],
    detections: Detections,
    *,
    reference_quirks: bool = False,
    clip_counts: bool = False,
    rules: Rules | None = None,
) -> ImageScore:
    """Judge one picture by what was detected in it.

    The score is the mean of these terms, for every item of ``include`` with count n of which k are found:
    1 - |k - n| / n; then, if k = n, 1 - |matches - n| / n for a colour, and 1 or 0 for a position. Where k is
    not n, a colour or position that was asked for is a term 0.

    Args:
        metadata: Of the prompt.
        detections: By class, raw: they are filtered here, see :func:`kept`.
        reference_quirks: Add a term 1 after every failed position, as the published training code does; a
            wrong position then costs 1/4 and not 1/3.
        clip_counts: No term below 0; otherwise three of one object score -1.
        rules: Of filtering.

    Raises:
        ValueError: For unknown tags or relations, counts below 1, a position that refers to no earlier item,
            and detections without the colour that a prompt asks for.
    """
    rules = rules or Rules()
    _check(metadata)
    found = kept(detections, metadata["tag"], rules)
    official = _Run(strict=False, rules=rules, found=found)
    exact = _Run(strict=True, rules=rules, found=found, quirks=reference_quirks, clip=clip_counts)
    for item in metadata["include"]:
        official.include(item)
        exact.include(item)
    for item in metadata.get("exclude", []):
        official.exclude(item)
    terms = [value for _, value in exact.terms]
    return ImageScore(
        correct=not official.failures,
        strict=not exact.failures,
        score=sum(terms) / len(terms) if terms else 0.0,
        reason="\n".join(exact.reasons),
        reason_correct="\n".join(official.reasons),
        terms=tuple(exact.terms),
        failures=tuple(exact.failures),
    )


def kept(detections: Detections, tag: str, rules: Rules | None = None) -> dict[str, list[Detection]]:
    """Detections above the threshold of a task, by class, best first, at most so many; no empty classes."""
    rules = rules or Rules()
    indices = kept_indices(detections, tag, rules)
    return {name: [detections[name][i] for i in chosen] for name, chosen in indices.items()}


def kept_indices(detections: Detections, tag: str, rules: Rules) -> dict[str, list[int]]:
    """Positions of the detections of :func:`kept`; of equal scores the later one comes first."""
    threshold = rules.counting_threshold if tag == "counting" else rules.threshold
    found = {}
    for name, group in detections.items():
        rising = sorted(range(len(group)), key=lambda i: group[i]["score"])
        order = [i for i in reversed(rising) if group[i]["score"] > threshold][: rules.max_per_class]
        if rules.nms < 1:
            order = _suppress(group, order, rules.nms)
        if order:
            found[name] = order
    return found


class _Run:
    """One pass over the items of a prompt, for the strict or for the official criterion."""

    def __init__(
        self,
        *,
        strict: bool,
        rules: Rules,
        found: Mapping[str, Sequence[Detection]],
        quirks: bool = False,
        clip: bool = False,
    ) -> None:
        self.strict, self.rules, self.found, self.quirks, self.clip = strict, rules, found, quirks, clip
        self.terms: list[tuple[str, float]] = []
        self.failures: list[str] = []
        self.reasons: list[str] = []
        self.groups: list[Sequence[Detection] | None] = []

    def include(self, item: Mapping[str, Any]) -> None:
        """Look for the objects of an item; the next ones may refer to them if all is as it should be."""
        name, count = item["class"], item["count"]
        objects = list(self.found.get(name, []))
        number = len(objects)
        self._credit("count", number, count)
        enough = number == count if self.strict else number >= count
        if not enough:
            sign = "==" if self.strict else ">="
            self._fail("count", f"expected {name}{sign}{count}, found {number}")
            if "color" in item or "position" in item:
                self.terms.append(("unchecked", 0.0))
        objects = objects[:count]
        matched = enough and self._colored(item, objects) and self._placed(item, objects)
        self.groups.append(objects if matched else None)

    def exclude(self, item: Mapping[str, Any]) -> None:
        """Make sure that there are fewer objects of a class than an item says."""
        number = len(self.found.get(item["class"], []))
        if number >= item["count"]:
            self._fail("exclude", f"expected {item['class']}<{item['count']}, found {number}")

    def _colored(self, item: Mapping[str, Any], objects: Sequence[Detection]) -> bool:
        if "color" not in item:
            return True
        name, color, count = item["class"], item["color"], item["count"]
        seen = [_color(thing, name) for thing in objects]
        self._credit("color", seen.count(color), count)
        if seen.count(color) >= count:
            return True
        known = [*COLORS, *sorted(set(seen) - set(COLORS))]
        others = ", ".join(f"{seen.count(c)} {c}" for c in known if c in seen)
        found = f"found {seen.count(color)} {color}; and {others}"
        self._fail("color", f"expected {color} {name}>={count}, {found}")
        return False

    def _placed(self, item: Mapping[str, Any], objects: Sequence[Detection]) -> bool:
        if "position" not in item:
            return True
        relation, index = item["position"]
        targets = self.groups[index]
        if targets is None:
            self.terms.append(("no_target", 0.0))
            self._fail("no_target", f"no target for {item['class']} to be {relation}")
            return False
        for thing in objects:
            for target in targets:
                seen = relative_position(thing["box"], target["box"], self.rules.position_threshold)
                if relation not in seen:
                    self.terms += [("position", 0.0), ("extra", 1.0)] if self.quirks else [("position", 0.0)]
                    found = f"found {' and '.join(sorted(seen))} target"
                    self._fail("position", f"expected {item['class']} {relation} target, {found}")
                    return False
        self.terms.append(("position", 1.0))
        return True

    def _credit(self, kind: str, number: int, count: int) -> None:
        value = 1.0 - abs(count - number) / count
        self.terms.append((kind, max(0.0, value) if self.clip else value))

    def _fail(self, kind: str, reason: str) -> None:
        self.failures.append(kind)
        self.reasons.append(reason)


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskTable:
    """Means by task."""

    counts: dict[str, int]
    """Pictures of each task that occurs."""
    means: dict[str, float]
    """Mean of each task that occurs."""
    macro: float
    """Mean of the tasks' means: the number that GenEval reports."""
    micro: float
    """Mean of all pictures, which weighs tasks by their pictures."""


def task_table(values: Iterable[float], tags: Iterable[str]) -> TaskTable:
    """Means of any verdict (``correct``, ``strict``, ``score``) by task, over tasks and over pictures.

    Raises:
        ValueError: If there are no values, or as many tags as values are missing.
    """
    numbers, tags = [float(v) for v in values], list(tags)
    if not numbers or len(numbers) != len(tags):
        raise ValueError(f"{len(numbers)} values and {len(tags)} tags, needed: equally many, at least one")
    order = [*TAGS, *sorted(set(tags) - set(TAGS))]
    paired = list(zip(numbers, tags, strict=True))
    groups = {tag: [v for v, t in paired if t == tag] for tag in order if tag in tags}
    means = {tag: math.fsum(group) / len(group) for tag, group in groups.items()}
    return TaskTable(
        counts={tag: len(group) for tag, group in groups.items()},
        means=means,
        macro=math.fsum(means.values()) / len(means),
        micro=math.fsum(numbers) / len(numbers),
    )


def by_tag(values: Sequence[float], tags: Sequence[str], absent: float = math.nan) -> dict[str, list[float]]:
    """Values of each of the six tasks, with a placeholder where a picture is of another task."""
    return {
        tag: [float(v) if t == tag else absent for v, t in zip(values, tags, strict=True)] for tag in TAGS
    }


def _suppress(group: Sequence[Detection], order: Sequence[int], limit: float) -> list[int]:
    """Non-maximum suppression: drop what overlaps a better detection."""
    chosen: list[int] = []
    for i in order:
        if all(iou(group[i]["box"], group[j]["box"]) < limit for j in chosen):
            chosen.append(i)
    return chosen


def _color(thing: Detection, name: str) -> str:
    color = thing.get("color")
    if color is None:
        raise ValueError(f"a detection of {name!r} has no 'color', which its prompt asks for: {dict(thing)}")
    return str(color)


def _check(metadata: Mapping[str, Any]) -> None:
    for key in ("tag", "include"):
        if key not in metadata:
            raise ValueError(f"metadata of GenEval without {key!r}: {dict(metadata)}")
    if metadata["tag"] not in TAGS:
        raise ValueError(f"GenEval has no task {metadata['tag']!r}, allowed: {', '.join(TAGS)}")
    for number, item in enumerate(metadata["include"]):
        if item["count"] < 1:
            raise ValueError(f"count {item['count']} of {item['class']!r}, needed: at least 1")
        if "position" in item:
            relation, index = item["position"]
            if relation not in RELATIONS:
                raise ValueError(f"relation {relation!r} is unknown, allowed: {', '.join(RELATIONS)}")
            if not 0 <= index < number:
                raise ValueError(f"position of item {number} refers to item {index}, allowed: earlier ones")
