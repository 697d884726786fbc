"""Sets of captioned images: ShapesWorld, and folders of images with text files.

Shapes: N images, C = 3 channels, H = W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from thalweg.diffusion.images import SUFFIXES, FolderSet, split
from thalweg.diffusion.shapes.captions import WORDS
from thalweg.diffusion.shapes.codec import LinearCodec, fit, standard_codec
from thalweg.diffusion.shapes.dataset import ShapesDataset
from thalweg.diffusion.shapes.world import CELL, SIZE
from thalweg.diffusion.vocabulary import words_of

SHAPES = "shapes"
"""Name of ShapesWorld."""


@dataclass(frozen=True, kw_only=True)
class Captioned:
    """Images and their captions."""

    images_NCHW: Tensor
    """Bytes."""
    captions: Sequence[str]
    """One for each."""

    def pixels(self) -> Tensor:
        """Floats from -1 to 1, (N, C, H, W)."""
        return self.images_NCHW.float() / 127.5 - 1


@dataclass(frozen=True, kw_only=True)
class CaptionSet:
    """A training and a validation part, and how they are encoded."""

    train: Captioned
    """To train on."""
    val: Captioned
    """To validate on."""
    words: tuple[str, ...]
    """All words that captions of both parts, and of the world that they are from, are made of."""
    fit_codec: Callable[[int], LinearCodec]
    """Autoencoder with a number of latent channels."""


def open_captions(
    source: str, *, num_train: int, num_val: int, wrong: float, size: int = SIZE, seed: int = 0
) -> CaptionSet:
    """Open a set.

    Args:
        source: ``shapes``, or a folder.
        num_train: Training images of ``shapes``.
        num_val: Images of the validation part.
        wrong: Share of training images with the caption of another one.
        size: Pixels per side; those of ``shapes`` are 32.
        seed: Seed of drawn images and of wrong captions.

    Raises:
        ValueError: If there is no such folder, it has no images, an image has no caption, or the size is not
            a multiple of 8.
    """
    if size < CELL or size % CELL or (source == SHAPES and size != SIZE):
        allowed = SIZE if source == SHAPES else f"multiples of {CELL}"
        raise ValueError(f"{source} cannot have {size} pixels per side, allowed: {allowed}")
    if not 0 <= wrong <= 1:
        raise ValueError(f"share of wrong captions {wrong}, allowed: 0 to 1")
    if source == SHAPES:
        return _shapes(num_train, num_val, wrong, seed)
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise ValueError(f"captions {source!r} is no folder, and no set by name: {SHAPES}")
    return _folder(folder, num_val, wrong, size, seed)


def _shapes(num_train: int, num_val: int, wrong: float, seed: int) -> CaptionSet:
    parts = []
    for part, (size, share) in enumerate(((num_train, wrong), (num_val, 0.0))):
        drawn = ShapesDataset(size=size, seed=2 * seed + part, wrong=share)
        examples = [drawn[i] for i in range(size)]
        images = [(example["image"] * 255).round().to(torch.uint8) for example in examples]
        captions = [example["prompt"] for example in examples]
        parts.append(Captioned(images_NCHW=_stack(images, SIZE), captions=captions))
    return CaptionSet(train=parts[0], val=parts[1], words=WORDS[1:], fit_codec=_shapes_codec)


def _stack(images: Sequence[Tensor], size: int) -> Tensor:
    """Images in one tensor, which may be none."""
    return torch.stack(list(images)) if images else torch.zeros(0, 3, size, size, dtype=torch.uint8)


def _shapes_codec(rank: int) -> LinearCodec:
    """The codec of ShapesWorld, which is exact.

    Raises:
        ValueError: For another number of channels than its own.
    """
    codec = standard_codec()
    if rank != codec.rank:
        raise ValueError(f"{SHAPES} has {codec.rank} latent channels, but channels is {rank}")
    return codec


def _folder(folder: Path, num_val: int, wrong: float, size: int, seed: int) -> CaptionSet:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise ValueError(f"{folder} has no images ({', '.join(SUFFIXES)})")
    captions = [_caption(path) for path in paths]
    found = FolderSet(paths=paths, labels=[0] * len(paths), names=["image"], channels=3, size=size)
    chosen = split(len(paths), num_val)
    order = list(chosen[0])
    told = dict(enumerate(captions))
    rng = np.random.default_rng(seed)
    for i, other in zip(order, rng.permutation(order).tolist(), strict=True):
        told[i] = captions[other] if rng.random() < wrong else captions[i]
    train, val = (
        Captioned(images_NCHW=_stack([found.image(i) for i in part], size), captions=[told[i] for i in part])
        for part in chosen
    )
    return CaptionSet(
        train=train, val=val, words=words_of(captions), fit_codec=lambda rank: fit(train.pixels(), rank)
    )


def _caption(image: Path) -> str:
    """First line with text of the file that goes with an image; others may be translations.

    Raises:
        ValueError: If there is no such file, or it is empty.
    """
    path = image.with_suffix(".txt")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    found = next((line.strip() for line in lines if line.strip()), "")
    if not found:
        raise ValueError(f"{image} has no caption: {path.name} beside it is missing or empty")
    return found
