"""What training a denoiser needs besides its targets: noisy images, weights, times, dropped labels.

Shapes: B batch; x0 clean images, noise ~ N(0, I), alpha and sigma broadcast against them.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Kind = Literal["noise", "data", "v", "flow"]
Weighting = Literal["none", "min-snr"]


def check_kind(kind: str) -> None:
    """Raise ValueError unless networks can be trained to predict this."""
    if kind not in get_args(Kind):
        raise ValueError(f"prediction is {kind!r}, allowed: {', '.join(get_args(Kind))}")


def corrupt(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The noisy image alpha x0 + sigma noise."""
    return alpha * x0 + sigma * noise


def weights(alpha: Tensor, sigma: Tensor, kind: Kind, weighting: Weighting, gamma: float = 5.0) -> Tensor:
    """Weight of the squared error of an answer at each noise level.

    ``none`` weighs answers equally. ``min-snr`` weighs the errors of the data they imply by
    min(alpha^2 / sigma^2, gamma): Hang et al. 2023 (arXiv 2303.09556), Eq. 8, where their Table 1's noise
    and v forms follow from the factor between the two errors.
    """
    if weighting == "none":
        return torch.ones_like(alpha)
    if kind == "noise":  # data error = noise error * sigma / alpha
        return (gamma * sigma**2 / alpha**2).clamp(max=1.0)
    if kind == "data":
        return (alpha**2 / sigma**2).clamp(max=gamma)
    capped = torch.minimum(alpha**2, gamma * sigma**2)
    # data error = v error * sigma / (alpha^2 + sigma^2), or flow error * sigma / (alpha + sigma)
    return capped / (alpha**2 + sigma**2) ** 2 if kind == "v" else capped / (alpha + sigma) ** 2


def spread_times(count: int, times: Literal["uniform", "logit-normal"], stream: torch.Generator) -> Tensor:
    """Random times in [0, 1] in float64, one in each of `count` equally likely intervals.

    ``logit-normal`` is the distribution of 1 / (1 + exp(-z)), z ~ N(0, 1): Esser et al. 2024
    (arXiv 2403.03206), Eq. 19. Spreading lowers the variance of a batch's loss (Kingma et al. 2021,
    arXiv 2107.00630, appendix I.1).
    """
    steps = torch.arange(count, dtype=torch.float64)
    spread = (steps + torch.rand(count, generator=stream, dtype=torch.float64)) / count
    return spread if times == "uniform" else torch.sigmoid(torch.special.ndtri(spread))


def drop_labels(labels: Tensor, null: Tensor | int, rate: float, stream: torch.Generator) -> Tensor:
    """Labels (B,) or (B, L), each replaced by `null`, () or (L,), with probability `rate`, for guidance."""
    chosen = torch.rand(len(labels), generator=stream) < rate
    chosen = chosen.view(-1, *[1] * (labels.dim() - 1)).to(labels.device)
    return torch.where(chosen, torch.as_tensor(null, device=labels.device), labels)
