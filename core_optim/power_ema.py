"""Profiles of power-function averages, and averages of any length from snapshots of a few.

Mathematics of Karras et al. 2024 (arXiv:2312.02696), section 3 and appendix C. The profile of gamma at t,

    p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1)    for 0 <= tau <= t,

says how much the weights of time tau count in the average. Averages are linear in the weights, so the mixture
of snapshots whose mixed profile is nearest to a wanted one, by least squares, is the best stand-in for its
average. Weights that stay the same between two updates make the recursion of `beta` exact.

Unlike the paper we let shares add up to 1: weights move little about large means, which a mixture should
leave alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST_STD = 1.0 / math.sqrt(12.0)
"""Standard deviation of the profile of gamma = 0, where all weights count the same."""


def std_of(gamma: float) -> float:
    """Standard deviation of a profile in units of t: sqrt((g + 1) / ((g + 2)^2 (g + 3)))."""
    return math.sqrt((gamma + 1.0) / ((gamma + 2.0) ** 2 * (gamma + 3.0)))


def gamma_of(std: float) -> float:
    """Exponent of the profile with a relative standard deviation.

    Raises:
        ValueError: Unless 0 < std <= 1 / sqrt(12), where the exponent is 0.
    """
    if not 0.0 < std <= LARGEST_STD:
        raise ValueError(f"std of the profile is {std}, allowed: 0 < std <= {LARGEST_STD:.4f}")
    low, high = 0.0, 1.0 / std  # std_of falls, and is below 1 / gamma
    while (middle := 0.5 * (low + high)) not in (low, high):
        low, high = (middle, high) if std_of(middle) > std else (low, middle)
    return low if std_of(low) == std else high


def beta(gamma: float, before: float, now: float) -> float:
    """Share of the former average in the next one: (before / now)^(gamma + 1).

    With steps of 1 it is (1 - 1 / t)^(gamma + 1).
    """
    return (before / now) ** (gamma + 1.0)


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """An average that was kept."""

    gamma: float
    """Exponent of its profile."""
    time: float
    """When it was taken."""
    read: Callable[[], dict[str, Tensor]]
    """Gives its weights by name; called once, so that one snapshot at a time is in memory."""


def product(one: tuple[float, float], other: tuple[float, float]) -> float:
    """Inner product of two profiles, each (gamma, time): the integral of their product.

    It is (a + 1) (b + 1) / (a + b + 1) m^(a + b + 1) / (s^(a + 1) t^(b + 1)), m = min(s, t).
    """
    (a, s), (b, t) = one, other
    m = min(s, t)
    return (a + 1.0) * (b + 1.0) / (a + b + 1.0) * (m / s) ** a * (m / t) ** b * m / (s * t)


def coefficients(profiles: Sequence[tuple[float, float]], wanted: tuple[float, float]) -> Tensor:
    """Share of each snapshot in a wanted average, (N,) in float64, adding up to 1, of least squared error.

    Args:
        profiles: (gamma, time) of each snapshot.
        wanted: (gamma, time) of the average.

    Raises:
        ValueError: Without a snapshot up to that time: later weights cannot be in the average.
    """
    usable = [i for i, (_, time) in enumerate(profiles) if time <= wanted[1]]
    if not usable:
        first = min((time for _, time in profiles), default=None)
        raise ValueError(f"no snapshot up to time {wanted[1]:g}, the first is at {first}")
    # In units of the wanted time and with unit norms the system is as well conditioned as it can be.
    scaled = [(profiles[i][0], profiles[i][1] / wanted[1]) for i in usable]
    goal = (wanted[0], 1.0)
    norms = torch.tensor([product(p, p) for p in scaled], dtype=torch.float64).sqrt()
    gram = torch.tensor([[product(p, q) for q in scaled] for p in scaled], dtype=torch.float64)
    right = torch.tensor([product(p, goal) for p in scaled], dtype=torch.float64)
    gram, ones = gram / norms / norms[:, None], 1.0 / norms
    both = torch.linalg.lstsq(gram, torch.stack([right / norms, ones], dim=1), driver="gelsd").solution
    free, fix = both.unbind(dim=1)
    solution = free + fix * (1.0 - free @ ones) / (fix @ ones)
    shares = torch.zeros(len(profiles), dtype=torch.float64)
    shares[usable] = solution / norms
    return shares


def distance(profiles: Sequence[tuple[float, float]], shares: Tensor, wanted: tuple[float, float]) -> float:
    """How far the mixed profile is from the wanted one, relative to the latter's norm."""
    norm = product(wanted, wanted)
    cross = torch.tensor([product(p, wanted) for p in profiles], dtype=torch.float64)
    gram = torch.tensor([[product(p, q) for q in profiles] for p in profiles], dtype=torch.float64)
    squared = shares @ gram @ shares - 2.0 * shares @ cross + norm
    return math.sqrt(max(float(squared), 0.0) / norm)


def reconstruct(snapshots: Sequence[Snapshot], *, std: float, time: float | None = None) -> dict[str, Tensor]:
    """The average of any profile, from snapshots of others, in float32 or wider.

    Args:
        snapshots: At best of two profiles or more, at many times.
        std: Relative standard deviation of the wanted profile.
        time: When the average ends; at the last snapshot by default.

    Raises:
        ValueError: For a std out of range, or without a snapshot up to that time.
    """
    end = max((s.time for s in snapshots), default=0.0) if time is None else float(time)
    shares = coefficients([(s.gamma, s.time) for s in snapshots], (gamma_of(std), end))
    total: dict[str, Tensor] = {}
    kinds: dict[str, torch.dtype] = {}
    for share, snapshot in zip(shares.tolist(), snapshots):
        if share == 0.0:
            continue
        for name, weight in snapshot.read().items():
            part = weight.double() * share
            total[name] = total[name] + part if name in total else part
            kinds[name] = torch.promote_types(weight.dtype, torch.float32)
    return {name: weight.to(kinds[name]) for name, weight in total.items()}
