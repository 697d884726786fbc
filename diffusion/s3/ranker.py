"""The network that ranks solver schedules, and its losses.

An ensemble is one network with a leading dimension: E members of equal shape, trained in the same products.
After OMS-DPM (Liu et al. 2023, arXiv 2306.08860): an LSTM over the steps and a hinge loss on pairs.

Shapes: E members, B schedules, N steps, F features, D hidden numbers. Lower is better everywhere.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class BatchedLinear(nn.Module):
    """One linear layer per member: (E, R, I) to (E, R, O)."""

    def __init__(self, members: int, inputs: int, outputs: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(inputs)
        self.weight = nn.Parameter(torch.empty(members, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(members, 1, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Apply every member's layer to its own rows."""
        return torch.baddbmm(self.bias, x, self.weight)


class BatchedLSTM(nn.Module):
    """One LSTM layer per member over (E, B, N, I), from the first step on."""

    def __init__(self, members: int, inputs: int, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.outer = BatchedLinear(members, inputs, 4 * hidden)
        self.inner = BatchedLinear(members, hidden, 4 * hidden)
        with torch.no_grad():
            self.outer.bias[..., hidden : 2 * hidden] = 1.0  # remember at first

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states (E, B, N, D)."""
        members, count, steps, inputs = x.shape
        gates = self.outer(x.reshape(members, count * steps, inputs)).view(members, count, steps, -1)
        h = c = x.new_zeros(members, count, self.hidden)
        states = []
        for gate in gates.unbind(2):
            write, keep, read, value = (gate + self.inner(h)).chunk(4, -1)
            c = torch.sigmoid(keep) * c + torch.sigmoid(write) * torch.tanh(value)
            h = torch.sigmoid(read) * torch.tanh(c)
            states.append(h)
        return torch.stack(states, 2)


class Ranker(nn.Module):
    """Predicts the standardised quality of schedules of any number of steps.

    Args:
        features: Numbers per step, F.
        members: Size of the ensemble, E.
        hidden: Width D of the LSTM.
        layers: Layers of the LSTM.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, features: int, members: int = 5, hidden: int = 32, layers: int = 2) -> None:
        super().__init__()
        sizes = [features] + [hidden] * layers
        self.members = members
        self.lstm = nn.ModuleList(BatchedLSTM(members, i, hidden) for i in sizes[:-1])
        self.head = BatchedLinear(members, hidden, 2 * hidden)
        self.out = BatchedLinear(members, 2 * hidden, 1)
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))

    def standardise_by(self, tokens_BNF: Tensor, mask_BN: Tensor) -> None:
        """Take mean and spread of every feature from training data; constant ones get spread 1."""
        steps = tokens_BNF[mask_BN].double()
        spread = steps.std(0, correction=0)
        self.mean.copy_(steps.mean(0))
        self.scale.copy_(torch.where(spread > 1e-6, spread, torch.ones_like(spread)))

    def forward(self, tokens_BNF: Tensor, mask_BN: Tensor) -> Tensor:
        """Predictions (E, B); steps outside of the mask change nothing."""
        there_BN1 = mask_BN[..., None].to(tokens_BNF.dtype)
        # An LSTM never looks ahead, so what follows the last step is only kept out of the mean.
        x_BNF = ((tokens_BNF - self.mean) / self.scale).clamp(-10, 10) * there_BN1
        x_EBND = x_BNF.expand(self.members, *x_BNF.shape)
        for layer in self.lstm:
            x_EBND = layer(x_EBND)
        pooled_EBD = (x_EBND * there_BN1).sum(2) / there_BN1.sum(1)
        return self.out(torch.nn.functional.gelu(self.head(pooled_EBD))).squeeze(-1)


def usable_pairs(scores: Tensor, noise: Tensor, threshold: float = 1.0) -> Tensor:
    """Which schedules are surely better than which others.

    Args:
        scores: Qualities (B,), lower is better; infinite for failures.
        noise: Standard deviations (B,) of the scores.
        threshold: Standard deviations of a difference below which it is a tie.

    Returns:
        Booleans (B, B), true at [i, j] if i is better than j by more than noise.
    """
    gap_BB = scores[None, :] - scores[:, None]  # not a number between two failures, and then no pair
    return gap_BB > threshold * torch.hypot(noise[None, :], noise[:, None])


def hinge_loss(predicted_EB: Tensor, pairs_BB: Tensor, weights_EB: Tensor, margin: float = 1.0) -> Tensor:
    """Mean over the pairs of max(0, margin - (worse - better)) for each member, (E,)."""
    gap_EBB = predicted_EB[:, None, :] - predicted_EB[:, :, None]
    weights_EBB = weights_EB[:, None, :] * weights_EB[:, :, None] * pairs_BB
    total = (weights_EBB * (margin - gap_EBB).clamp(min=0)).sum((1, 2))
    return total / weights_EBB.sum((1, 2)).clamp(min=1)


def value_loss(predicted_EB: Tensor, scores_B: Tensor, weights_EB: Tensor) -> Tensor:
    """Mean squared error of each member on the finite scores, (E,)."""
    known = torch.isfinite(scores_B)
    error_EB = (predicted_EB - torch.where(known, scores_B, 0.0)) ** 2
    weights_EB = weights_EB * known
    return (error_EB * weights_EB).sum(1) / weights_EB.sum(1).clamp(min=1)


def ranking_loss(
    predicted_EB: Tensor,
    scores_B: Tensor,
    noise_B: Tensor,
    weights_EB: Tensor,
    *,
    threshold: float = 1.0,
    value_weight: float = 0.0,
) -> Tensor:
    """Sum over the members of hinge loss and weighted squared error; the members do not interact."""
    loss_E = hinge_loss(predicted_EB, usable_pairs(scores_B, noise_B, threshold), weights_EB)
    if value_weight:
        loss_E = loss_E + value_weight * value_loss(predicted_EB, scores_B, weights_EB)
    return loss_E.sum()
