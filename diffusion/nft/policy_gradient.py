"""Siblings of the objective: Advantage Weighted Matching, and the clipped policy gradient of Flow-GRPO.

Shapes: B samples, ... anything. Conventions are those of :mod:`thalweg.diffusion.nft.loss`.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from thalweg.diffusion.nft.loss import at_least_float32, check_shapes, mean_square, velocity_target

Matching = Literal["uniform", "t", "t_squared", "huber"]

TINY = 1e-10
"""Added to squared errors before a root is taken, whose slope is infinite at 0."""


def awm_loss(
    v: Tensor,
    v_old: Tensor | None,
    v_ref: Tensor | None,
    x_t: Tensor,
    x0: Tensor,
    t: Tensor,
    advantage: Tensor,
    *,
    kl_weight: float,
    adv_clip_max: float,
    old_weight: float = 0.0,
    clip_range: float | None = None,
    weighting: Matching = "uniform",
    power: float = 0.25,
    noise: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Advantage Weighted Matching (Xue et al. 2025, arXiv 2509.25050): mean(A l) of matching losses l.

    -l stands for the log-probability of a sample, l = w(t) mean((v - (noise - x0))^2). With a clip_range, l
    of v_old makes a ratio exp(l_old - l), which is clipped as in :func:`clipped_policy_loss`; without one the
    loss is A l itself, whose gradient is that of the ratio where v = v_old.

    Args:
        v: Velocity of the trained policy.
        v_old: Velocity of the policy that sampled x0; None where neither clip_range nor old_weight need it.
        v_ref: Velocity of the reference; None if kl_weight is 0.
        x_t: Noisy samples.
        x0: Samples.
        t: Times (B,).
        advantage: Advantages (B,).
        kl_weight: Weight of mean((v - v_ref)^2).
        adv_clip_max: Where advantages are clipped; their scale is left alone.
        old_weight: Weight of mean((v - v_old)^2).
        clip_range: Largest distance of a ratio from 1.
        weighting: w: 1, t or t^2, or ``huber``, t ((mse + c)^power - c^power) / power with c = 1e-10.
        power: Power of huber, in (0, 1].
        noise: Noise in x_t; taken from x_t and x0 if it is missing and no t is 0.

    Returns:
        The loss, and detached metrics: total_loss, policy_loss, matching_loss (mean l), kl_div and
        old_deviate where their velocities are given, and those of clipped_policy_loss.

    Raises:
        ValueError: For shapes that differ, unknown weightings, wrong numbers, or velocities that are missing.
    """
    check_shapes(v, {"v_old": v_old, "v_ref": v_ref, "x_t": x_t, "x0": x0, "noise": noise}, t, advantage)
    if v_old is None and (old_weight or clip_range is not None):
        raise ValueError("v_old is missing: old_weight and clip_range need it")
    if v_ref is None and kl_weight:
        raise ValueError(f"kl_weight is {kl_weight}, which needs v_ref; without it only 0 is allowed")
    v = at_least_float32(v)
    x_t, x0 = (at_least_float32(a.detach()) for a in (x_t, x0))
    times = t.detach().to(v.dtype)
    shaped = times.reshape(-1, *(1,) * (v.ndim - 1))
    target = velocity_target(x_t, x0, shaped) if noise is None else at_least_float32(noise.detach()) - x0
    matching = matching_loss(v, target, times, weighting=weighting, power=power)
    metrics = {"matching_loss": matching.mean()}
    a = _clipped(advantage, adv_clip_max)
    if clip_range is None or v_old is None:
        policy = (a * matching).mean()
    else:
        old = at_least_float32(v_old.detach())
        before = matching_loss(old, target, times, weighting=weighting, power=power)
        policy, more = clipped_policy_loss(
            -matching, -before, advantage, clip_range=clip_range, adv_clip_max=adv_clip_max
        )
        metrics |= more
    loss = metrics["policy_loss"] = policy
    for name, other, weight in (("kl_div", v_ref, kl_weight), ("old_deviate", v_old, old_weight)):
        if other is not None:
            metrics[name] = mean_square(v - at_least_float32(other.detach()))
            loss = loss + weight * metrics[name]
    metrics["total_loss"] = loss
    return loss.to(v.dtype), {name: value.detach() for name, value in metrics.items()}


def matching_loss(
    v: Tensor, target: Tensor, t: Tensor, *, weighting: Matching = "uniform", power: float = 0.25
) -> Tensor:
    """Weighted flow-matching loss of each sample, (B,) in float64; see :func:`awm_loss`.

    Raises:
        ValueError: For an unknown weighting or a power outside (0, 1].
    """
    if weighting not in get_args(Matching):
        raise ValueError(f"weighting is {weighting!r}, allowed: {', '.join(get_args(Matching))}")
    if not 0 < power <= 1:
        raise ValueError(f"power is {power}, allowed: above 0 to 1")
    error = mean_square(v - target, each=True)
    if weighting == "huber":
        return t * ((error + TINY) ** power - TINY**power) / power
    powers = {"uniform": 0, "t": 1, "t_squared": 2}
    return t ** powers[weighting] * error


