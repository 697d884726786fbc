"""Starts with the ends that a teacher gave them, and the distance of a sampler's results from them.

Shapes: B starts, ... anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from thalweg.diffusion.solvers.linear import Compilable
from thalweg.diffusion.solvers.sample import sample
from thalweg.diffusion.solvers.schedule import Node

Denoiser = Callable[..., Tensor]
"""Data prediction of (x, alpha, sigma, label) or (x, alpha, sigma, label, condition); levels are scalars."""


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Starts and what they should become.

    Raises:
        ValueError: If their numbers differ or there are none.
    """

    x_T: Tensor
    """Starts, B ..."""
    target: Tensor
    """Ends of the teacher, B ..."""
    condition: Tensor | None = None
    """What the denoiser is given beside the state, B ..."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not len(self.x_T) or self.x_T.shape != self.target.shape:
            shapes = f"{tuple(self.x_T.shape)} and {tuple(self.target.shape)}"
            raise ValueError(f"starts and ends must have one shape with at least one of each, got {shapes}")
        if self.condition is not None and len(self.condition) != len(self.x_T):
            raise ValueError(f"{len(self.x_T)} starts but {len(self.condition)} conditions")

    def __len__(self) -> int:
        """Number of starts."""
        return len(self.x_T)

    def pick(self, index: Tensor | slice) -> Examples:
        """Some of them."""
        condition = None if self.condition is None else self.condition[index]
        return Examples(x_T=self.x_T[index], target=self.target[index], condition=condition)


def evaluate(
    sampler: Compilable,
    denoiser: Denoiser,
    examples: Examples,
    batch_size: int | None = None,
    mean: Tensor | None = None,
    judge: Callable[[Tensor, Tensor], float] | None = None,
) -> float:
    """Median distance between the sampler's results and the ends, or another number of them.

    Infinite if one is not a number.
    """
    found = []
    with torch.no_grad():
        for part in _parts(examples, batch_size):
            found.append(sample(sampler, _at_node(denoiser, part.condition), part.x_T, mean)[-1])
    results = torch.cat(found)
    if not bool(torch.isfinite(results).all()):
        return math.inf
    value = median(distances(results, examples.target)) if judge is None else judge(results, examples.target)
    return value if math.isfinite(value) else math.inf


def distances(x: Tensor, target: Tensor) -> Tensor:
    """Euclidean distance of each sample, B."""
    return torch.linalg.vector_norm((x - target).flatten(1), dim=1)


def _at_node(denoiser: Denoiser, condition: Tensor | None) -> Callable[[Tensor, Node], Tensor]:
    """The denoiser as the plain sampler calls it."""
    extra = () if condition is None else (condition,)

    def data(x: Tensor, node: Node) -> Tensor:
        alpha, sigma = (
            torch.tensor(node.alpha, dtype=torch.float64),
            torch.tensor(node.sigma, dtype=torch.float64),
        )
        label = None if node.label is None else torch.tensor(node.label, dtype=torch.float64)
        return denoiser(x, alpha, sigma, label, *extra)

    return data


def _parts(examples: Examples, size: int | None) -> list[Examples]:
    if size is None:
        return [examples]
    return [examples.pick(slice(k, k + size)) for k in range(0, len(examples), size)]


def median(distance_B: Tensor) -> float:
    """Median of distances."""
    return float(distance_B.to(torch.float64).quantile(0.5))
