"""ImageReward (Xu et al. 2023): a head on a BLIP that reads the prompt with the image in view.

Shapes: B images, C = 3 channels, H x W pixels; E = 768 numbers of an embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thalweg.diffusion.rewards.aesthetic import Head
from thalweg.diffusion.rewards.base import Metadata, RewardError, RewardResult, as_bytes
from thalweg.diffusion.rewards.weights import needed, weights_file

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the raw scores of the published model, from its code."""


def image_reward(head: Head, embedding_BE: Tensor) -> Tensor:
    """(head(e) - mean) / std of the embedding of an image and its prompt together, (B,)."""
    return (head(embedding_BE) - MEAN) / STD


def own_prompts(matrix_BB: Tensor) -> Tensor:
    """Scores of images with their own prompts, out of those of all images with all prompts, (B,).

    Raises:
        RewardError: If there are not as many prompts as images.
    """
    if matrix_BB.ndim != 2 or matrix_BB.shape[0] != matrix_BB.shape[1]:
        raise RewardError(f"scores of shape {tuple(matrix_BB.shape)}, needed: as many prompts as images")
    return matrix_BB.diagonal()


@dataclass(frozen=True, kw_only=True)
class ImageReward:
    """Scores by the model of the package image-reward, of every image with its own prompt only."""

    model: Any
    """Has ``score(prompt, image)``."""
    name: str = "imagereward"
    """In logs."""

    def __call__(
        self, images_BCHW: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> RewardResult:
        """Scores of images by their prompts."""
        image = needed("PIL.Image", self.name, "pip install pillow")
        pairs = zip(prompts, as_bytes(images_BCHW), strict=True)
        scores = [float(self.model.score(prompt, image.fromarray(pixels))) for prompt, pixels in pairs]
        return RewardResult(scores=torch.tensor(scores, dtype=torch.float64))


def imagereward(device: str = "cpu", *, weights: str | None = None, config: str | None = None) -> ImageReward:
    """Preference of experts, about -2 to 2.

    Weights: ImageReward.pt and med_config.json of https://huggingface.co/THUDM/ImageReward. Licence:
    Apache-2.0. The package image-reward pins old versions of its own dependencies and needs torchvision; a
    server with its own environment (see :mod:`thalweg.diffusion.rewards.server`) keeps them apart.

    Args:
        device: Where the model runs.
        weights: File ImageReward.pt.
        config: File med_config.json.

    Raises:
        RewardError: If a file or the package is missing.
    """
    source = "of https://huggingface.co/THUDM/ImageReward"
    path = weights_file(weights, "imagereward", f"ImageReward.pt {source}")
    settings = weights_file(config, "imagereward", f"med_config.json {source}")
    package = needed("ImageReward", "imagereward", "pip install image-reward")
    return ImageReward(model=package.load(str(path), device=device, med_config=str(settings)))
