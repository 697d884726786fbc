"""Channels that are not stored but computed from the grid, by name of their formula.

Legend: X Y grid sizes along axis -2 and -1.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def kolmogorov_forcing(shape: tuple[int, int]) -> np.ndarray:
    """0.1 sin(2 pi (x + y)) on a grid that includes both ends, as the released networks expect it."""
    x = np.linspace(0.0, 1.0, shape[0])[:, None]
    y = np.linspace(0.0, 1.0, shape[1])[None, :]
    return 0.1 * np.sin(2.0 * np.pi * (x + y))


FORMULAS: dict[str, Callable[[tuple[int, int]], np.ndarray]] = {"kolmogorov_forcing": kolmogorov_forcing}
"""Functions of the grid's shape."""


def synthesise(formula: str, shape: tuple[int, int]) -> np.ndarray:
    """Channel X Y of a formula, or of a number written as text, in float32.

    Raises:
        ValueError: neither a known formula nor a number.
    """
    if formula in FORMULAS:
        return FORMULAS[formula](shape).astype(np.float32)
    try:
        value = float(formula)
    except ValueError:
        raise ValueError(
            f"channel formula {formula!r} is neither a number nor one of {sorted(FORMULAS)}"
        ) from None
    return np.full(shape, value, np.float32)
