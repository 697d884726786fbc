"""Boxes of objects in a picture: overlap, and where one lies relative to another, as GenEval defines them.

A box is (x1, y1, x2, y2) in pixels; y points down.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

RELATIONS = ("left of", "right of", "above", "below")
"""What :func:`relative_position` can find."""

TINY = 1e-3
"""Displacements below this, in pixels, are none."""


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of boxes whose corners are pixels that belong to them; 0 of empty ones."""
    inner = _area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    union = _area(a) + _area(b) - inner
    return inner / union if union else 0.0


def relative_position(a: Sequence[float], b: Sequence[float], threshold: float = 0.1) -> set[str]:
    """Relations of box a to box b: none, one or two.

    Along each axis the distance of the centres is shortened by ``threshold`` times the added sizes of the
    boxes, but not beyond 0. A relation holds where this is more than half of the full distance of the
    centres.
    """
    full = [(a[k] + a[k + 2] - b[k] - b[k + 2]) / 2 for k in (0, 1)]
    sizes = [abs(a[k + 2] - a[k]) + abs(b[k + 2] - b[k]) for k in (0, 1)]
    short = [math.copysign(max(abs(d) - threshold * s, 0.0), d) for d, s in zip(full, sizes, strict=True)]
    if all(abs(d) < TINY for d in short):
        return set()
    dx, dy = (d / math.hypot(*full) for d in short)
    holds = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {relation for relation in RELATIONS if holds[relation]}


def _area(box: Sequence[float]) -> float:
    return max(box[2] - box[0] + 1, 0.0) * max(box[3] - box[1] + 1, 0.0)
