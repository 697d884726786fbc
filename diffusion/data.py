"""Labelled images for Lightning."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from thalweg.diffusion.images import ImageSet, open_images, split
from thalweg.diffusion.order import CountedLoader, CountedSampler, generator

Batch = dict[str, Tensor]


class LabelledImages(Dataset[Batch]):
    """Chosen images of a set as ``images``, floats in [-1, 1] (C, H, W), ``labels``, and their ``index``."""

    def __init__(self, images: ImageSet, indices: list[int]) -> None:
        self.images, self.indices = images, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Batch:
        index = self.indices[position]
        pixels = self.images.image(index).float() / 127.5 - 1
        label = torch.tensor(self.images.labels[index])
        return {"images": pixels, "labels": label, "index": torch.tensor(position)}


class CountedDataModule(L.LightningDataModule):
    """Training and validation data that ``setup`` has put into memory, and the place in them.

    Args:
        batch_size: Training images per batch and process.
        eval_batch_size: Validation images per batch; `batch_size` by default.
        num_workers: Worker processes per loader.
        seed: Seed of the order.
    """

    def __init__(self, batch_size: int, eval_batch_size: int | None, num_workers: int, seed: int) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.num_workers = num_workers
        self.seed = seed
        self._parts: tuple[Any, Any] | None = None
        self._loader: CountedLoader | None = None
        self._place: dict[str, Any] = {}

    def train_dataloader(self) -> CountedLoader:
        """Shuffled training images; continues in the middle of an epoch."""
        assert self._parts is not None
        sampler = CountedSampler(
            len(self._parts[0]),
            batch_size=self.batch_size,
            seed=self.seed,
            num_replicas=self.trainer.world_size if self.trainer else 1,
            rank=self.trainer.global_rank if self.trainer else 0,
        )
        self._loader = CountedLoader(
            self._parts[0], batch_size=self.batch_size, sampler=sampler, drop_last=True, **self._options()
        )
        self._loader.load_state_dict(self._place)
        self._place = {}
        return self._loader

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Validation images in their order; nothing if there are none."""
        assert self._parts is not None
        if not len(self._parts[1]):
            return []
        return DataLoader(self._parts[1], batch_size=self.eval_batch_size, shuffle=False, **self._options())

    def state_dict(self) -> dict[str, Any]:
        """Place in the training data.

        Lightning stores it with the loop as well, but gives it back only to loaders that were made after the
        checkpoint was read, not when ``trainer.estimated_stepping_batches`` has asked for the loader before.
        """
        return {} if self._loader is None else {"train": self._loader.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at that place."""
        self._place = state_dict.get("train", {})
        if self._loader is not None:
            self._loader.load_state_dict(self._place)

    def _options(self) -> dict[str, Any]:
        return {
            "num_workers": self.num_workers,
            "pin_memory": torch.cuda.is_available(),
            "persistent_workers": self.num_workers > 0,
        }


class ImageDataModule(CountedDataModule):
    """Batches of ``images`` (B, C, H, W), floats in [-1, 1], ``labels`` (B,), and ``index`` (B,).

    The index is an image's number in its part of the set, whatever the order. A fixed random choice of the
    images validates; the rest trains, in an order that depends on `seed` alone and goes on where it was when
    a run is resumed.

    Args:
        images: ``mnist5k`` or ``digits``, which ship in packages, or a folder with one sub-folder per class.
        image_size: Pixels per side.
        channels: 1 for grey, 3 for RGB.
        batch_size: Training images per batch and process.
        eval_batch_size: Validation images per batch; `batch_size` by default.
        num_val: Images kept for validation.
        flip: Mirror a random half of every training batch left to right.
        num_workers: Worker processes per loader.
        seed: Seed of the order and of the mirroring.
    """

    image_set: ImageSet

    def __init__(
        self,
        images: str,
        image_size: int = 32,
        channels: int = 3,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        num_val: int = 0,
        flip: bool = False,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, seed)
        self.images = images
        self.image_size = image_size
        self.channels = channels
        self.num_val = num_val
        self.flip = flip

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of their labels; known after ``setup``."""
        return list(self.image_set.names)

    def setup(self, stage: str | None = None) -> None:
        """Open the set and split it; done once."""
        if self._parts is None:
            self.image_set = open_images(self.images, size=self.image_size, channels=self.channels)
            train, val = split(len(self.image_set.labels), self.num_val)
            self._parts = LabelledImages(self.image_set, train), LabelledImages(self.image_set, val)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Mirror half of a training batch, chosen by the number of the step."""
        if self.flip and self.trainer is not None and self.trainer.training:
            stream = generator(self.seed, self.trainer.global_step, self.trainer.global_rank)
            chosen = torch.rand(len(batch["labels"]), generator=stream) < 0.5
            chosen = chosen.to(batch["images"].device)[:, None, None, None]
            batch = {**batch, "images": torch.where(chosen, batch["images"].flip(-1), batch["images"])}
        return batch
