"""Size of a picture as a JPEG file: a reward that needs no network (Black et al. 2023, DDPO).

Sizes depend a little on the library that compresses: libjpeg-turbo 3.2 has the golden ones.

Shapes: B images, C = 3 channels, H x W pixels.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from thalweg.diffusion.rewards.base import Metadata, RewardResult, as_bytes
from thalweg.diffusion.rewards.weights import needed

QUALITY = 95
"""Of the compression."""
KILOBYTE = 1000
"""Bytes."""
SCALE = 500
"""Kilobytes that cost 1."""


def jpeg_bytes(pixels_HWC: np.ndarray, quality: int = QUALITY) -> int:
    """Bytes of a picture as a JPEG file."""
    image = needed("PIL.Image", "jpeg", "pip install 'thalweg[diffusion]'")
    buffer = io.BytesIO()
    image.fromarray(pixels_HWC).save(buffer, format="JPEG", quality=quality)
    return buffer.tell()


@dataclass(frozen=True)
class JpegSize:
    """``factor`` times the kilobytes of a picture."""

    name: str
    """In logs."""
    factor: float
    """Of the kilobytes."""

    def __call__(
        self, images_BCHW: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> RewardResult:
        """Scores; prompts do not matter."""
        sizes = [jpeg_bytes(pixels) for pixels in as_bytes(images_BCHW)]
        kilobytes = torch.tensor(sizes, dtype=torch.float64) / KILOBYTE
        return RewardResult(scores=self.factor * kilobytes, parts={"kilobytes": kilobytes})


def jpeg_compressibility(device: str = "cpu") -> JpegSize:
    """Minus kilobytes / 500."""
    return JpegSize("jpeg_compressibility", -1 / SCALE)


def jpeg_incompressibility(device: str = "cpu") -> JpegSize:
    """Kilobytes."""
    return JpegSize("jpeg_incompressibility", 1.0)
