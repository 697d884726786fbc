"""Sets of prompts: text files, GenEval's JSON lines, and training prompts of GenEval from its grammar.

The grammar is that of GenEval (Ghosh et al. 2023, arXiv 2310.11513; its generator is MIT-licensed). Training
prompts follow Flow-GRPO's mixture of tasks; prompts of a test set are left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from thalweg.diffusion.metrics.boxes import RELATIONS
from thalweg.diffusion.metrics.geneval import COLORS, score_image
from thalweg.diffusion.shapes import captions
from thalweg.diffusion.shapes.captions import Split

CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee",
    "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple",
    "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch",
    "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote",
    "computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book",
    "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
"""The classes of COCO in their order, under GenEval's names."""
COUNTS = {"two": 2, "three": 3, "four": 4}
"""Numbers of objects that are asked for."""
TRAIN_WEIGHTS: dict[str, float] = {
    "position": 0.7,
    "counting": 0.5,
    "color_attr": 0.3,
    "colors": 0.1,
    "two_object": 0.1,
}
"""Flow-GRPO's mixture, up to a factor; single objects are not trained on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A prompt and what rewards are told of it."""

    text: str
    """What the network is given."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """For GenEval its line: tag, include, perhaps exclude, and the prompt."""


def read_prompts(path: str | Path) -> list[Prompt]:
    """Read a file of prompts: ``.txt`` with one per line, or ``.jsonl`` of GenEval. Empty lines are skipped.

    Raises:
        ValueError: If there is no such file, it is of another kind, has no prompts, or a line that is none;
            the message names the file and the line.
    """
    path = Path(path)
    readers: dict[str, Callable[[str], Prompt]] = {".txt": _plain, ".jsonl": _geneval}
    if path.suffix not in readers:
        raise ValueError(f"{path} is {path.suffix or 'without a suffix'}, allowed: {', '.join(readers)}")
    if not path.is_file():
        raise ValueError(f"{path} does not exist or is not a file")
    found = []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found.append(readers[path.suffix](line))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    if not found:
        raise ValueError(f"{path} has no prompts, needed: at least one line")
    return found


def _plain(line: str) -> Prompt:
    return Prompt(text=line.strip())


def _geneval(line: str) -> Prompt:
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    text = values.get("prompt") if isinstance(values, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise ValueError("needed is an object with a text 'prompt'")
    score_image(values, {})  # says what is wrong with it
    if not values["include"]:
        raise ValueError("include is empty, needed: at least one object")
    return Prompt(text=text, metadata=values)


def shapes_prompts(count: int, *, seed: int, split: Split = "train") -> list[Prompt]:
    """Draw captions of ShapesWorld, equally many of each task up to the rest; one may come again.

    Args:
        count: Captions.
        seed: Their seed.
        split: ``train`` leaves out combinations that are held out, ``held_out`` has nothing else.
    """
    rng = np.random.default_rng(seed)
    tags = shapes_tags(split)
    found = [captions.draw(rng, (tags[i % len(tags)],), split) for i in range(count)]
    return [Prompt(text=metadata["prompt"], metadata=metadata) for metadata in found]


def shapes_tags(split: Split) -> tuple[str, ...]:
    """Tasks of a part of ShapesWorld: single combinations are held out of two of them."""
    return ("position", "color_attr") if split == "held_out" else tuple(captions.TAGS)


def to_jsonl(prompts: Sequence[Prompt]) -> str:
    """The text of a ``.jsonl`` file."""
    return "".join(json.dumps(prompt.metadata, ensure_ascii=False) + "\n" for prompt in prompts)


def geneval_prompts(
    count: int,
    *,
    seed: int,
    weights: Mapping[str, float] = TRAIN_WEIGHTS,
    exclude: Collection[str] = (),
) -> list[Prompt]:
    """Draw prompts of GenEval: a task by its weight, and then its objects, colours, numbers and relations.

    As in the published set a prompt may be drawn again; tasks with few prompts (counting has 240) would
    otherwise lose their weight.

    Args:
        count: Prompts.
        seed: Their seed.
        weights: Of tasks, up to a factor.
        exclude: Texts that are not to be drawn, those of a test set.

    Raises:
        ValueError: For an unknown task, weights that are none, or a task that is excluded altogether.
    """
    if unknown := [tag for tag in weights if tag not in GRAMMAR]:
        raise ValueError(f"GenEval has no task {unknown[0]!r}, allowed: {', '.join(GRAMMAR)}")
    total = sum(weights.values())
    if not total > 0 or min(weights.values()) < 0:
        raise ValueError(f"weights are {dict(weights)}, allowed: 0 and more, and not all 0")
    rng, tags, left_out = np.random.default_rng(seed), list(weights), set(exclude)
    shares, found = [weights[tag] / total for tag in tags], list[Prompt]()
    for tag in rng.choice(tags, size=count, p=shares).tolist():
        for _ in range(TRIES):
            prompt = draw(tag, rng)
            if prompt.text not in left_out:
                found.append(prompt)
                break
        else:
            raise ValueError(f"{TRIES} prompts of task {tag!r} in turn are excluded; exclude fewer")
    return found


TRIES = 10_000
"""Prompts that are drawn until one is allowed."""


def draw(tag: str, rng: np.random.Generator) -> Prompt:
    """One prompt of a task."""
    include, words = GRAMMAR[tag](rng)
    metadata: dict[str, Any] = {"tag": tag, "include": include}
    if tag == "counting":
        metadata["exclude"] = [{"class": include[0]["class"], "count": include[0]["count"] + 1}]
    metadata["prompt"] = f"a photo of {words}"
    return Prompt(text=metadata["prompt"], metadata=metadata)


Drawn = tuple[list[dict[str, Any]], str]


def _single_object(rng: np.random.Generator) -> Drawn:
    (a,) = _pick(rng, CLASSES, 1)
    return [{"class": a, "count": 1}], article(a)


def _two_object(rng: np.random.Generator) -> Drawn:
    a, b = _pick(rng, CLASSES, 2)
    return [{"class": a, "count": 1}, {"class": b, "count": 1}], f"{article(a)} and {article(b)}"


def _counting(rng: np.random.Generator) -> Drawn:
    (a,), (number,) = _pick(rng, CLASSES, 1), _pick(rng, list(COUNTS), 1)
    return [{"class": a, "count": COUNTS[number]}], f"{number} {plural(a)}"


def _colors(rng: np.random.Generator) -> Drawn:
    (a,), (color,) = _pick(rng, COLOURED, 1), _pick(rng, COLORS, 1)
    return [{"class": a, "count": 1, "color": color}], f"{article(color)} {a}"


def _position(rng: np.random.Generator) -> Drawn:
    """The object that the position refers to comes first in the metadata and last in the prompt."""
    (a, b), (relation,) = _pick(rng, CLASSES, 2), _pick(rng, RELATIONS, 1)
    include = [{"class": b, "count": 1}, {"class": a, "count": 1, "position": [relation, 0]}]
    return include, f"{article(a)} {relation} {article(b)}"


def _color_attr(rng: np.random.Generator) -> Drawn:
    (a, b), (c, d) = _pick(rng, COLOURED, 2), _pick(rng, COLORS, 2)
    include = [{"class": a, "count": 1, "color": c}, {"class": b, "count": 1, "color": d}]
    return include, f"{article(c)} {a} and {article(d)} {b}"


COLOURED = tuple(name for name in CLASSES if name != "person")
"""What is given colours."""
GRAMMAR: dict[str, Callable[[np.random.Generator], Drawn]] = {
    "single_object": _single_object,
    "two_object": _two_object,
    "counting": _counting,
    "colors": _colors,
    "position": _position,
    "color_attr": _color_attr,
}
"""What each task asks for, and in which words."""


def _pick(rng: np.random.Generator, options: Sequence[str], count: int) -> list[str]:
    """Different ones."""
    return [options[int(i)] for i in rng.choice(len(options), size=count, replace=False)]


def article(name: str) -> str:
    """The name with a or an, by its first letter."""
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def plural(name: str) -> str:
    """The name with s, or es after s, as in GenEval whatever English says."""
    return f"{name}es" if name.endswith("s") else f"{name}s"
