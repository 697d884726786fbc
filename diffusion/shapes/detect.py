"""The exact detector of ShapesWorld: classic image processing, one picture in about a millisecond.

Every pixel gets the nearest colour of the palette, connected pixels of one colour are an object, and its
shape is the mask that overlaps it best once stretched to its box. The result goes into
:func:`thalweg.diffusion.metrics.geneval.score_image`.

Shapes: H x W pixels, C = 3 channels, bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from thalweg.diffusion.shapes.world import BACKGROUND, COLORS, PALETTE, SHAPES, mask

AREA = 12
"""Pixels that an object has at least."""
OVERLAP = 0.72
"""Intersection over union with the mask of a shape that a known object has at least."""
UNKNOWN = "unknown"
"""Class of what has no known shape; many of them are a sign of a policy that games its reward."""

_COLORS = np.array([BACKGROUND, *PALETTE.values()], dtype=np.int32)


def detect(pixels_HWC: np.ndarray) -> dict[str, list[dict[str, Any]]]:
    """Objects by class, each with ``box`` (x1, y1, x2, y2; the last ones outside), ``score``, ``color``.

    The score is the intersection over union with the mask of the shape, 1 in a clean rendering.

    Raises:
        ValueError: If the picture does not hold bytes of shape (H, W, 3).
    """
    from scipy import ndimage

    if pixels_HWC.ndim != 3 or pixels_HWC.shape[2] != 3 or pixels_HWC.dtype != np.uint8:
        raise ValueError(f"picture {pixels_HWC.shape} of {pixels_HWC.dtype}, needed: (H, W, 3) of uint8")
    nearest = _nearest(pixels_HWC)
    found: dict[str, list[dict[str, Any]]] = {}
    for index, color in enumerate(COLORS, start=1):
        labels, _ = ndimage.label(nearest == index)
        for number, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
            part = labels[rows, columns] == number
            if part.sum() < AREA:
                continue
            shape, overlap = _classify(part)
            box = [float(v) for v in (columns.start, rows.start, columns.stop, rows.stop)]
            found.setdefault(shape, []).append({"box": box, "score": overlap, "color": color})
    return found


def _nearest(pixels_HWC: np.ndarray) -> np.ndarray:
    """Index of the nearest colour, 0 for the background, (H, W)."""
    distances = ((pixels_HWC[..., None, :].astype(np.int32) - _COLORS) ** 2).sum(axis=-1)
    return distances.argmin(axis=-1)


def _classify(part: np.ndarray) -> tuple[str, float]:
    """Best shape and its intersection over union."""
    overlaps = {}
    for shape in SHAPES:
        template = mask(shape, *part.shape)
        overlaps[shape] = float((part & template).sum() / (part | template).sum())
    best = max(overlaps, key=overlaps.__getitem__)
    return (best if overlaps[best] >= OVERLAP else UNKNOWN), overlaps[best]
