"""Pictures of ShapesWorld: objects at places that fit a caption, drawn without antialiasing.

Shapes: H = W = 32 pixels, C = 3 channels, bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from thalweg.diffusion.metrics.boxes import relative_position
from thalweg.diffusion.shapes.world import BACKGROUND, CELL, COLORS, GRID, OBJECT, PALETTE, SIZE, mask

TRIES = 10_000
"""Arrangements that are tried before a caption is called impossible."""


@dataclass(frozen=True, slots=True)
class Thing:
    """An object in its cell."""

    shape: str
    """Class."""
    color: str
    """Name in the palette."""
    row: int
    """Cell, counted from the top."""
    column: int
    """Cell, counted from the left."""

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Corners (x1, y1, x2, y2) in pixels, the last ones outside."""
        x, y = self.column * CELL, self.row * CELL
        return (x, y, x + OBJECT, y + OBJECT)


def picture(metadata: Mapping[str, Any], rng: np.random.Generator) -> np.ndarray:
    """A picture of a caption and of nothing else, bytes (H, W, C)."""
    return render(arrange(metadata, rng))


def arrange(metadata: Mapping[str, Any], rng: np.random.Generator) -> list[Thing]:
    """Objects of a caption in random cells, with random colours where it names none.

    Raises:
        ValueError: If they do not fit into the grid.
    """
    items = metadata["include"]
    total = sum(item["count"] for item in items)
    if total > GRID * GRID:
        raise ValueError(f"{total} objects do not fit into {GRID * GRID} cells")
    for _ in range(TRIES):
        cells = iter(rng.permutation(GRID * GRID)[:total].tolist())
        groups = [[divmod(next(cells), GRID) for _ in range(item["count"])] for item in items]
        if all(_fits(item, group, groups) for item, group in zip(items, groups, strict=True)):
            break
    else:
        raise ValueError(f"no arrangement fits {metadata.get('prompt', items)!r} in {TRIES} tries")
    return [
        Thing(item["class"], item.get("color") or COLORS[int(rng.integers(len(COLORS)))], row, column)
        for item, group in zip(items, groups, strict=True)
        for row, column in group
    ]


def render(things: Iterable[Thing]) -> np.ndarray:
    """Draw objects on grey, bytes (H, W, C).

    Raises:
        ValueError: For unknown shapes or colours, or a cell outside of the grid.
    """
    pixels = np.full((SIZE, SIZE, 3), BACKGROUND, dtype=np.uint8)
    for thing in things:
        if thing.color not in PALETTE:
            raise ValueError(f"ShapesWorld has no colour {thing.color!r}, allowed: {', '.join(COLORS)}")
        if not (0 <= thing.row < GRID and 0 <= thing.column < GRID):
            raise ValueError(f"cell ({thing.row}, {thing.column}) is outside of the {GRID} x {GRID} grid")
        x1, y1, x2, y2 = thing.box
        pixels[y1:y2, x1:x2][mask(thing.shape)] = PALETTE[thing.color]
    return pixels


Cells = Sequence[tuple[int, int]]


def _fits(item: Mapping[str, Any], group: Cells, groups: Sequence[Cells]) -> bool:
    """Whether a relation holds between all objects and all of its targets, by GenEval's own measure."""
    if "position" not in item:
        return True
    relation, index = item["position"]
    return all(relation in relative_position(_box(a), _box(b)) for a in group for b in groups[index])


def _box(cell: tuple[int, int]) -> tuple[int, int, int, int]:
    return Thing("square", "white", *cell).box