def clipped_policy_loss(
    log_prob: Tensor,
    log_prob_old: Tensor,
    advantage: Tensor,
    *,
    clip_range: float,
    adv_clip_max: float = 5.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Policy gradient with clipped ratios (Schulman et al. 2017, arXiv 1707.06347, Eq. 7).

    With ratios p = exp(log_prob - log_prob_old): mean(max(-A p, -A clip(p, 1 - clip_range, 1 + clip_range))).

    Args:
        log_prob: Log-probability of samples under the trained policy, (B,).
        log_prob_old: The same under the policy that drew them.
        advantage: Advantages (B,).
        clip_range: Largest useful distance of a ratio from 1: 1e-4 or less for means over pixels.
        adv_clip_max: Where advantages are clipped.

    Returns:
        The loss, and detached metrics: ratio (mean), approx_kl (half the mean squared difference of the
        log-probabilities) and clip_fraction (share of ratios outside the range).

    Raises:
        ValueError: For shapes that differ, wrong numbers, or half precision, whose rounding moves ratios by
            more than they are clipped to.
    """
    for name, value in (("log_prob_old", log_prob_old), ("advantage", advantage)):
        if value.shape != log_prob.shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, needed: {tuple(log_prob.shape)}")
    for name, value in (("log_prob", log_prob), ("log_prob_old", log_prob_old)):
        if value.dtype.itemsize < 4:
            raise ValueError(f"{name} is {value.dtype}, allowed: torch.float32, torch.float64")
    if not 0 < clip_range <= 1:
        raise ValueError(f"clip_range is {clip_range}, allowed: above 0 to 1")
    a = _clipped(advantage, adv_clip_max).to(log_prob.dtype)
    difference = log_prob - log_prob_old.detach()
    ratio = difference.exp()
    loss = torch.maximum(-a * ratio, -a * ratio.clamp(1 - clip_range, 1 + clip_range)).mean()
    outside = ((ratio - 1).abs() > clip_range).to(ratio.dtype)
    metrics = {"ratio": ratio.mean(), "approx_kl": 0.5 * difference.square().mean()}
    metrics["clip_fraction"] = outside.mean()
    return loss, {name: value.detach() for name, value in metrics.items()}


def grpo_loss(
    log_prob: Tensor,
    log_prob_old: Tensor,
    advantage: Tensor,
    *,
    clip_range: float = 1e-4,
    adv_clip_max: float = 5.0,
    kl_weight: float = 0.0,
    mean: Tensor | None = None,
    mean_ref: Tensor | None = None,
    std: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of Flow-GRPO (Liu et al. 2025, arXiv 2505.05470) on one step of a rollout with noise.

    The clipped policy gradient, and kl_weight times the divergence of the step's distribution from that of
    the reference, mean((mean - mean_ref)^2) / (2 std^2), per number of the state as log-probabilities are.

    Args:
        log_prob: See :func:`clipped_policy_loss`, as the next three.
        log_prob_old: See there.
        advantage: See there.
        clip_range: See there.
        adv_clip_max: See there.
        kl_weight: Weight of the divergence.
        mean: Mean of the step under the trained policy; it and the next two only if kl_weight is not 0.
        mean_ref: The same under the reference.
        std: Standard deviation of the step.

    Returns:
        The loss, and detached metrics: total_loss, policy_loss, kl_loss where it is computed, and those of
        clipped_policy_loss.

    Raises:
        ValueError: As clipped_policy_loss does, or if the divergence cannot be computed.
    """
    policy, metrics = clipped_policy_loss(
        log_prob, log_prob_old, advantage, clip_range=clip_range, adv_clip_max=adv_clip_max
    )
    loss = metrics["policy_loss"] = policy
    if mean is not None and mean_ref is not None and std:
        distance = at_least_float32(mean) - at_least_float32(mean_ref.detach())
        metrics["kl_loss"] = mean_square(distance) / (2 * std**2)
        loss = (policy + kl_weight * metrics["kl_loss"]).to(policy.dtype)
    elif kl_weight:
        raise ValueError(f"kl_weight is {kl_weight}, which needs mean, mean_ref and a std above 0")
    metrics["total_loss"] = loss
    return loss, {name: value.detach() for name, value in metrics.items()}


def _clipped(advantage: Tensor, adv_clip_max: float) -> Tensor:
    if not adv_clip_max > 0:
        raise ValueError(f"adv_clip_max is {adv_clip_max}, allowed: any positive number")
    return advantage.detach().clamp(-adv_clip_max, adv_clip_max)
