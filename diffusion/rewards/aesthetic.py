"""LAION's aesthetic predictor: a small head on the image embedding of CLIP-L/14.

Shapes: B images, C = 3 channels, H x W pixels; E = 768 numbers of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thalweg.checkpoints.tensors import load
from thalweg.diffusion.rewards.base import Metadata, RewardError, RewardResult, as_bytes
from thalweg.diffusion.rewards.clip import features
from thalweg.diffusion.rewards.weights import model_folder, needed, weights_file, whole_model

WEIGHTS = "sac+logos+ava1-l14-linearMSE.pth"
"""The published head."""
SOURCE = f"{WEIGHTS} of https://github.com/christophschuhmann/improved-aesthetic-predictor"


class Head(nn.Module):
    """Five linear layers without activations, dropout in training: E - 1024 - 128 - 64 - 16 - 1.

    ImageReward has a head of the same shape.
    """

    def __init__(self, inputs: int = 768) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(inputs, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, embedding_BE: Tensor) -> Tensor:
        """One number for each embedding, (B,)."""
        return self.layers(embedding_BE).squeeze(-1)


def aesthetic_score(head: Head, embedding_BE: Tensor) -> Tensor:
    """Head of embeddings that are divided by their L2 norm, (B,)."""
    return head(F.normalize(embedding_BE, dim=-1))


def load_head(path: str | Path) -> Head:
    """The head of a file, in evaluation mode and without gradients.

    Raises:
        RewardError: If its tensors are not those of the head.
    """
    head, state = Head(), load(path)
    try:
        head.load_state_dict(state)
    except RuntimeError as error:
        raise RewardError(f"{path} holds no aesthetic head: {error}") from None
    return head.eval().requires_grad_(False)


@dataclass(frozen=True, kw_only=True)
class AestheticReward:
    """Head on image embeddings."""

    head: Head
    """What scores them."""
    embed: Callable[[Tensor], Tensor]
    """From images (B, C, H, W) to embeddings (B, E)."""
    name: str = "aesthetic"
    """In logs."""

    def __call__(
        self, images_BCHW: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> RewardResult:
        """Scores; prompts do not matter."""
        return RewardResult(scores=aesthetic_score(self.head, self.embed(images_BCHW)))


def aesthetic(
    device: str = "cpu", *, weights: str | None = None, folder: str | None = None
) -> AestheticReward:
    """How much people liked pictures of that kind, about 4.5 to 7.

    Weights: sac+logos+ava1-l14-linearMSE.pth of
    https://github.com/christophschuhmann/improved-aesthetic-predictor (3.7 MB) and
    https://huggingface.co/openai/clip-vit-large-patch14. Licence: Apache-2.0 of the head; the code of CLIP is
    MIT, its card states none for the weights.

    Args:
        device: Where the networks run.
        weights: File of the head.
        folder: Of CLIP as transformers writes it.

    Raises:
        RewardError: If one of them is missing.
    """
    head = load_head(weights_file(weights, "aesthetic", SOURCE)).to(device)
    path = model_folder(folder, "aesthetic", "folder", "openai/clip-vit-large-patch14")
    transformers = needed("transformers", "aesthetic", "pip install 'thalweg[diffusion]'")
    try:
        model = whole_model(transformers.CLIPModel, path)
        prepare = transformers.CLIPImageProcessor.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise RewardError(f"{path!r} holds no whole CLIP model: {error}") from None
    model = model.eval().requires_grad_(False).to(device)

    def embed(images_BCHW: Tensor) -> Tensor:
        pixels = prepare(images=list(as_bytes(images_BCHW)), return_tensors="pt")["pixel_values"]
        return features(model.get_image_features(pixel_values=pixels.to(device))).to(torch.float32)

    return AestheticReward(head=head, embed=embed)
