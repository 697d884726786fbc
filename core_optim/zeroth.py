"""What zeroth-order optimizers share: directions, shifted and updated weights, rounding, random states.

Everything random is a function of (seed, step, parameter index, sample), so a direction is drawn again and
never stored. Products and sums are separate operations, each rounded once, so their bits do not depend on
the layout of a tensor, on vector widths or on threads: plain and streamed runs agree bitwise. They are those
of one device: CPU and CUDA generators give different numbers for one seed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from thalweg.core_optim.engine.random import mix
from thalweg.core_optim.engine.update import HALF
from thalweg.core_optim.engine.views import as_real

DIRECTION, ROUNDING = 0, 1


class Directions(Protocol):
    """Source of the directions z."""

    def draw(self, step: int, index: int, like: Tensor, sample: int = 0) -> Tensor:
        """A new tensor of the shape and device of ``like``; the caller may change it in place.

        Args:
            step: Optimizer steps done before this one.
            index: Number of the parameter in the optimizer, frozen ones counted.
            like: The parameter; complex ones as their real view.
            sample: Number of the direction, if several are averaged.
        """
        ...


class GaussianDirections:
    """z ~ N(0, I), in float32 for parameters of 16 bits and in the parameter's precision otherwise."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def draw(self, step: int, index: int, like: Tensor, sample: int = 0) -> Tensor:
        """See :class:`Directions`."""
        generator = stream(like.device, self.seed, step, index, sample, DIRECTION)
        return torch.randn(like.shape, dtype=wide(like.dtype), device=like.device, generator=generator)


@dataclass(frozen=True)
class Descent:
    """A finished step's update: what has to be known to repeat it on any parameter."""

    step: int
    """Step that it belongs to; with the seed it gives the directions."""
    gradients: tuple[float, ...]
    """Projected gradients, one per direction."""
    rates: tuple[tuple[float, float], ...]
    """Learning rate and weight decay of each group, as they were at that step."""


def stream(device: torch.device | str, *key: int) -> torch.Generator:
    """A private generator for a key of integers."""
    return torch.Generator(device).manual_seed(mix(*key))


def wide(dtype: torch.dtype) -> torch.dtype:
    """The number type that weights of a type are computed in."""
    return torch.float32 if dtype in HALF else dtype


def real(parameter: Tensor) -> Tensor:
    """The weights as real numbers: complex ones (...) as (..., 2)."""
    return as_real(parameter.detach())


def shifted(weights: Tensor, direction: Tensor, scale: float) -> Tensor:
    """Sum of weights and scale * direction, in the precision of the direction, which is overwritten."""
    return direction.mul_(scale).add_(weights)


def updated(
    weights: Tensor, descent: Descent, index: int, group: int, directions: Directions
) -> Tensor | None:
    """Weights after a step, in wide precision: p - lr (mean_k g_k z_k + decay p); None if lr is zero.

    Malladi et al. 2023 (arXiv 2305.17333), algorithm 1, with decoupled decay of the old weights.

    Args:
        weights: p, real.
        descent: The update.
        index: Number of the parameter.
        group: Number of its group.
        directions: Source of z.
    """
    lr, decay = descent.rates[group]
    if lr == 0.0:
        return None
    total: Tensor | None = None
    for sample, gradient in enumerate(descent.gradients):
        part = directions.draw(descent.step, index, weights, sample)
        part.mul_(gradient / len(descent.gradients))
        total = part if total is None else total.add_(part)
    assert total is not None
    if decay:
        total.add_(weights.to(total.dtype).mul(decay))
    return total.mul_(-lr).add_(weights)


def settle(target: Tensor, value: Tensor, seed: int, step: int, index: int, *, stochastic: bool) -> None:
    """Store a value in a tensor of maybe fewer bits."""
    if stochastic and target.dtype in HALF and value.dtype == torch.float32:
        value = rounded(value, target.dtype, stream(target.device, seed, step, index, 0, ROUNDING))
    target.copy_(value)


def rounded(value: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Stochastic rounding to bfloat16 or float16: one of the two neighbours, right on average.

    Values that the type has are kept; beyond its range they saturate.

    Args:
        value: float32.
        dtype: torch.bfloat16 or torch.float16.
        generator: On the device of value.
    """
    limit = torch.finfo(dtype).max
    value = value.clamp(-limit, limit)
    near = value.to(dtype)
    error = value - near.float()
    # consecutive bit patterns are neighbours; those of numbers below zero run the other way
    bits = near.view(torch.int16)
    grows = (error > 0) == (bits >= 0)
    other = torch.where(grows, bits + 1, bits - 1)
    from_zero = torch.where(error > 0, 1, -(2**15) + 1).to(torch.int16)
    other = torch.where(near == 0, from_zero, other).view(dtype)
    gap = (other.float() - near.float()).abs()
    chance = torch.rand(value.shape, device=value.device, generator=generator)
    return torch.where((error != 0) & (chance * gap < error.abs()), other, near)


class RandomState:
    """State of torch's global generators, to give several evaluations the same dropout masks."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.devices = sorted({t.device.index for t in tensors if t.device.type == "cuda"})

    def get(self) -> list[Tensor]:
        """States of the CPU's and the CUDA devices' generators."""
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(index) for index in self.devices)]

    def set(self, states: Sequence[Tensor]) -> None:
        """Go back to states from :meth:`get`."""
        torch.set_rng_state(states[0])
        for index, state in zip(self.devices, states[1:], strict=True):
            torch.cuda.set_rng_state(state, index)
