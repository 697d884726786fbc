"""From rewards to advantages to optimality probabilities (Zheng et al. 2025, arXiv 2509.16117).

Shapes: N images of an epoch, B images of a batch. Rewards are few: they are counted on the CPU in float64.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

Std = Literal["global", "group"]
AdvMode = Literal["all", "positive_only", "negative_only", "one_only", "binary"]
Groups = Tensor | Sequence[Hashable] | NDArray[np.generic]

EPSILON = 1e-4
"""Added to standard deviations."""
TOPS = (100, 75, 50, 25, 10)
"""Shares of the best images of a group whose mean reward is reported, in percent."""


def group_advantage(rewards: ArrayLike | Tensor, groups: Groups, *, std: Std = "global") -> Tensor:
    """Reward of each image less its group's mean, over a standard deviation: A = (R - mean) / (std + 1e-4).

    Args:
        rewards: N numbers.
        groups: What images of one group share: N integers, or anything else that can be compared.
        std: ``global`` divides by the deviation of all N rewards, ``group`` by that of the group. Both are
            those of the population.

    Returns:
        N numbers in float64 on the device of the rewards.

    Raises:
        ValueError: For another std, no or infinite or missing (NaN) rewards, or groups of another number.
    """
    if std not in get_args(Std):
        raise ValueError(f"std is {std!r}, allowed: {', '.join(get_args(Std))}")
    r_N, group_N = _read(rewards, groups)
    mean_G, std_G = _moments(r_N, group_N)
    spread_N = std_G[group_N] if std == "group" else np.full_like(r_N, r_N.std())
    advantage_N = torch.from_numpy((r_N - mean_G[group_N]) / (spread_N + EPSILON))
    return advantage_N.to(rewards.device) if isinstance(rewards, Tensor) else advantage_N


def optimality(advantage: Tensor, *, adv_clip_max: float, adv_mode: AdvMode = "all") -> Tensor:
    """Probability r in [0, 1] that an image is optimal: A clipped to +-A_max, then A / (2 A_max) + 1/2.

    Args:
        advantage: Numbers in any shape.
        adv_clip_max: A_max, positive.
        adv_mode: What is left of A after clipping: ``all`` of it, its positive or negative part
            (``positive_only``, ``negative_only``), 1 where it is positive and else 0 (``one_only``), or its
            sign (``binary``).

    Raises:
        ValueError: For another mode, or a limit that is not positive.
    """
    if adv_mode not in get_args(AdvMode):
        raise ValueError(f"adv_mode is {adv_mode!r}, allowed: {', '.join(get_args(AdvMode))}")
    if not adv_clip_max > 0:
        raise ValueError(f"adv_clip_max is {adv_clip_max}, allowed: any positive number")
    a = advantage.clamp(-adv_clip_max, adv_clip_max)
    if adv_mode == "positive_only":
        a = a.clamp(min=0)
    elif adv_mode == "negative_only":
        a = a.clamp(max=0)
    elif adv_mode == "one_only":
        a = (a > 0).to(a.dtype)
    elif adv_mode == "binary":
        a = a.sign()
    return (a / (2 * adv_clip_max) + 0.5).clamp(0, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardStatistics:
    """What the rewards of an epoch say about its groups."""

    population_std: float
    """Standard deviation of all rewards."""
    groups: int
    """Number of groups."""
    group_size: float
    """Mean number of images of a group."""
    zero_std_ratio: float
    """Share of groups whose rewards are all equal: their advantage is 0, they only hold the policy back."""
    reward_std_mean: float
    """Mean of the standard deviations of the groups."""
    mean_of_top: Mapping[int, float]
    """Mean over groups of the mean reward of their best images, by the share of them in percent."""


def reward_statistics(rewards: ArrayLike | Tensor, groups: Groups) -> RewardStatistics:
    """Statistics of the rewards of an epoch.

    The best p percent of a group are the images at or above the (100 - p)th percentile of its rewards.

    Raises:
        ValueError: As group_advantage does.
    """
    r_N, group_N = _read(rewards, groups)
    members = [r_N[group_N == g] for g in range(group_N.max() + 1)]
    tops = {top: [m[m >= np.percentile(m, 100 - top)].mean() for m in members] for top in TOPS}
    return RewardStatistics(
        population_std=float(r_N.std()),
        groups=len(members),
        group_size=len(r_N) / len(members),
        zero_std_ratio=float(np.mean([m.min() == m.max() for m in members])),
        reward_std_mean=float(_moments(r_N, group_N)[1].mean()),
        mean_of_top={top: float(np.mean(means)) for top, means in tops.items()},
    )


def _read(rewards: ArrayLike | Tensor, groups: Groups) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Rewards, and the number of each one's group from 0 on."""
    found = rewards.detach().cpu().double().numpy() if isinstance(rewards, Tensor) else rewards
    r_N = np.asarray(found, np.float64)
    names = groups.tolist() if isinstance(groups, Tensor | np.ndarray) else list(groups)
    if r_N.ndim != 1 or r_N.size == 0 or len(names) != r_N.size:
        raise ValueError(f"rewards have shape {r_N.shape} with {len(names)} groups, needed: N of each, N > 0")
    if not np.isfinite(r_N).all():
        (wrong,) = np.nonzero(~np.isfinite(r_N))
        listed = ", ".join(f"{r_N[i]} of image {i}" for i in wrong[:3].tolist())
        raise ValueError(f"{len(wrong)} of {r_N.size} rewards are not finite: {listed}")
    numbers: dict[Hashable, int] = {}
    return r_N, np.array([numbers.setdefault(name, len(numbers)) for name in names])


def _moments(
    r_N: NDArray[np.float64], group_N: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation of each group."""
    count_G = np.bincount(group_N)
    mean_G = np.bincount(group_N, r_N) / count_G
    return mean_G, np.sqrt(np.bincount(group_N, (r_N - mean_G[group_N]) ** 2) / count_G)
