"""GenEval on ShapesWorld: its exact detector, no term below 0, and how many objects have no known shape."""

from __future__ import annotations

import numpy as np

from thalweg.diffusion.metrics.geneval import Detections
from thalweg.diffusion.rewards.base import Metadata
from thalweg.diffusion.rewards.geneval import GenEvalReward
from thalweg.diffusion.shapes.detect import UNKNOWN, detect


def shapes(
    device: str = "cpu", *, reference_quirks: bool = False, strict_weight: float = 0.0
) -> GenEvalReward:
    """Partial credit of GenEval for pictures of ShapesWorld.

    Args:
        device: Not used.
        reference_quirks: Score a wrong position as the published code does.
        strict_weight: What is added where everything is right.
    """
    return GenEvalReward(
        detect=_detect,
        name="shapes",
        reference_quirks=reference_quirks,
        clip_counts=True,
        strict_weight=strict_weight,
        extra=(UNKNOWN,),
    )


def detector(device: str = "cpu") -> object:
    """The detector of ShapesWorld for the reward ``geneval``."""
    return _detect


def _detect(pixels_HWC: np.ndarray, metadata: Metadata) -> Detections:
    return detect(pixels_HWC)
