"""Pictures of a suite on disk: drawn and scored batch by batch, and continued where that was stopped.

A picture is a PNG file, and its scores are a line of a JSON Lines file. Rewards are given what the file
holds, bytes, so that scores do not depend on when they were taken. Batches are always the same ones, since
a network rounds differently in batches of other sizes: one of which a picture is missing is drawn again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from thalweg.checkpoints.atomic import replacing, write_text
from thalweg.diffusion.metrics.geneval import TAGS
from thalweg.diffusion.rewards.base import Reward, evaluate
from thalweg.diffusion.suites.known import Item

if TYPE_CHECKING:
    from PIL.Image import Image

Scores = dict[str, float | None]
"""By reward, and by ``reward/part``; None where it does not apply to a picture."""


@dataclass(frozen=True, slots=True)
class Picture:
    """What is drawn."""

    item: Item
    """The prompt."""
    copy: int
    """Which picture of it."""

    @property
    def file(self) -> str:
        """Name of its file."""
        return f"{self.item.index:05d}_{self.copy:02d}.png"


Draw = Callable[[Sequence[Picture]], Sequence["Image"]]
"""Draws a batch."""


def check_batch(batch: int) -> None:
    """Refuse empty batches.

    Raises:
        ValueError: If it is below 1.
    """
    if batch < 1:
        raise ValueError(f"batch_size is {batch}, allowed: 1 and more")


def pictures_of(items: Sequence[Item], samples: int) -> list[Picture]:
    """All pictures of a suite, prompt by prompt.

    Raises:
        ValueError: If there are none.
    """
    if samples < 1:
        raise ValueError(f"samples_per_prompt is {samples}, allowed: 1 and more")
    return [Picture(item, copy) for item in items for copy in range(samples)]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """The pictures of one model, in a folder of their own with their scores beside it."""

    folder: Path
    """Of the evaluation."""
    name: str
    """Of the arm."""

    @property
    def scores_file(self) -> Path:
        """JSON Lines: index, copy, file, scores."""
        return self.folder / f"{self.name}.jsonl"

    def path(self, picture: Picture) -> Path:
        """File of a picture."""
        return self.folder / self.name / picture.file

    def read(self, pictures: Sequence[Picture]) -> list[Scores]:
        """Scores that are known, {} for pictures that have none.

        Raises:
            ValueError: If the file is broken.
        """
        known: dict[str, Scores] = {}
        if self.scores_file.is_file():
            for number, line in enumerate(self.scores_file.read_text(encoding="utf-8").splitlines(), 1):
                try:
                    row = json.loads(line)
                    known[row["file"]] = row["scores"]
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(f"{self.scores_file}, line {number}: {error!r}; delete it") from None
        return [known.get(picture.file, {}) for picture in pictures]

    def write(self, pictures: Sequence[Picture], scores: Sequence[Scores]) -> None:
        """Write the scores that are known, all of them, in place of the file's."""
        rows = [
            {"index": p.item.index, "copy": p.copy, "file": p.file, "scores": s}
            for p, s in zip(pictures, scores, strict=True)
            if s
        ]
        write_text(self.scores_file, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))

    def load(self, picture: Picture) -> np.ndarray:
        """Bytes (H, W, 3) of a picture.

        Raises:
            ValueError: If the file is no picture.
        """
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(self.path(picture)) as image:
                return np.asarray(image.convert("RGB"))
        except (UnidentifiedImageError, SyntaxError) as error:
            raise ValueError(f"{self.path(picture)} is no picture ({error}); delete it") from None

    def save(self, picture: Picture, image: Image) -> None:
        """Write a picture, whole or not at all."""
        with replacing(self.path(picture)) as temporary:
            image.convert("RGB").save(temporary, format="PNG")


def complete(
    arm: Arm, pictures: Sequence[Picture], draw: Draw, rewards: Mapping[str, Reward], batch: int
) -> Iterator[int]:
    """Draw and score what is missing of an arm; what is done stays, whenever this is stopped.

    Args:
        arm: Where pictures are.
        pictures: All of them, in the order that makes batches.
        draw: Draws a batch.
        rewards: By name.
        batch: Pictures at once.

    Yields:
        Pictures of each batch, once it is done.

    Raises:
        ValueError: For a batch below 1, and what drawing and rewards raise.
    """
    check_batch(batch)
    scores = arm.read(pictures)
    for start in range(0, len(pictures), batch):
        rows = range(start, min(start + batch, len(pictures)))
        part = [pictures[i] for i in rows]
        if not all(arm.path(picture).is_file() for picture in part):
            for picture, image in zip(part, draw(part), strict=True):
                arm.save(picture, image)
        if todo := [name for name in rewards if any(name not in scores[i] for i in rows)]:
            images = as_floats([arm.load(picture) for picture in part])
            found = [score(rewards[name], name, images, part) for name in todo]
            for k, i in enumerate(rows):
                merged = {**scores[i], **{name: v for new in found for name, v in new[k].items()}}
                scores[i] = in_order(merged, list(rewards))
            arm.write(pictures, scores)
        yield len(part)


def score(reward: Reward, name: str, images: Tensor, pictures: Sequence[Picture]) -> list[Scores]:
    """Scores of a reward for every picture, under its name; those of single tasks follow from the tags."""
    items = [picture.item for picture in pictures]
    result = evaluate(reward, images, [item.text for item in items], [item.metadata for item in items])
    columns = {name: result.scores}
    columns |= {
        f"{name}/{part}": values
        for part, values in result.parts.items()
        if part.rpartition("/")[2] not in TAGS
    }
    values = {key: column.tolist() for key, column in columns.items()}
    return [
        {key: None if math.isnan(column[i]) else column[i] for key, column in values.items()}
        for i in range(len(pictures))
    ]


def in_order(scores: Scores, rewards: Sequence[str]) -> Scores:
    """The same, reward by reward as they are given, so that files do not tell which was taken first."""
    place = {name: i for i, name in enumerate(rewards)}
    return dict(sorted(scores.items(), key=lambda entry: place.get(entry[0].partition("/")[0], len(place))))


def as_floats(pixels: Sequence[np.ndarray]) -> Tensor:
    """Bytes (H, W, 3) of pictures as floats (B, 3, H, W) from 0 to 1."""
    stacked = torch.from_numpy(np.stack(pixels))
    return stacked.permute(0, 3, 1, 2).contiguous().float() / 255


def settings_match(path: Path, now: Mapping[str, Any]) -> None:
    """Make sure that a folder is that of this evaluation, or of none yet.

    Settings of rewards may be added to, since a picture's other scores do not depend on them.

    Raises:
        ValueError: If it is another one; the message names a setting.
    """
    if not path.is_file():
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        pairs = {f"reward {k}": (v, now["rewards"].get(k, v)) for k, v in before.pop("rewards").items()}
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} holds no settings of an evaluation: {error!r}") from None
    pairs |= {k: (before.get(k), v) for k, v in json.loads(json.dumps(now)).items() if k != "rewards"}
    for name, (old, new) in pairs.items():
        if old != new:
            raise ValueError(
                f"{path.parent} holds an evaluation whose {name} is {old}, not {new}; choose another --out"
            )
