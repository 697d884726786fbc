"""Colours of objects by CLIP, as GenEval names them: the best of ten words for a crop on grey.

Shapes: H x W pixels, C = 3 channels; N objects, E numbers of an embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from thalweg.diffusion.metrics.geneval import COLORS
from thalweg.diffusion.rewards.clip import MEAN, SIZE, STD, features

TEMPLATES = (
    "a photo of a {color} {name}",
    "a photo of a {color}-colored {name}",
    "a photo of a {color} object",
)
"""Whose embeddings are averaged."""
GREY = (0x99, 0x99, 0x99)
"""Takes the place of what is not the object."""
BATCH = 16
"""Crops at once."""


def crop(pixels_HWC: np.ndarray, box: Sequence[float], mask_HW: np.ndarray) -> Tensor:
    """What CLIP sees of an object, (C, 224, 224): its box, grey outside of its mask, normalised.

    The shorter side of the box becomes 224 pixels, bicubic, and the middle square is taken, as open_clip
    does it; half a pixel is rounded to the even one.
    """
    from PIL import Image

    shown = np.where(mask_HW[..., None], pixels_HWC, np.array(GREY, dtype=np.uint8))
    image = Image.fromarray(shown).crop(tuple(round(v) for v in box))
    width, height = image.size
    short = min(width, height)
    size = (int(SIZE * width / short), int(SIZE * height / short))
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (round((side - SIZE) / 2) for side in size)
    square = np.array(image.crop((left, top, left + SIZE, top + SIZE)))
    x = torch.from_numpy(square).permute(2, 0, 1).float() / 255
    mean, std = (x.new_tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (x - mean) / std


@dataclass(frozen=True, kw_only=True)
class ColorClassifier:
    """Zero-shot classification of crops."""

    model: Any
    """CLIPModel of transformers; the published one is the ViT-L/14 of OpenAI."""
    tokenizer: Any
    """Its tokenizer."""
    colors: tuple[str, ...] = COLORS
    """Words to choose from."""
    _known: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @torch.no_grad()
    def __call__(
        self, pixels_HWC: np.ndarray, name: str, boxes: Sequence[Sequence[float]], masks_NHW: np.ndarray
    ) -> list[str]:
        """Colour of each object of a class, by its box and mask."""
        weights = self.model.logit_scale
        texts_KE = self.texts(name)
        found: list[str] = []
        for start in range(0, len(boxes), BATCH):
            rows = range(start, min(start + BATCH, len(boxes)))
            seen = torch.stack([crop(pixels_HWC, boxes[i], masks_NHW[i]) for i in rows])
            seen = seen.to(weights.device, next(self.model.parameters()).dtype)
            images_NE = F.normalize(
                features(self.model.get_image_features(pixel_values=seen)).float(), dim=-1
            )
            found += [self.colors[i] for i in (images_NE @ texts_KE.T).argmax(dim=1).tolist()]
        return found

    @torch.no_grad()
    def texts(self, name: str) -> Tensor:
        """Embedding of every colour for a class, (K, E): the normalised mean of normalised ones."""
        if name not in self._known:
            means = [self._mean(color, name) for color in self.colors]
            self._known[name] = F.normalize(torch.stack(means), dim=-1)
        return self._known[name]

    def _mean(self, color: str, name: str) -> Tensor:
        lines = [template.format(color=color, name=name) for template in TEMPLATES]
        words = self.tokenizer(
            lines, padding="max_length", truncation=True, max_length=77, return_tensors="pt"
        ).to(self.model.logit_scale.device)
        given = {"input_ids": words["input_ids"], "attention_mask": words.get("attention_mask")}
        return F.normalize(features(self.model.get_text_features(**given)).float(), dim=-1).mean(dim=0)
