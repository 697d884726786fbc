"""Rewards of CLIP-like models: CLIPScore, PickScore and HPSv2.1, as functions of embeddings and as rewards.

All are cosines of an image's and its prompt's embeddings. Nothing is downloaded: every factory takes folders
or files, and says which where they are missing.

Shapes: B images, C = 3 channels, H x W pixels, floats from 0 to 1; E numbers of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from thalweg.diffusion.rewards.base import Metadata, RewardError, RewardResult, as_bytes
from thalweg.diffusion.rewards.weights import model_folder, needed, weights_file, whole_model

INSTALL = "pip install 'thalweg[diffusion]'"
MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Of the pixels that OpenAI's CLIP was trained with."""
STD = (0.26862954, 0.26130258, 0.27577711)
"""The same."""
SIZE = 224
"""Pixels per side that these models see."""
PICK_SCALE = 26.0
"""Divisor of PickScore as a reward; tables print it without."""
CLIP_SCALE = 100.0
"""Divisor of the logits of CLIP, at which its scale is capped."""


def cosine(image_BE: Tensor, text_BE: Tensor) -> Tensor:
    """Cosine of every image with its own prompt, (B,)."""
    return F.cosine_similarity(image_BE, text_BE, dim=-1)


def clip_score(image_BE: Tensor, text_BE: Tensor, logit_scale: Tensor | float) -> Tensor:
    """exp(logit_scale) cos / 100: the cosine where the scale is at its cap (Hessel et al. 2021), (B,)."""
    return _exp(logit_scale, image_BE) * cosine(image_BE, text_BE) / CLIP_SCALE


def pick_score(image_BE: Tensor, text_BE: Tensor, logit_scale: Tensor | float) -> Tensor:
    """exp(logit_scale) cos / 26 (Kirstain et al. 2023; published tables print 26 times this), (B,)."""
    return _exp(logit_scale, image_BE) * cosine(image_BE, text_BE) / PICK_SCALE


def hps_score(image_BE: Tensor, text_BE: Tensor, logit_scale: Tensor | float = 0.0) -> Tensor:
    """The cosine, without the scale of the logits (Wu et al. 2023), (B,)."""
    return cosine(image_BE, text_BE)


def centre_crop(images_BCHW: Tensor) -> Tensor:
    """Shorter side to 224 pixels, bilinear and antialiased, the middle square, normalised."""
    height, width = images_BCHW.shape[2:]
    scale = SIZE / min(height, width)
    size = (max(SIZE, int(height * scale)), max(SIZE, int(width * scale)))
    x = F.interpolate(images_BCHW.float(), size, mode="bilinear", antialias=True, align_corners=False)
    top, left = round((size[0] - SIZE) / 2), round((size[1] - SIZE) / 2)
    return _normalised(x[:, :, top : top + SIZE, left : left + SIZE])


