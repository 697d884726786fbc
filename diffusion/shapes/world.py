"""What ShapesWorld is made of: shapes, colours, the grid, and masks of shapes at any size.

Shapes: H = W pixels, C = 3 channels.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

SHAPES = ("circle", "square", "triangle", "cross")
"""Classes of objects."""
PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (225, 45, 45),
    "green": (45, 190, 70),
    "blue": (50, 85, 230),
    "yellow": (240, 215, 45),
    "purple": (165, 60, 200),
    "white": (245, 245, 245),
}
"""Colours of objects, as bytes."""
COLORS = tuple(PALETTE)
"""Their names."""
BACKGROUND = (60, 60, 60)
"""Grey behind all objects."""
SIZE = 32
"""Pixels per side."""
CELL = 8
"""Pixels per side of a cell; the codec maps each cell to one latent pixel."""
OBJECT = 7
"""Pixels per side of an object, in the upper left of its cell."""
GRID = SIZE // CELL
"""Cells per side."""

ARM = 2 / 7
"""Half of the height of a cross's diagonal bars, as a share of half of its size."""

ROUNDING = 1e-9
"""Keeps masks symmetric where a pixel's centre lies on an edge."""


@lru_cache(maxsize=4096)
def mask(shape: str, height: int = OBJECT, width: int = OBJECT) -> np.ndarray:
    """Pixels of a shape that fills a box of that size, booleans (height, width), not to be written to.

    A pixel belongs to it where its centre does.

    Raises:
        ValueError: For an unknown shape.
    """
    y = (2 * np.arange(height)[:, None] + 1) / height - 1  # centres of pixels, from -1 to 1
    x = (2 * np.arange(width)[None, :] + 1) / width - 1
    if shape == "circle":
        inside = x**2 + y**2 <= 1
    elif shape == "square":
        inside = np.ones((height, width), dtype=bool)
    elif shape == "triangle":
        inside = np.abs(x) <= (y + 1 + 1 / height) / 2 + ROUNDING
    elif shape == "cross":
        inside = np.abs(np.abs(x) - np.abs(y)) <= ARM + ROUNDING
    else:
        raise ValueError(f"ShapesWorld has no shape {shape!r}, allowed: {', '.join(SHAPES)}")
    inside.setflags(write=False)
    return inside
