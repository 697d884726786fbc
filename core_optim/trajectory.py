"""Loss terms that keep a network near its own past: SAF and MESA (Du et al. 2022, arXiv:2205.14083).

Both make minima flatter without SAM's second gradient. SAF compares the output for a sample with that of some
epochs ago, MESA with the output of averaged weights. For classes, with temperature tau,

    L = tau^2 KL(softmax(past / tau) || softmax(now / tau)),

and for regression and denoising L = |now - past|^2 / size. Both are means over the batch, in which a sample
without a past counts 0.

Shapes: B batch, C classes, ... whatever an output has more.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from thalweg.core_optim.engine.random import mix

Kind = Literal["kl", "squared"]


def kl_to_past(now: Tensor, past: Tensor, valid_B: Tensor | None = None, *, tau: float = 5.0) -> Tensor:
    """Tau^2 KL(softmax(past / tau) || softmax(now / tau)), a mean over batch and trailing dimensions.

    Its gradient in the logits is tau (softmax(now / tau) - softmax(past / tau)) / B.

    Args:
        now: Logits (B, C, ...), with gradient.
        past: Logits of the same samples; they get no gradient.
        valid_B: Which rows have a past; all by default. The others contribute exactly 0, whatever they hold.
        tau: Temperature.

    Raises:
        ValueError: If shapes differ or tau is not positive.
    """
    if not tau > 0.0:
        raise ValueError(f"tau is {tau}, allowed: a number > 0")
    past = _where_valid(now, past, valid_B)
    log_now, log_past = (log_softmax(z / tau, dim=1) for z in (now, past))
    return _mean(tau**2 * (log_past.exp() * (log_past - log_now)).sum(dim=1), valid_B)


def squared_to_past(now: Tensor, past: Tensor, valid_B: Tensor | None = None) -> Tensor:
    """Mean squared difference of outputs (B, ...), with gradient 2 (now - past) / numel.

    Args:
        now: Outputs, with gradient.
        past: Outputs for the same inputs; they get no gradient.
        valid_B: Which rows have a past; all by default. The others contribute exactly 0, whatever they hold.

    Raises:
        ValueError: If shapes differ.
    """
    return _mean((now - _where_valid(now, past, valid_B)).square(), valid_B)


def distance_to_past(
    kind: Kind, now: Tensor, past: Tensor, valid_B: Tensor | None = None, *, tau: float = 5.0
) -> Tensor:
    """One of the two distances, in float32 or wider.

    Raises:
        ValueError: For another kind.
    """
    if now.dtype in (torch.float16, torch.bfloat16):
        now = now.float()
    if kind == "kl":
        return kl_to_past(now, past, valid_B, tau=tau)
    if kind == "squared":
        return squared_to_past(now, past, valid_B)
    raise ValueError(f"kind of the trajectory loss is {kind!r}, allowed: kl, squared")


def is_active(epoch: int, start: int, end: int | None = None) -> bool:
    """Whether the term counts: after the start epoch, and before the end if there is one."""
    return epoch > start and (end is None or epoch < end)


class Replay(NamedTuple):
    """What an epoch does where the inputs themselves are random, as in denoising."""

    key: int
    """Number of the draw: the epochs that compare with each other have equal ones, all others differ."""
    compares: bool
    """Whether the outputs of this draw were recorded `lag` epochs ago; else they are recorded now."""


def replay(epoch: int, lag: int) -> Replay:
    """Blocks of 2 lag epochs: the first half draws and records, the second draws the same and compares.

    A sample has a past only if time and noise are the same again; but draws that never change would be a data
    set of their own. So every draw is used exactly twice, `lag` epochs apart.
    """
    block, place = divmod(epoch, 2 * lag)
    return Replay(block * lag + place % lag, place >= lag)


def streams_of(index_B: Tensor, key: int, seed: int) -> list[torch.Generator]:
    """A random generator for each sample, whose numbers depend on (seed, key, index) alone."""
    return [torch.Generator().manual_seed(mix(seed, key, index)) for index in index_B.tolist()]


def _where_valid(now: Tensor, past: Tensor, valid_B: Tensor | None) -> Tensor:
    """The past, or where there is none the present: a number is needed, and NaN times 0 would be NaN."""
    if past.shape != now.shape:
        raise ValueError(f"past outputs have shape {tuple(past.shape)}, present ones {tuple(now.shape)}")
    past = past.detach().to(now)
    if valid_B is None:
        return past
    return torch.where(_like_rows(valid_B, now), past, now.detach())


def _mean(values: Tensor, valid_B: Tensor | None) -> Tensor:
    """Mean over everything, rows without a past counting 0."""
    if valid_B is not None:
        values = torch.where(_like_rows(valid_B, values), values, torch.zeros_like(values))
    return values.mean()


def _like_rows(valid_B: Tensor, like: Tensor) -> Tensor:
    return valid_B.to(like.device).view(-1, *[1] * (like.dim() - 1))
