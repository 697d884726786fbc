"""Rewards by name, and sums of several with weights.

A factory is called with the device and options of its own, and makes a
:class:`~thalweg.diffusion.rewards.base.Reward`. Names stand for ``module:function``; a user's own factory is
given as such.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thalweg.diffusion.rewards.base import Metadata, Reward, RewardError, RewardResult, evaluate

REWARDS: dict[str, str] = {
    name: f"thalweg.diffusion.rewards.{module}:{name}"
    for name, module in {
        "jpeg_compressibility": "jpeg",
        "jpeg_incompressibility": "jpeg",
        "shapes": "shapes",
        "geneval": "geneval",
        "saturation": "pixels",
        "smoothness": "pixels",
        "ocr": "ocr",
        "clipscore": "clip",
        "pickscore": "clip",
        "hpsv2": "clip",
        "imagereward": "imagereward",
        "aesthetic": "aesthetic",
        "unifiedreward": "unified",
        "remote": "remote",
    }.items()
}
"""Functions that make rewards, as ``module:function``, by name."""


def reward_factory(name: str, options: Mapping[str, Any]) -> Callable[..., Reward]:
    """The function that makes a reward; it is not called, so weights may be missing.

    Args:
        name: One of :data:`REWARDS`, or ``module:function``.
        options: What it is to be called with, beside the device.

    Raises:
        RewardError: If the name is unknown, the function cannot be imported, or an option is not one of
            its own.
    """
    module, _, function = REWARDS.get(name, name).partition(":")
    if not function:
        raise RewardError(f"reward {name!r} is unknown, allowed: {', '.join(REWARDS)}, or module:function")
    try:
        factory: Callable[..., Reward] = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise RewardError(f"reward {name!r} cannot be imported: {error}") from None
    try:
        inspect.signature(factory).bind("cpu", **options)
    except TypeError as error:
        raise RewardError(f"reward {name!r} with options {sorted(options)}: {error}") from None
    return factory


def open_reward(name: str, /, device: str = "cpu", **options: Any) -> Reward:
    """Make a reward.

    Args:
        name: One of :data:`REWARDS`, or ``module:function``.
        device: Where its network runs, if it has one.
        options: Of its factory.

    Raises:
        RewardError: See :func:`reward_factory`, and if weights are missing.
    """
    return reward_factory(name, options)(device, **options)


@dataclass(frozen=True, kw_only=True)
class WeightedSum:
    """sum_k w_k r_k of raw scores, as DiffusionNFT adds them: nothing is standardised.

    The parts of its results are the scores of all rewards, and their own parts as ``reward/part``.

    Raises:
        RewardError: If there is no reward, or weights are not for exactly these.
    """

    rewards: Mapping[str, Reward]
    """What is added."""
    weights: Mapping[str, float]
    """Factors of the raw scores; 0 only logs a reward."""
    name: str = "sum"
    """Of the sum."""

    def __post_init__(self) -> None:
        if not self.rewards or set(self.rewards) != set(self.weights):
            raise RewardError(f"rewards {sorted(self.rewards)} with weights of {sorted(self.weights)}")

    def __call__(
        self, images_BCHW: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> RewardResult:
        """All rewards, one after the other."""
        results = {k: evaluate(r, images_BCHW, prompts, metadata) for k, r in self.rewards.items()}
        return combine(results, self.weights)


def combine(results: Mapping[str, RewardResult], weights: Mapping[str, float]) -> RewardResult:
    """Weighted sum of raw scores; parts are the scores by reward, and parts of rewards as ``reward/part``.

    Raises:
        RewardError: If there is no result.
    """
    if not results:
        raise RewardError("there is no reward to add")
    terms = [weights[name] * result.scores for name, result in results.items()]
    parts = {name: result.scores for name, result in results.items()}
    for name, result in results.items():
        parts |= {f"{name}/{key}": part for key, part in result.parts.items()}
    return RewardResult(scores=torch.stack(terms).sum(dim=0), parts=parts)


def open_rewards(specs: Mapping[str, Mapping[str, Any]], device: str = "cpu") -> WeightedSum:
    """Rewards of a configuration, with weights.

    Args:
        specs: By name: ``weight`` (1 by default), ``reward`` (the name itself by default, one of
            :data:`REWARDS` or ``module:function``), and options of the factory.
        device: Where networks run.

    Raises:
        RewardError: See :func:`open_reward`.
    """
    rewards, weights = {}, {}
    for name, spec in specs.items():
        options = dict(spec)
        weights[name] = float(options.pop("weight", 1.0))
        rewards[name] = open_reward(options.pop("reward", name), device, **options)
    return WeightedSum(rewards=rewards, weights=weights)
