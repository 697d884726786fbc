"""The suites: prompts, rewards and protocols, as published, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thalweg.diffusion.metrics.geneval import TAGS
from thalweg.diffusion.nft.prompt_sets import Prompt, geneval_prompts, read_prompts, shapes_prompts
from thalweg.diffusion.rewards.ocr import target

PROMPTS_SEED = 0
"""Of prompts that are made: the same ones for every model and every seed of the noises."""
UNTAGGED = "all"
"""Task of prompts without one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One prompt of a suite."""

    index: int
    """Its place, which its pictures' noises depend on."""
    text: str
    """What the pipeline is given."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """What rewards are told of it."""
    split: str = "test"
    """Part of the suite; parts have columns of their own."""

    @property
    def tag(self) -> str:
        """Its task."""
        return str(self.metadata.get("tag", UNTAGGED))


Parts = Sequence[tuple[str, Sequence[Prompt]]]
"""Prompts by the name of their part."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Suite:
    """A set of prompts with what its pictures are scored by."""

    name: str
    """Of the suite."""
    rewards: Mapping[str, Mapping[str, Any]]
    """Options by reward, as :func:`thalweg.diffusion.rewards.registry.open_rewards` takes them."""
    samples: int
    """Pictures of each prompt."""
    protocol: str
    """How the published number is made, and how far this is it."""
    source: str
    """Where the published prompts are."""
    make: Callable[[int, int], Parts] | None = None
    """Prompts from a number and a seed, where no file is given."""
    count: int = 0
    """How many prompts are made."""
    made: str = ""
    """What is said of these."""
    check: Callable[[Prompt], object] | None = None
    """Raises a ValueError for a prompt that its rewards cannot judge."""


def _has_task(prompt: Prompt) -> None:
    if prompt.metadata.get("tag") not in TAGS:
        raise ValueError(f"{prompt.text!r} has no task of GenEval; needed: a .jsonl file of its metadata")


def _has_target(prompt: Prompt) -> None:
    target(prompt.text)


def _of_grammar(count: int, seed: int) -> Parts:
    """Different prompts of all six tasks, the tasks in turn, as far as they have so many."""
    each = [(tag, -(-count // len(TAGS))) for tag in TAGS]
    drawn = [geneval_prompts(n, seed=seed + k, weights={tag: 1.0}) for k, (tag, n) in enumerate(each)]
    found = {prompt.text: prompt for prompts in drawn for prompt in prompts}
    return [("test", list(found.values()))]


def _of_shapes(count: int, seed: int) -> Parts:
    """Captions like those of training, and a third as many of combinations that are held out from it."""
    return [
        ("train", shapes_prompts(count, seed=seed, split="train")),
        ("held_out", shapes_prompts(max(2, count // 3), seed=seed + 1, split="held_out")),
    ]


SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        Suite(
            name="geneval",
            rewards={"geneval": {"detector": "mask2former"}},
            samples=4,
            protocol=(
                "GenEval (arXiv 2310.11513): 553 prompts of six tasks, 4 pictures each; the published number"
                " is the mean of the tasks' shares of correct pictures"
            ),
            source=(
                "evaluation_metadata.jsonl under prompts/ of github.com/djghosh13/geneval, or"
                " dataset/geneval/test_metadata.jsonl of github.com/yifan123/flow_grpo"
            ),
            make=_of_grammar,
            made="drawn from GenEval's grammar with seed 0; these are not the published prompts",
            count=600,
            check=_has_task,
        ),
        Suite(
            name="ocr",
            rewards={"ocr": {}},
            samples=1,
            protocol=(
                "1018 prompts that quote a text; one minus the share of wrong characters. Published numbers"
                " are those of PaddleOCR 2.9.1; the recogniser here is that of the reward's options"
            ),
            source="dataset/ocr/test.txt of github.com/yifan123/flow_grpo",
            check=_has_target,
        ),
        Suite(
            name="drawbench",
            rewards={},
            samples=5,
            protocol=(
                "DrawBench: 200 prompts, which the file of DiffusionNFT has five times each; published tables"
                " have imagereward, pickscore, aesthetic, unifiedreward, clipscore and hpsv2"
            ),
            source="dataset/drawbench/test.txt of github.com/yifan123/flow_grpo",
        ),
        Suite(
            name="pickscore",
            rewards={"pickscore": {}},
            samples=1,
            protocol="2048 captions of Pick-a-Pic v1 that were held out",
            source="dataset/pickscore/test.txt of github.com/yifan123/flow_grpo",
        ),
        Suite(
            name="shapes",
            rewards={"shapes": {}},
            samples=1,
            protocol=(
                "ShapesWorld: captions of six tasks, equally many of each, judged by its exact detector;"
                " held_out are combinations that training captions leave out"
            ),
            source="a .jsonl file of GenEval's metadata on ShapesWorld's words",
            make=_of_shapes,
            made="drawn from ShapesWorld's captions with seed 0",
            count=240,
            check=_has_task,
        ),
    )
}
"""By name."""


def suite_of(name: str) -> Suite:
    """A suite by name.

    Raises:
        ValueError: If there is none.
    """
    if name not in SUITES:
        raise ValueError(f"suite is {name!r}, allowed: {', '.join(SUITES)}")
    return SUITES[name]


def items_of(
    suite: Suite, path: str | Path | None = None, count: int | None = None, seed: int = PROMPTS_SEED
) -> list[Item]:
    """The prompts of a suite, different ones where they come from a file.

    Args:
        suite: Which one.
        path: File of prompts. Lines that are equal are one prompt: published files repeat prompts as often as
            they are to be drawn, which here is a number of its own.
        count: The first so many of a file, or the number that is made; all, or the suite's, by default.
        seed: Of prompts that are made.

    Raises:
        ValueError: If a file is needed, is none, or has a prompt that cannot be judged.
    """
    if count is not None and count < 1:
        raise ValueError(f"num_prompts is {count}, allowed: 1 and more")
    parts: Parts
    if path is not None:
        merged = {(p.text, repr(p.metadata)): p for p in read_prompts(path)}
        parts = [("test", list(merged.values())[:count])]
    elif suite.make is None:
        raise ValueError(f"suite {suite.name} needs --prompts FILE; the published one is {suite.source}")
    else:
        parts = suite.make(count or suite.count, seed)
    flat = [(split, prompt) for split, prompts in parts for prompt in prompts]
    for _, prompt in flat:
        if suite.check is not None:
            suite.check(prompt)
    return [
        Item(index=i, text=prompt.text, metadata=prompt.metadata, split=split)
        for i, (split, prompt) in enumerate(flat)
    ]


def rewards_of(suite: Suite, given: Mapping[str, Mapping[str, Any] | None]) -> dict[str, dict[str, Any]]:
    """Rewards of a suite and those of a user, whose options win where both name one.

    Raises:
        ValueError: If there are none.
    """
    names = [*suite.rewards, *(name for name in given if name not in suite.rewards)]
    if not names:
        raise ValueError(
            f'suite {suite.name} has no reward of its own: give some as --rewards "{{pickscore: {{folder:'
            f' FOLDER}}}}". {suite.protocol}'
        )
    return {name: {**suite.rewards.get(name, {}), **(given.get(name) or {})} for name in names}
