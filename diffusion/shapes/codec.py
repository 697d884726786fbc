"""A linear autoencoder of ShapesWorld, found by a singular value decomposition: each cell becomes 12 numbers.

A cell holds nothing or one of 4 masks in a colour, so that cells less their mean span at most 4 x 3 = 12
dimensions and the code is exact. Pictures run from -1 to 1, as diffusers' autoencoders have it.

Shapes: B pictures, C = 3 channels, H = W = 32 pixels; latents of 12 channels, h = w = 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from thalweg.checkpoints.tensors import load as load_tensors
from thalweg.checkpoints.tensors import save as save_tensors
from thalweg.diffusion.metrics.geneval import TAGS
from thalweg.diffusion.shapes.captions import draw
from thalweg.diffusion.shapes.dataset import as_floats
from thalweg.diffusion.shapes.render import picture
from thalweg.diffusion.shapes.world import CELL, SHAPES

CHANNELS = 3
RANK = len(SHAPES) * CHANNELS
"""Latent channels."""
PICTURES = 2048
"""Pictures that the standard codec is fitted to."""


@dataclass(frozen=True, kw_only=True)
class LinearCodec:
    """z = (x - mean) encoder, x = mean + z decoder, for every cell x of all its pixels and channels."""

    mean: Tensor
    """Mean cell, (C * 64,)."""
    encoder: Tensor
    """Cells to latents of unit variance, (C * 64, rank)."""
    decoder: Tensor
    """Latents to cells, (rank, C * 64)."""

    @property
    def rank(self) -> int:
        """Latent channels."""
        return self.encoder.shape[1]

    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Latents (B, rank, h, w) of pictures from -1 to 1."""
        _, _, height, width = images_BCHW.shape
        cells = cells_of(images_BCHW)
        z = (cells - self.mean.to(cells)) @ self.encoder.to(cells)
        return z.transpose(1, 2).unflatten(2, (height // CELL, width // CELL))

    def decode(self, latents_Bzhw: Tensor) -> Tensor:
        """Pictures of latents, from about -1 to 1, (B, C, H, W)."""
        _, _, height, width = latents_Bzhw.shape
        z = latents_Bzhw.flatten(2).transpose(1, 2)
        cells = self.mean.to(z) + z @ self.decoder.to(z)
        return F.fold(cells.transpose(1, 2), (height * CELL, width * CELL), CELL, stride=CELL)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        save_tensors({"mean": self.mean, "encoder": self.encoder, "decoder": self.decoder}, path)

    @staticmethod
    def load(path: str | Path) -> LinearCodec:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: If the file is missing or holds something else.
        """
        tensors = load_tensors(path)
        if set(tensors) != {"mean", "encoder", "decoder"}:
            raise ValueError(f"{path} holds {sorted(tensors)}, needed: decoder, encoder, mean")
        return LinearCodec(**tensors)


def fit(images_BCHW: Tensor, rank: int = RANK) -> LinearCodec:
    """Codec whose latents are the principal components of the cells, scaled to unit variance.

    Args:
        images_BCHW: Pictures from -1 to 1.
        rank: Components.

    Raises:
        ValueError: If the cells span fewer dimensions.
    """
    cells = cells_of(images_BCHW).flatten(0, 1).double()
    mean = cells.mean(dim=0)
    variances, directions = torch.linalg.eigh((cells - mean).T @ (cells - mean) / len(cells))
    variances, directions = variances.flip(0)[:rank], directions.flip(1)[:, :rank]
    spanned = int((variances > 1e-9 * variances[0]).sum())
    if spanned < rank:
        raise ValueError(f"cells of {len(images_BCHW)} pictures span {spanned} dimensions, needed: {rank}")
    scale = variances.sqrt()
    # An eigenvector's sign is arbitrary: the largest entry is made positive.
    largest = directions.abs().argmax(dim=0, keepdim=True)
    directions = directions * directions.gather(0, largest).sign()
    return LinearCodec(
        mean=mean.float(), encoder=(directions / scale).float(), decoder=(directions * scale).T.float()
    )


def standard_codec(pictures: int = PICTURES, seed: int = 0) -> LinearCodec:
    """The codec of ShapesWorld, fitted to pictures of all six tasks in under a second."""
    rng = np.random.default_rng(seed)
    images = [as_floats(picture(draw(rng, TAGS, "all"), rng)) for _ in range(pictures)]
    return fit(torch.stack(images) * 2 - 1)


def cells_of(images_BCHW: Tensor) -> Tensor:
    """Cells row by row, each with all its pixels and channels, (B, h * w, C * 64).

    Raises:
        ValueError: If the pictures do not have 3 channels and whole cells.
    """
    shape = tuple(images_BCHW.shape)
    if len(shape) != 4 or shape[1] != CHANNELS or shape[2] % CELL or shape[3] % CELL:
        raise ValueError(f"pictures of shape {shape}, needed: (B, 3, H, W) with H and W multiples of {CELL}")
    return F.unfold(images_BCHW, CELL, stride=CELL).transpose(1, 2)
