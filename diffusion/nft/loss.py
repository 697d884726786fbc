"""The objective of DiffusionNFT (Zheng et al. 2025, arXiv 2509.16117).

Shapes: B samples, ... anything. x_t = (1 - t) x0 + t noise, and velocities estimate noise - x0; t in [0, 1].

The trained velocity v and that of the sampling policy, v_old, imply two policies,

    v_plus = (1 - beta) v_old + beta v,    v_minus = (1 + beta) v_old - beta v,

which are fitted to what was sampled with weights r and 1 - r, r the probability that the sample is optimal.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from thalweg.diffusion.nft.advantage import AdvMode, optimality

Weighting = Literal["adaptive_x0", "velocity"]

FLOOR = 1e-5
"""Least divisor of the adaptive weighting."""


class Branches(NamedTuple):
    """Errors of the two implicit policies, (B,) each and in float64."""

    plus: Tensor
    """Loss of v_plus."""
    minus: Tensor
    """Loss of v_minus."""
    weight_plus: Tensor
    """What the squared error of v_plus was divided by; one for plain velocities."""
    weight_minus: Tensor
    """As weight_plus, for v_minus."""


def nft_loss(
    v: Tensor,
    v_old: Tensor,
    v_ref: Tensor | None,
    x_t: Tensor,
    x0: Tensor,
    t: Tensor,
    advantage: Tensor,
    *,
    beta: float,
    kl_weight: float,
    adv_clip_max: float,
    adv_mode: AdvMode = "all",
    weighting: Weighting = "adaptive_x0",
    noise: Tensor | None = None,
    negative: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of a batch, A_max / beta mean(r plus + (1 - r) minus) + kl_weight mean((v - v_ref)^2).

    Only v gets a gradient. Half precision is raised to float32; sums over a sample are taken in float64.

    Args:
        v: Velocity of the trained policy.
        v_old: Velocity of the policy that sampled x0, at the same x_t and t.
        v_ref: Velocity of the reference; None if kl_weight is 0, and then its metrics are missing.
        x_t: Noisy samples.
        x0: Samples.
        t: Times (B,).
        advantage: Advantages (B,).
        beta: Strength of the guidance is 1 / beta.
        kl_weight: Weight of the distance to the reference; no relation to beta.
        adv_clip_max: A_max, where advantages are clipped.
        adv_mode: See :func:`~thalweg.diffusion.nft.advantage.optimality`.
        weighting: ``adaptive_x0`` compares data estimates x_t - t u and divides by their mean absolute error;
            ``velocity`` compares velocities.
        noise: Noise in x_t, for ``velocity``; taken from x_t and x0 if it is missing and no t is 0.
        negative: Without it only v_plus is fitted, for comparison: such training collapses.

    Returns:
        The loss, and detached metrics: total_loss and policy_loss (its part without the reference),
        unweighted_policy_loss (before A_max), kl_div_loss and kl_div (squared distance to the reference),
        old_kl_div (that of v_old), old_deviate (squared distance of v and v_old) and x0_norm (mean square of
        the samples), the last two with their maxima under a further _max. policy_loss_as_logged is the total
        loss: what the authors' program shows under the name policy_loss.

    Raises:
        ValueError: For shapes that differ, an unknown mode or weighting, a beta or clip that is not positive,
            a reference that is missing, or noise that is missing and cannot be found.
    """
    check_shapes(v, {"v_old": v_old, "v_ref": v_ref, "x_t": x_t, "x0": x0, "noise": noise}, t, advantage)
    if not beta > 0:
        raise ValueError(f"beta is {beta}, allowed: any positive number")
    if v_ref is None and kl_weight:
        raise ValueError(f"kl_weight is {kl_weight}, which needs v_ref; without it only 0 is allowed")
    v = at_least_float32(v)
    v_old, x_t, x0 = (at_least_float32(a.detach()) for a in (v_old, x_t, x0))
    branches = branch_losses(v, v_old, x_t, x0, t, beta=beta, weighting=weighting, noise=noise)
    r_B = optimality(advantage.detach().double(), adv_clip_max=adv_clip_max, adv_mode=adv_mode)
    away = (1 - r_B) * branches.minus if negative else 0.0
    unweighted = ((r_B * branches.plus + away) / beta).mean()
    policy = adv_clip_max * unweighted
    metrics = _moves(v.detach(), v_old, x0) | {"policy_loss": policy, "unweighted_policy_loss": unweighted}
    loss = policy
    if v_ref is not None:
        v_ref = at_least_float32(v_ref.detach())
        kl = mean_square(v - v_ref)
        loss = policy + kl_weight * kl
        metrics |= {"kl_div_loss": kl, "kl_div": kl, "old_kl_div": mean_square(v_old - v_ref)}
    metrics |= {"total_loss": loss, "policy_loss_as_logged": loss}
    return loss.to(v.dtype), {name: value.detach() for name, value in metrics.items()}


