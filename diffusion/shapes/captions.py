"""Captions of ShapesWorld with the metadata of GenEval, and which combinations are held out.

The six tasks: "a circle", "a circle and a square", "three crosses", "a red square", "a circle left of a
cross", "a red circle and a blue square". The classes of a caption differ, and so do its colours. As in
GenEval, the object that a position refers to comes first in ``include`` and second in the caption.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, Literal

import numpy as np

from thalweg.diffusion.metrics.boxes import RELATIONS
from thalweg.diffusion.metrics.geneval import TAGS
from thalweg.diffusion.shapes.world import COLORS, SHAPES

Metadata = dict[str, Any]
Split = Literal["train", "held_out", "all"]
SPLITS = ("train", "held_out", "all")

COUNTS = {"two": 2, "three": 3, "four": 4}
"""Number words of the task of counting."""
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
PADDING = "<pad>"
WORDS = (
    *(PADDING, "a", "and", *COUNTS, "left", "right", "of", "above", "below"),
    *SHAPES,
    *PLURALS.values(),
    *COLORS,
)
"""Vocabulary; the padding is word 0."""
LENGTH = 10
"""Words that a sequence of tokens has room for."""
HELD_OUT = 0.2
"""Share of the combinations of (colour, shape, colour, shape) and of (shape, relation, shape)."""


def prompts(tag: str, split: Split = "all") -> list[Metadata]:
    """Metadata of all captions of a task, of one part of them, in a fixed order.

    Only ``position`` and ``color_attr`` have captions that are held out.

    Raises:
        ValueError: For an unknown task or part.
    """
    if split not in SPLITS:
        raise ValueError(f"captions have no part {split!r}, allowed: {', '.join(SPLITS)}")
    found = _prompts(tag)
    if split == "all":
        return list(found)
    return [metadata for metadata in found if is_held_out(metadata) == (split == "held_out")]


def draw(rng: np.random.Generator, tags: Sequence[str] = TAGS, split: Split = "train") -> Metadata:
    """A task and then one of its captions, each with equal chances.

    Raises:
        ValueError: If a task has no captions in that part.
    """
    tag = tags[int(rng.integers(len(tags)))]
    options = _options(tag, split)
    if not options:
        raise ValueError(f"task {tag!r} has no captions in {split!r}, allowed: position, color_attr")
    return options[int(rng.integers(len(options)))]


def is_held_out(metadata: Metadata) -> bool:
    """Whether a caption shows a combination that is held out, in whichever order it names the objects."""
    return _combination(metadata) in _held_out()


def tokens(prompt: str, length: int = LENGTH) -> list[int]:
    """Indices of the words of a caption, padded; an empty caption is all padding.

    Raises:
        ValueError: For unknown words, and captions that are too long.
    """
    words = prompt.split()
    unknown = [word for word in words if word not in WORDS[1:]]
    if unknown:
        raise ValueError(f"words {unknown} of {prompt!r} are unknown, allowed: {', '.join(WORDS[1:])}")
    if len(words) > length:
        raise ValueError(f"{prompt!r} has {len(words)} words, allowed: at most {length}")
    return [WORDS.index(word) for word in words] + [0] * (length - len(words))


def _pairs(items: Iterable[str]) -> list[tuple[str, str]]:
    return list(itertools.permutations(items, 2))


@cache
def _options(tag: str, split: Split) -> tuple[Metadata, ...]:
    return tuple(prompts(tag, split))


@cache
def _prompts(tag: str) -> tuple[Metadata, ...]:
    if tag == "single_object":
        return tuple(_metadata(tag, f"a {s}", {"class": s}) for s in SHAPES)
    if tag == "two_object":
        return tuple(
            _metadata(tag, f"a {a} and a {b}", {"class": a}, {"class": b}) for a, b in _pairs(SHAPES)
        )
    if tag == "counting":
        return tuple(_counting(word, shape) for word in COUNTS for shape in SHAPES)
    if tag == "colors":
        return tuple(_metadata(tag, f"a {c} {s}", {"class": s, "color": c}) for c in COLORS for s in SHAPES)
    if tag == "position":
        return tuple(
            _metadata(tag, f"a {a} {r} a {b}", {"class": b}, {"class": a, "position": [r, 0]})
            for a, b in _pairs(SHAPES)
            for r in RELATIONS
        )
    if tag == "color_attr":
        return tuple(
            _metadata(tag, f"a {c} {a} and a {d} {b}", {"class": a, "color": c}, {"class": b, "color": d})
            for a, b in _pairs(SHAPES)
            for c, d in _pairs(COLORS)
        )
    raise ValueError(f"GenEval has no task {tag!r}, allowed: {', '.join(TAGS)}")


def _metadata(tag: str, prompt: str, *items: Metadata) -> Metadata:
    include = [{"class": item["class"], "count": 1, **item} for item in items]
    return {"tag": tag, "include": include, "prompt": prompt}


def _counting(word: str, shape: str) -> Metadata:
    count = COUNTS[word]
    return {
        "tag": "counting",
        "include": [{"class": shape, "count": count}],
        "exclude": [{"class": shape, "count": count + 1}],
        "prompt": f"{word} {PLURALS[shape]}",
    }


def _combination(metadata: Metadata) -> tuple[str, ...] | None:
    """One name for all captions of the same scene: "a above b" is "b below a"."""
    if metadata["tag"] == "color_attr":
        return tuple(itertools.chain(*sorted((i["color"], i["class"]) for i in metadata["include"])))
    if metadata["tag"] == "position":
        target, thing = metadata["include"]
        relation, opposite = thing["position"][0], {"right of": "left of", "below": "above"}
        if relation in opposite:
            return (target["class"], opposite[relation], thing["class"])
        return (thing["class"], relation, target["class"])
    return None


@cache
def _held_out() -> frozenset[tuple[str, ...] | None]:
    """A fixed fifth of the combinations of both tasks, scattered by a checksum of their names."""
    chosen: list[tuple[str, ...] | None] = []
    for tag in ("position", "color_attr"):
        combinations = {_combination(metadata) for metadata in _prompts(tag)}
        order = sorted(combinations, key=lambda names: zlib.crc32(" ".join(names or ()).encode()))
        chosen += order[: round(HELD_OUT * len(order))]
    return frozenset(chosen)
