"""GenEval's partial credit as a reward, with any detector, and with the exact one of ShapesWorld.

Shapes: B images, C = 3 channels, H x W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from thalweg.diffusion.metrics.geneval import Detections, ImageScore, by_tag, score_image
from thalweg.diffusion.rewards.base import Metadata, Reward, RewardError, RewardResult, as_bytes
from thalweg.diffusion.rewards.detectors import open_detector
from thalweg.diffusion.rewards.registry import open_reward

Detector = Callable[[np.ndarray, Metadata], Detections]
"""Finds objects in bytes (H, W, C), for a prompt with that metadata: raw, by class, perhaps with colours."""


@dataclass(frozen=True, kw_only=True)
class GenEvalReward:
    """Partial credit of GenEval; parts are ``correct``, ``strict``, and both for each task.

    With a ``strict_weight`` the partial credit itself is a part as well.
    """

    detect: Detector
    """Finds objects."""
    name: str = "geneval"
    """In logs."""
    reference_quirks: bool = False
    """See :func:`~thalweg.diffusion.metrics.geneval.score_image`."""
    clip_counts: bool = False
    """The same."""
    strict_weight: float = 0.0
    """What is added to the partial credit of an image that is right in everything."""
    extra: tuple[str, ...] = ()
    """Classes whose detections per image are parts, too."""

    def __call__(
        self, images_BCHW: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> RewardResult:
        """Scores of images with the metadata of GenEval."""
        found = [self.detect(p, m) for p, m in zip(as_bytes(images_BCHW), metadata, strict=True)]
        verdicts = [self._judge(m, d) for m, d in zip(metadata, found, strict=True)]
        tags = [str(m["tag"]) for m in metadata]
        partial = _vector([verdict.score for verdict in verdicts])
        parts = {"partial": partial} if self.strict_weight else {}
        for key in ("correct", "strict"):
            values = [float(verdict[key]) for verdict in verdicts]
            parts[key] = _vector(values)
            parts |= {f"{key}/{tag}": _vector(row) for tag, row in by_tag(values, tags, math.nan).items()}
        for name in self.extra:
            parts[name] = _vector([len(d.get(name, [])) for d in found])
        return RewardResult(scores=partial + self.strict_weight * parts["strict"], parts=parts)

    def _judge(self, metadata: Metadata, found: Detections) -> ImageScore:
        try:
            return score_image(
                metadata, found, reference_quirks=self.reference_quirks, clip_counts=self.clip_counts
            )
        except ValueError as error:
            raise RewardError(f"reward {self.name!r}: {error}") from None


def geneval(
    device: str = "cpu",
    *,
    detector: str | None = None,
    reference_quirks: bool = False,
    strict_weight: float = 0.0,
    **options: Any,
) -> Reward:
    """GenEval with any detector.

    Args:
        device: Where the detector runs.
        detector: ``mask2former``, that of GenEval for photographs, with ``weights``, ``clip`` and
            ``legacy_bgr`` (see :func:`thalweg.diffusion.rewards.detectors.mask2former`); ``shapes``;
            ``remote``, a reward server whose own ``geneval`` detects and scores, with ``url``; or
            ``module:function``, called with the device and the options for a :data:`Detector`.
        reference_quirks: Score a wrong position as the published code does.
        strict_weight: What is added where everything is right.
        options: Of the detector.

    Raises:
        RewardError: If there is no detector, it cannot be imported, or weights or a server are missing.
    """
    if detector is None:
        raise RewardError(
            "reward 'geneval' needs 'detector': mask2former, shapes, remote, or a module:function that makes"
            " one from a device"
        )
    if detector == "remote":
        if reference_quirks or strict_weight:
            name = "reference_quirks" if reference_quirks else "strict_weight"
            raise RewardError(f"{name} is an option of the server's geneval, not of the client's")
        return open_reward("remote", device, **{"name": "geneval", **options})
    return GenEvalReward(
        detect=open_detector(detector, device, dict(options)),
        reference_quirks=reference_quirks,
        strict_weight=strict_weight,
    )


def _vector(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
