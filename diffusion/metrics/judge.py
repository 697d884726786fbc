"""Scores of drawn images against real ones: extractor, real features and protocol, made once.

Shapes: N images, C channels, H = W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from thalweg.diffusion.metrics.features import embed, extractor
from thalweg.diffusion.metrics.quality import (
    KID_SUBSET_SIZE,
    Part,
    Protocol,
    clip_score,
    fid,
    kid,
    real_images,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Real images and the extractor of their features."""

    images: str
    """Packaged set, or folder."""
    split: Part
    """Part of it."""
    num_val: int
    """Images of the validation part."""
    features: str
    """Extractor."""
    weights: str | None
    """File of its weights."""


class Judge:
    """Scores of drawn images.

    Args:
        source: Real images and extractor.
        metrics: What to compute.
        like_BCHW: A drawn image, for size and channels.
        samples: Images that are drawn for a row.
        clip: Folder of a CLIP model.
        names: Classes of the pipeline.
        device: Where extractors run.

    Raises:
        ValueError: If the images are not square, or the metrics are not for this pipeline and extractor.
    """

    def __init__(
        self,
        source: Source,
        metrics: Sequence[str],
        like_BCHW: Tensor,
        samples: int,
        clip: str | None,
        names: Sequence[str],
        device: str,
    ) -> None:
        _, channels, height, size = like_BCHW.shape
        if height != size:
            raise ValueError(f"the pipeline draws {height} x {size} pixels; real images are made square")
        self.network = extractor(
            source.features,
            images=source.images,
            size=size,
            channels=channels,
            weights=source.weights,
            device=device,
        )
        self.metrics, self.samples, self.clip, self.device = tuple(metrics), samples, clip, device
        if "accuracy" in metrics:
            check_classes(self.network, names)
        pixels, _ = real_images(
            source.images, size=size, channels=channels, part=source.split, num_val=source.num_val
        )
        self.real = embed(self.network, pixels)
        self.protocol = Protocol(
            features=str(self.network.name),
            num_features=self.real.shape[1],
            images=source.images,
            split=source.split,
            num_val=source.num_val,
            real=len(self.real),
            samples=samples,
            kid_subset_size=min(KID_SUBSET_SIZE, samples, len(self.real)),
            size=size,
            channels=channels,
        )

    def __call__(self, images_NCHW: Tensor, shown: Sequence[Any]) -> dict[str, float]:
        """The metrics of drawn images."""
        found = self._distances(embed(self.network, images_NCHW), self.real)
        if "accuracy" in self.metrics:
            found["accuracy"] = accuracy(self.network, images_NCHW, shown)
        if "clip" in self.metrics:
            found["clip"] = clip_score(images_NCHW, list(map(str, shown)), self.clip, device=self.device)
        return found

    def _distances(self, drawn: Tensor, real: Tensor) -> dict[str, float]:
        found = {}
        if "fid" in self.metrics:
            found["fid"] = fid(drawn, real)
        if "kid" in self.metrics:
            size = min(self.protocol.kid_subset_size, len(drawn), len(real))
            found["kid"], found["kid_deviation"] = kid(drawn, real, subset_size=size)
        return found

    def of_real(self) -> list[dict[str, Any]]:
        """Distances of as many real images as are drawn, half of them at most, from the other real ones."""
        count = min(self.samples, len(self.real) // 2)
        if count < 2 or not {"fid", "kid"} & set(self.metrics):
            return []
        order = torch.randperm(len(self.real), generator=torch.Generator().manual_seed(0))
        held_out, rest = self.real[order[:count]], self.real[order[count:]]
        return [{"samples": count, **self._distances(held_out, rest)}]


def check_classes(network: nn.Module, names: Sequence[str]) -> None:
    """Make sure that extractor and pipeline have the same classes.

    Raises:
        ValueError: If they have not.
    """
    about: Any = getattr(network, "about", {})
    known = list(about.get("classes", ()))
    if not known:
        raise ValueError("the metric accuracy needs --features classifier")
    if known != list(names):
        raise ValueError(
            f"the metric accuracy needs a pipeline of the classes {known}, this has {list(names)}"
        )


def accuracy(network: Any, images_NCHW: Tensor, shown: Sequence[Any]) -> float:
    """Part of the images in which the classifier sees the class that was asked for."""
    device = next(network.parameters()).device
    with torch.no_grad():
        parts = [network.logits(part.to(device)).argmax(1).cpu() for part in images_NCHW.split(256)]
    return float((torch.cat(parts) == torch.tensor(list(shown))).double().mean())
