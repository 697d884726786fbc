"""What a refinement descends: the distance to a teacher, or that with the distance of two distributions.

A goal has a loss of the results of a batch, which differentiates, and judges many results by one number.

Shapes: B results, ... anything; F features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

import torch
from torch import Tensor

from thalweg.diffusion.metrics.distance import gaussian, squared_frechet
from thalweg.diffusion.s3.examples import distances, median

Loss = Literal["l2", "mse", "log"]


class Goal(Protocol):
    """What is to become small."""

    def loss(self, end: Tensor, target: Tensor) -> Tensor:
        """One number of results and the ends of a teacher, both (B, ...), that differentiates."""

    def judge(self, end: Tensor, target: Tensor) -> float:
        """One number of many results; lower is better."""


class Distance:
    """The distance to the teacher, judged by its median.

    Args:
        kind: What is descended.
    """

    def __init__(self, kind: Loss = "l2") -> None:
        self.kind: Loss = kind

    def loss(self, end: Tensor, target: Tensor) -> Tensor:
        """Mean over the results."""
        return loss_of(distances(end, target), self.kind)

    def judge(self, end: Tensor, target: Tensor) -> float:
        """Median over the results."""
        return median(distances(end, target))


class Distribution:
    """Frechet distance of the results' features to those of real images, plus some distance to the teacher.

    The latter keeps the sampler the one that the teacher is: the Frechet distance alone would take any
    results with the right moments. It falls with the number of results, so that only numbers on equally many
    can be compared.

    Args:
        features: Features (B, F) of results (B, ...), differentiable.
        real: Mean and covariance of those of real images.
        weight: Of the distance to the teacher.
    """

    def __init__(
        self, features: Callable[[Tensor], Tensor], real: tuple[Tensor, Tensor], weight: float = 0.15
    ) -> None:
        self.features, self.real, self.weight = features, real, weight

    def loss(self, end: Tensor, target: Tensor) -> Tensor:
        """With the median distance to the teacher.

        Its derivative is that of one result, a rough one; that of the mean holds on to the teacher so evenly
        that the Frechet distance fell less at an equal distance.
        """
        return self.frechet(end) + self.weight * distances(end, target).median()

    def judge(self, end: Tensor, target: Tensor) -> float:
        """With the median distance to the teacher."""
        with torch.no_grad():
            return float(self.frechet(end)) + self.weight * median(distances(end, target))

    def frechet(self, end: Tensor) -> Tensor:
        """The Frechet distance alone."""
        return squared_frechet(self.real, gaussian(self.features(end)))


def loss_of(distance_B: Tensor, kind: Loss) -> Tensor:
    """One number of the distances."""
    if kind == "mse":
        return (distance_B**2).mean()
    return distance_B.mean() if kind == "l2" else distance_B.clamp_min(1e-12).log().mean()
