"""Instances in pictures by Mask2Former (Cheng et al. 2022), treated as the detector of GenEval is.

GenEval uses the Swin-S of mmdet 2.x; its preparation of pictures and its scores of instances are written
anew here, after the network of transformers. That network with converted weights
(:mod:`thalweg.diffusion.metrics.mmdet`) is the same one by its architecture; agreement of detections with
those of mmdet was not measured, since the official weights were not at hand.

Shapes: H x W pixels, C = 3 channels; Q queries, K classes, N instances.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from thalweg.diffusion.metrics.colors import ColorClassifier
from thalweg.diffusion.metrics.geneval import Detections, Rules, kept_indices
from thalweg.diffusion.nft.prompt_sets import CLASSES

LONG, SHORT = 1333, 800
"""Pixels that the sides of a picture are enlarged or reduced to, whichever is reached first."""
DIVISOR = 32
"""Sides are padded to multiples of it."""
MEAN = (123.675, 116.28, 103.53)
"""Of red, green and blue bytes in ImageNet."""
STD = (58.395, 57.12, 57.375)
"""The same."""
MOST = 100
"""Instances of a picture."""


@dataclass(frozen=True, kw_only=True)
class Instances:
    """What was found in a picture, in no particular order."""

    labels: Tensor
    """Classes (N,)."""
    scores: Tensor
    """(N,)."""
    boxes: Tensor
    """(N, 4): x1, y1, x2, y2, tight, the last ones outside; zeros of an empty mask."""
    masks: Tensor
    """(N, H, W), booleans."""


def resized(height: int, width: int) -> tuple[int, int]:
    """Height and width that the network sees, before padding; the ratio is kept up to rounding."""
    scale = min(LONG / max(height, width), SHORT / min(height, width))
    return int(height * scale + 0.5), int(width * scale + 0.5)


def prepare(pixels_HWC: np.ndarray, legacy_bgr: bool = False) -> Tensor:
    """What the network is given, (1, C, H', W'), padded with zeros at the right and at the bottom.

    Pictures are resized as OpenCV's bilinear interpolation of bytes does, up to its rounding.

    Args:
        pixels_HWC: Bytes, red first.
        legacy_bgr: Exchange red and blue, as the published training code does by mistake.
    """
    pixels = pixels_HWC[..., ::-1] if legacy_bgr else pixels_HWC
    x = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None].float()
    size = resized(*pixels.shape[:2])
    x = F.interpolate(x, size, mode="bilinear", align_corners=False).round()
    mean, std = (x.new_tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    down, right = (-side % DIVISOR for side in size)
    return F.pad((x - mean) / std, (0, right, 0, down))


def at_size(
    masks_Qhw: Tensor, padded: tuple[int, int], seen: tuple[int, int], size: tuple[int, int]
) -> Tensor:
    """Logits of masks at the resolution of the picture: enlarged to what the network was given, cut, resized.

    Args:
        masks_Qhw: As the network gives them.
        padded: Height and width that it was given.
        seen: Those without padding.
        size: Those of the picture.
    """
    x = F.interpolate(masks_Qhw[None], padded, mode="bilinear", align_corners=False)
    x = x[..., : seen[0], : seen[1]]
    return F.interpolate(x, size, mode="bilinear", align_corners=False)[0]


def instances(classes_QK: Tensor, masks_QHW: Tensor, most: int = MOST) -> Instances:
    """The best pairs of a query and a class.

    The score is the probability of the class, among the last of which "no object" stands, times the mean of
    the mask's probabilities where they are above one half.

    Args:
        classes_QK: Logits of K classes and of no object, (Q, K + 1).
        masks_QHW: Logits of masks.
        most: Pairs at most.
    """
    probabilities = classes_QK.softmax(dim=-1)[:, :-1]
    number = probabilities.shape[1]
    best, index = probabilities.flatten().topk(min(most, probabilities.numel()))
    logits = masks_QHW[index // number]
    inside = logits > 0
    area = inside.flatten(1).sum(dim=1)
    means = (logits.sigmoid() * inside).flatten(1).sum(dim=1) / (area + 1e-6)
    return Instances(labels=index % number, scores=best * means, boxes=boxes_of(inside), masks=inside)


def boxes_of(masks_NHW: Tensor) -> Tensor:
    """Tight boxes (N, 4) of masks, the last pixel outside; zeros where a mask is empty."""
    boxes = masks_NHW.new_zeros((len(masks_NHW), 4), dtype=torch.float32)
    for box, mask in zip(boxes, masks_NHW, strict=True):
        rows, columns = mask.any(dim=1).nonzero().flatten(), mask.any(dim=0).nonzero().flatten()
        if len(rows):
            box[:] = torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    return boxes


@dataclass(frozen=True, kw_only=True)
class Mask2FormerDetector:
    """A detector for :func:`~thalweg.diffusion.metrics.geneval.score_image`, one picture at a time."""

    model: Any
    """Mask2FormerForUniversalSegmentation of transformers, for the 80 classes of COCO in their order."""
    colors: ColorClassifier
    """Names colours, of objects whose colour a prompt asks for."""
    legacy_bgr: bool = False
    """See :func:`prepare`; colours are not concerned."""
    rules: Rules = Rules()  # noqa: RUF009 - frozen
    """Which objects' colours are asked for."""

    @torch.no_grad()
    def __call__(self, pixels_HWC: np.ndarray, metadata: Any) -> Detections:
        """Objects by class in bytes (H, W, C), with the colours that a prompt's metadata asks for."""
        found = self.find(pixels_HWC)
        groups: dict[str, list[dict[str, Any]]] = {}
        members: dict[str, list[int]] = {}
        rows = zip(found.labels.tolist(), found.scores.tolist(), found.boxes.tolist(), strict=True)
        for i, (label, score, box) in enumerate(rows):
            if score > 0:
                groups.setdefault(CLASSES[label], []).append({"box": box, "score": score})
                members.setdefault(CLASSES[label], []).append(i)
        wanted = {item["class"] for item in metadata.get("include", []) if "color" in item}
        chosen = kept_indices({k: v for k, v in groups.items() if k in wanted}, metadata["tag"], self.rules)
        for name, order in chosen.items():
            where = [members[name][i] for i in order]
            self._paint(pixels_HWC, name, [groups[name][i] for i in order], found.masks[where])
        return groups

    def find(self, pixels_HWC: np.ndarray) -> Instances:
        """All instances, up to :data:`MOST`."""
        x = prepare(pixels_HWC, self.legacy_bgr)
        answer = self.model(pixel_values=x.to(self.model.device, self.model.dtype))
        size = pixels_HWC.shape[:2]
        padded = (x.shape[2], x.shape[3])
        masks = at_size(answer.masks_queries_logits[0].float(), padded, resized(*size), (size[0], size[1]))
        return instances(answer.class_queries_logits[0].float(), masks)

    def _paint(
        self, pixels_HWC: np.ndarray, name: str, things: list[dict[str, Any]], masks_NHW: Tensor
    ) -> None:
        boxes = [thing["box"] for thing in things]
        for thing, color in zip(things, self.colors(pixels_HWC, name, boxes, masks_NHW.cpu().numpy())):
            thing["color"] = color
