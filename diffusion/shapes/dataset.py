"""Captioned pictures of ShapesWorld, each a function of the seed and of its index alone.

Shapes: H = W = 32 pixels, C = 3 channels, floats from 0 to 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from thalweg.diffusion.metrics.geneval import TAGS
from thalweg.diffusion.shapes.captions import Metadata, Split, draw
from thalweg.diffusion.shapes.render import picture


class Example(TypedDict):
    """A captioned picture."""

    image: Tensor
    """(C, H, W)."""
    prompt: str
    """Its caption."""
    metadata: Metadata
    """What the caption says, as GenEval writes it."""


@dataclass(frozen=True, kw_only=True)
class ShapesDataset(Dataset[Example]):
    """Pictures with captions of the six tasks.

    Raises:
        ValueError: For a negative size, or a share outside of 0 to 1.
    """

    size: int
    """Pictures."""
    seed: int = 0
    """Of all of them; another seed gives other pictures."""
    split: Split = "train"
    """Captions: ``train`` without the combinations that are held out, ``held_out``, or ``all``."""
    tags: Sequence[str] = TAGS
    """Tasks, with equal chances."""
    wrong: float = 0.0
    """Share of captions that belong to another picture, as on the web."""

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError(f"size {self.size}, allowed: at least 0")
        if not 0 <= self.wrong <= 1:
            raise ValueError(f"share of wrong captions {self.wrong}, allowed: 0 to 1")

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Example:
        """One example.

        Raises:
            IndexError: For an index that is not there.
        """
        if not 0 <= index < self.size:
            raise IndexError(f"example {index} of {self.size}")
        rng = np.random.default_rng((self.seed, index))
        metadata = draw(rng, self.tags, self.split)
        image = as_floats(picture(metadata, rng))
        if rng.random() < self.wrong:
            metadata = draw(rng, self.tags, self.split)
        return Example(image=image, prompt=metadata["prompt"], metadata=metadata)


def as_floats(pixels_HWC: np.ndarray) -> Tensor:
    """Bytes (H, W, C) as floats from 0 to 1, (C, H, W)."""
    return torch.from_numpy(pixels_HWC).permute(2, 0, 1).contiguous().float() / 255
