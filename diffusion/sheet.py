"""Many images on one sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

TILE = 64
"""Smallest side of an image in the grid, in pixels."""


def grid(images: Sequence[Image], columns: int | None = None) -> Image:
    """All images on one sheet, small ones enlarged by a whole factor.

    Args:
        images: Images of one size.
        columns: Images in a row; about as many as rows by default.
    """
    from PIL import Image

    columns = columns or math.ceil(math.sqrt(len(images)))
    width, height = images[0].size
    factor = max(1, math.ceil(TILE / max(width, height)))
    width, height, gap = width * factor, height * factor, 2 * factor
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, image in enumerate(images):
        large = image.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(large, (i % columns * (width + gap), i // columns * (height + gap)))
    return sheet