def pad_to_square(images_BCHW: Tensor) -> Tensor:
    """Longer side to 224 pixels, bicubic and antialiased, black around it, normalised."""
    height, width = images_BCHW.shape[2:]
    scale = SIZE / max(height, width)
    size = (round(height * scale), round(width * scale))
    x = F.interpolate(images_BCHW.float(), size, mode="bicubic", antialias=True, align_corners=False)
    down, right = SIZE - size[0], SIZE - size[1]
    x = F.pad(x.clamp(0, 1), (right // 2, right - right // 2, down // 2, down - down // 2))
    return _normalised(x)


def features(found: Any) -> Tensor:
    """Embeddings, whether transformers gives them bare or as an object with ``pooler_output``."""
    return found if isinstance(found, Tensor) else found.pooler_output


@dataclass(frozen=True, kw_only=True)
class ClipReward:
    """A function of the embeddings of a CLIP model."""

    name: str
    """In logs."""
    model: Any
    """CLIPModel of transformers."""
    tokenizer: Any
    """Its tokenizer."""
    pixels: Callable[[Tensor], Tensor]
    """From images (B, C, H, W) to what the model sees."""
    formula: Callable[[Tensor, Tensor, Tensor], Tensor]
    """From both embeddings and the scale of the logits to scores (B,)."""

    def __call__(
        self, images_BCHW: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> RewardResult:
        """Scores of images by their prompts."""
        device = self.model.logit_scale.device
        words = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=77, return_tensors="pt"
        ).to(device)
        dtype = next(self.model.parameters()).dtype
        seen = self.pixels(images_BCHW).to(device=device, dtype=dtype)
        image = features(self.model.get_image_features(pixel_values=seen)).float()
        text = features(
            self.model.get_text_features(
                input_ids=words["input_ids"], attention_mask=words.get("attention_mask")
            )
        ).float()
        return RewardResult(scores=self.formula(image, text, self.model.logit_scale.float()))


def clipscore(device: str = "cpu", *, folder: str | None = None) -> ClipReward:
    """Cosine of image and prompt, about 0.2 to 0.35.

    Weights: https://huggingface.co/openai/clip-vit-large-patch14. Licence: the code of CLIP is MIT, its card
    states none for the weights.

    Args:
        device: Where the model runs.
        folder: Of the model as transformers writes it.

    Raises:
        RewardError: If there is no such folder.
    """
    model, tokenizer = _load(model_folder(folder, "clipscore", "folder", "openai/clip-vit-large-patch14"))
    return ClipReward(
        name="clipscore",
        model=_ready(model, device),
        tokenizer=tokenizer,
        pixels=centre_crop,
        formula=clip_score,
    )


def pickscore(device: str = "cpu", *, folder: str | None = None, processor: str | None = None) -> ClipReward:
    """Preference of people who picked one of two images, about 0.75 to 0.95.

    Weights: https://huggingface.co/yuvalkirstain/PickScore_v1, a CLIP-H/14. Its tokenizer and preprocessing
    are those of https://huggingface.co/laion/CLIP-ViT-H-14-laion2B-s32B-b79K. Licence: MIT of the repository
    and of the CLIP of LAION; the card of PickScore_v1 was not verified.

    Args:
        device: Where the model runs.
        folder: Of the model as transformers writes it.
        processor: Folder of the tokenizer and preprocessing; that of the model by default.

    Raises:
        RewardError: If there is no such folder.
    """
    path = model_folder(folder, "pickscore", "folder", "yuvalkirstain/PickScore_v1")
    model, tokenizer = _load(path, processor)
    prepare = _call("CLIPImageProcessor", processor or path)

    def pixels(images_BCHW: Tensor) -> Tensor:
        return prepare(images=list(as_bytes(images_BCHW)), return_tensors="pt")["pixel_values"]

    return ClipReward(
        name="pickscore", model=_ready(model, device), tokenizer=tokenizer, pixels=pixels, formula=pick_score
    )


def hpsv2(device: str = "cpu", *, weights: str | None = None, tokenizer: str | None = None) -> ClipReward:
    """Human preference score 2.1, about 0.2 to 0.38.

    Weights: HPS_v2.1_compressed.pt of https://huggingface.co/xswu/HPSv2, a CLIP-H/14 in the layout of
    open_clip, which is converted here. Licence: Apache-2.0.

    Args:
        device: Where the model runs.
        weights: That file.
        tokenizer: Folder of a CLIP tokenizer, such as that of laion/CLIP-ViT-H-14-laion2B-s32B-b79K.

    Raises:
        RewardError: If the file or the folder is missing.
    """
    from thalweg.checkpoints.tensors import load
    from thalweg.diffusion.rewards.open_clip import clip_from_open_clip

    path = weights_file(weights, "hpsv2", "HPS_v2.1_compressed.pt of https://huggingface.co/xswu/HPSv2")
    if tokenizer is None:
        raise RewardError(
            "reward 'hpsv2' needs 'tokenizer', the folder of a CLIP tokenizer; "
            "`hf download laion/CLIP-ViT-H-14-laion2B-s32B-b79K --include '*.json' --include merges.txt "
            "--local-dir FOLDER` makes one"
        )
    words = _call("CLIPTokenizer", tokenizer)
    model = clip_from_open_clip(load(path))
    return ClipReward(
        name="hpsv2", model=_ready(model, device), tokenizer=words, pixels=pad_to_square, formula=hps_score
    )


def _load(folder: str, processor: str | None = None) -> tuple[Any, Any]:
    transformers = needed("transformers", "clipscore", INSTALL)
    return whole_model(transformers.CLIPModel, folder), _call("CLIPTokenizer", processor or folder)


def _call(kind: str, folder: str) -> Any:
    transformers = needed("transformers", kind, INSTALL)
    try:
        return getattr(transformers, kind).from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise RewardError(f"{folder!r} holds no whole {kind}: {error}") from None


def _ready(model: Any, device: str) -> Any:
    return model.eval().requires_grad_(False).to(device)


def _exp(logit_scale: Tensor | float, like: Tensor) -> Tensor:
    return torch.as_tensor(logit_scale, dtype=like.dtype, device=like.device).exp()


def _normalised(x_BCHW: Tensor) -> Tensor:
    mean, std = (x_BCHW.new_tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    return (x_BCHW - mean) / std
