"""Pruning of a network by the optimal brain surgeon with M-FAC's Fisher matrix: score, remove, compensate.

    gradients = gradient_window(losses, parameters, 128)
    masks = prune_step(parameters, gradients, sparsity=0.5)
    ... train on, and after every optimizer step: apply_masks(parameters, masks)

Shapes: M gradients, D weights of all parameters as one vector.
Source: Frantar et al. 2021, arXiv:2107.03356, section 4; Hassibi & Stork 1993.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from thalweg.core_optim.linalg.fisher import (
    BlockFisherInverse,
    FisherInverse,
    fisher_inverse,
    joint_update,
    obs_scores,
    obs_update,
)

__all__ = [
    "BlockFisherInverse",
    "FisherInverse",
    "apply_masks",
    "fisher_inverse",
    "gradient_window",
    "prune_step",
    "sparsity_steps",
]

COMPENSATIONS = ("sum", "joint", "none")


def gradient_window(
    losses: Iterable[Tensor],
    parameters: Sequence[Tensor],
    num_grads: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Gradients of the first losses, one a row: (M, D).

    The Fisher matrix wants losses of single examples or small batches at the current weights; put the network
    into evaluation mode, so that neither dropout nor batch statistics disturb them. Fields ``grad`` are not
    touched.

    Args:
        losses: Scalars, made one after the other.
        parameters: What is differentiated by; a loss that does not depend on one counts as zero.
        num_grads: M.
        dtype: Of the window, bfloat16 to halve it.
        device: Of the window; that of the parameters if not given.

    Raises:
        ValueError: If there are fewer losses.
    """
    count = sum(p.numel() for p in parameters)
    window = torch.zeros(num_grads, count, dtype=dtype, device=device or parameters[0].device)
    filled = 0
    for row, loss in zip(range(num_grads), losses):
        found = torch.autograd.grad(loss, list(parameters), allow_unused=True, materialize_grads=True)
        window[row] = torch.cat([g.detach().reshape(-1) for g in found]).to(window)
        filled = row + 1
    if filled < num_grads:
        raise ValueError(f"num_grads is {num_grads}, but there are {filled} losses only")
    return window


def sparsity_steps(start: float, end: float, steps: int) -> list[float]:
    """Sparsities after each of several prunings that keep the same share of what is left.

    Raises:
        ValueError: If not 0 <= start <= end < 1.
    """
    if not 0.0 <= start <= end < 1.0:
        raise ValueError(f"sparsities grow and lie in [0, 1), not {start} to {end}")
    ratio = (1.0 - end) / (1.0 - start)
    return [1.0 - (1.0 - start) * ratio ** (step / steps) for step in range(1, steps + 1)]


@torch.no_grad()
def prune_step(
    parameters: Sequence[Tensor],
    gradients: Tensor,
    sparsity: float,
    *,
    damping: float = 1e-5,
    block_size: int | None = None,
    compensation: str = "sum",
    masks: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    r"""Remove the weights that cost least, let the others make up for them, in place.

    The cost of weight j is w_j^2 / (2 [F^{-1}]_jj) over the weights that are still there. Several are removed
    at once, so prune in a few steps with fresh gradients (:func:`sparsity_steps`) where much goes.

    Args:
        parameters: Weights to prune, such as those of all linear layers.
        gradients: Window (M, D) of these parameters in this order; it may lie on another device, or be bf16.
        sparsity: Share of all weights that is zero afterwards, at least what it is already.
        damping: Multiple of the identity in F.
        block_size: Weights per block on the diagonal of F; all in one if not given.
        compensation: ``sum`` adds the solutions for single weights, as published; ``joint`` is the minimum of
            the quadratic model for all removed weights together, over the whole of F; ``none`` changes no
            other weight.
        masks: True where a weight is still there; where it is not zero, if not given.

    Returns:
        The masks afterwards, for :func:`apply_masks`.

    Raises:
        ValueError: For a window of another size, a sparsity below the present one, or an unknown
            compensation.
    """
    if compensation not in COMPENSATIONS:
        raise ValueError(f"compensation is one of {COMPENSATIONS}, not {compensation!r}")
    if compensation == "joint" and block_size is not None:
        raise ValueError(
            f"joint compensation is over the whole matrix; block_size is {block_size}, allowed: none"
        )
    weights_D = torch.cat([p.detach().reshape(-1) for p in parameters]).to(gradients.device)
    if gradients.shape[1:] != weights_D.shape:
        raise ValueError(
            f"the window has the shape {tuple(gradients.shape)}, the parameters {len(weights_D)} elements"
        )
    kept_D = (
        weights_D != 0 if masks is None else torch.cat([m.reshape(-1) for m in masks]).to(weights_D.device)
    )
    number = _number(kept_D, sparsity)
    window = gradients if bool(kept_D.all()) else gradients[:, kept_D]
    left = weights_D[kept_D].double()
    removed = torch.zeros_like(left, dtype=torch.bool)
    if number > 0:
        inverse = fisher_inverse(window, damping, block_size)
        diagonal = inverse.diagonal()
        index = obs_scores(left, diagonal).argsort()[:number]
        removed[index] = True
        if compensation == "sum":
            left = left + obs_update(inverse, left, index, diagonal[index])
        elif compensation == "joint":
            left = left + joint_update(window, damping, left, removed)
    flat = left.new_zeros(len(weights_D))
    flat[kept_D] = left.masked_fill(removed, 0.0)
    return _write(parameters, flat, kept_D.masked_scatter(kept_D, ~removed))


def _number(kept_D: Tensor, sparsity: float) -> int:
    """Weights to remove so that a share of all is gone."""
    gone = len(kept_D) - int(kept_D.sum())
    number = int(len(kept_D) * sparsity) - gone
    if not 0.0 <= sparsity <= 1.0 or number < 0:
        raise ValueError(
            f"sparsity is {sparsity}, allowed: from {gone / len(kept_D):g}, what it is now, to 1"
        )
    return number


def _write(parameters: Sequence[Tensor], flat_D: Tensor, kept_D: Tensor) -> list[Tensor]:
    """Put new weights into the parameters; their masks."""
    sizes = [p.numel() for p in parameters]
    masks = []
    for p, value, mask in zip(parameters, flat_D.split(sizes), kept_D.split(sizes)):
        p.copy_(value.view(p.shape))
        masks.append(mask.view(p.shape).to(p.device))
    return masks


@torch.no_grad()
def apply_masks(parameters: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Set pruned weights to zero again, after a step of an optimizer."""
    for p, mask in zip(parameters, masks, strict=True):
        p.mul_(mask)