def branch_losses(
    v: Tensor,
    v_old: Tensor,
    x_t: Tensor,
    x0: Tensor,
    t: Tensor,
    *,
    beta: float,
    weighting: Weighting = "adaptive_x0",
    noise: Tensor | None = None,
) -> Branches:
    """Loss of each sample under both implicit policies; arguments as those of :func:`nft_loss`.

    ``adaptive_x0`` is mean(e^2) / max(mean |e|, 1e-5) of e = x_t - t u - x0, with a divisor of each sample
    and policy that has no gradient. ``velocity`` is mean((u - (noise - x0))^2).

    Raises:
        ValueError: For an unknown weighting, or noise that is missing and cannot be found.
    """
    if weighting not in get_args(Weighting):
        raise ValueError(f"weighting is {weighting!r}, allowed: {', '.join(get_args(Weighting))}")
    v, v_old, x_t, x0 = (at_least_float32(a) for a in (v, v_old, x_t, x0))
    t = expand(t.detach().to(v.dtype), v)
    # v_old +- beta (v - v_old) keeps float32 exact where v and v_old are close
    step = beta * (v - v_old)
    if weighting == "velocity":
        target = (velocity_target(x_t, x0, t) if noise is None else at_least_float32(noise) - x0).detach()
        plus, minus = (mean_square(v_old + move - target, each=True) for move in (step, -step))
        return Branches(plus, minus, torch.ones_like(plus), torch.ones_like(minus))
    losses, weights = [], []
    for move in (step, -step):
        e = x_t - t * (v_old + move) - x0
        dims = tuple(range(1, e.ndim))
        weight = e.detach().abs().mean(dims, dtype=torch.float64).clamp(min=FLOOR)
        losses.append(mean_square(e, each=True) / weight)
        weights.append(weight)
    return Branches(*losses, *weights)


def velocity_target(x_t: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """Velocity noise - x0 = (x_t - x0) / t of the path through x0 and x_t; t broadcasts against them.

    Raises:
        ValueError: If a time is 0, where x_t does not know the noise.
    """
    if (t == 0).any():
        raise ValueError("at t = 0 the velocity is not known from x_t; pass noise")
    return (x_t - x0) / t


def expand(t: Tensor, x: Tensor) -> Tensor:
    """Numbers (B,) as (B, 1, ...) against x."""
    return t.reshape(-1, *(1,) * (x.ndim - 1))


def at_least_float32(x: Tensor) -> Tensor:
    """The same in float32 at least: squares of small differences vanish in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def mean_square(x: Tensor, *, each: bool = False) -> Tensor:
    """Mean of squares in float64, of everything or of each sample."""
    dims = tuple(range(1, x.ndim)) if each else None
    return x.square().mean(dims, dtype=torch.float64)


def _moves(v: Tensor, v_old: Tensor, x0: Tensor) -> dict[str, Tensor]:
    """How far the policy is from the one that sampled, and how large samples are."""
    squares = {"old_deviate": (v - v_old).square(), "x0_norm": x0.square()}
    means = {name: square.mean(dtype=torch.float64) for name, square in squares.items()}
    return means | {f"{name}_max": square.max() for name, square in squares.items()}


def check_shapes(v: Tensor, others: dict[str, Tensor | None], t: Tensor, advantage: Tensor) -> None:
    """Refuse what is not of the shape of v, or has other than one number per sample.

    Raises:
        ValueError: If so.
    """
    for name, value in others.items():
        if value is not None and value.shape != v.shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, needed: {tuple(v.shape)}, that of v")
    for name, value in (("t", t), ("advantage", advantage)):
        if value.shape != v.shape[:1]:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, needed: {tuple(v.shape[:1])}")
