"""Captioned images for Lightning, as latents and tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from thalweg.diffusion.caption_sets import Captioned, open_captions
from thalweg.diffusion.data import CountedDataModule
from thalweg.diffusion.shapes.codec import LinearCodec
from thalweg.diffusion.vocabulary import Vocabulary

Batch = dict[str, Tensor]


class CaptionedLatents(Dataset[Batch]):
    """Latents as ``images`` (C, H, W), tokens as ``labels`` (L,), and their ``index``."""

    def __init__(self, latents_NCHW: Tensor, tokens_NL: Tensor) -> None:
        self.latents, self.tokens = latents_NCHW, tokens_NL

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, index: int) -> Batch:
        return {"images": self.latents[index], "labels": self.tokens[index], "index": torch.tensor(index)}


class CaptionDataModule(CountedDataModule):
    """Batches of ``images``, latents (B, C, H, W) of unit variance, ``labels``, tokens (B, L), and ``index``.

    Everything is encoded once, by a linear autoencoder that is fitted to the images. The order depends on
    `seed` alone and goes on where it was when a run is resumed.

    Args:
        captions: ``shapes``, which is drawn on the spot, or a folder where every image has a text file of its
            name with its caption.
        num_train: Training images that are drawn of ``shapes``; those of a folder are all that are left.
        num_val: Images kept for validation, with captions of their own.
        wrong: Share of training images with the caption of another one.
        length: Tokens of a caption, start and end included.
        pixels: Pixels per side, a multiple of 8: a latent pixel is 8 x 8 of them.
        channels: Latent channels.
        batch_size: Training images per batch and process.
        eval_batch_size: Validation images per batch; `batch_size` by default.
        seed: Seed of drawn images, of wrong captions and of the order.
    """

    codec: LinearCodec
    vocabulary: Vocabulary

    def __init__(
        self,
        captions: str = "shapes",
        num_train: int = 16384,
        num_val: int = 0,
        wrong: float = 0.0,
        length: int = 12,
        pixels: int = 32,
        channels: int = 12,
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, 0, seed)
        self.captions = captions
        self.num_train = num_train
        self.num_val = num_val
        self.wrong = wrong
        self.length = length
        self.pixels = pixels
        self.channels = channels

    def setup(self, stage: str | None = None) -> None:
        """Open the set and encode it; done once."""
        if self._parts is not None:
            return
        found = open_captions(
            self.captions,
            num_train=self.num_train,
            num_val=self.num_val,
            wrong=self.wrong,
            size=self.pixels,
            seed=self.seed,
        )
        self.codec = found.fit_codec(self.channels)
        self.vocabulary = Vocabulary(words=found.words, length=self.length)
        self._parts = self._encode(found.train), self._encode(found.val)

    def _encode(self, part: Captioned) -> CaptionedLatents:
        tokens = [self.vocabulary.ids(caption) for caption in part.captions]
        return CaptionedLatents(
            self.codec.encode(part.pixels()), torch.tensor(tokens, dtype=torch.long).view(-1, self.length)
        )

    @property
    def image_size(self) -> int:
        """Latent pixels per side; known after ``setup``."""
        assert self._parts is not None
        return int(self._parts[0].latents.shape[-1])

    @property
    def facts(self) -> dict[str, Any]:
        """What an exported pipeline needs beside the network; known after ``setup``."""
        codec = {"mean": self.codec.mean, "encoder": self.codec.encoder, "decoder": self.codec.decoder}
        return {"words": list(self.vocabulary.words), "length": self.length, "codec": codec}
