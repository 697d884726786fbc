"""Nodes and weights of a sampler as free numbers, for gradient refinement.

Nodes are softmax shares of a range of lambda = ln(alpha / sigma), so that they rise whatever the numbers are.
A row of weights is its fixed sum times cumulative differences: with V_0 .. V_{i-1} free,

    sum_j W_ij x0_j = total_i (x0_i + sum_{j<i} V_ij (x0_j - x0_{j+1})),
    total_i = alpha_{i+1} - alpha_i sigma_{i+1} / sigma_i,

so that the sum is right whatever V is.

Shapes: N steps, N + 1 nodes, L nodes after the first with finite lambda.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from thalweg.diffusion.schedules import NoiseSchedule
from thalweg.diffusion.solvers.linear import Compilable, LinearSchedule, totals
from thalweg.diffusion.solvers.schedule import Node

Family = Literal["preserving", "exploding", "flow"]

LEVELS: dict[Family, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "preserving": lambda lam: (torch.sigmoid(2 * lam).sqrt(), torch.sigmoid(-2 * lam).sqrt()),
    "exploding": lambda lam: (torch.ones_like(lam), torch.exp(-lam)),
    "flow": lambda lam: (torch.sigmoid(lam), torch.sigmoid(-lam)),
}
"""Alpha and sigma of a lambda."""

LEAST_GAP = 1e-3
"""Least gap of lambda at the start of a refinement; nodes that coincide (Heun) are moved apart by it."""
TABLE = 4097
"""Entries of the table in which labels are looked up."""


def family_of(nodes: Sequence[Node]) -> Family:
    """How alpha and sigma hang together.

    Raises:
        ValueError: If they follow none of the known rules.
    """
    alpha, sigma = np.array([(node.alpha, node.sigma) for node in nodes]).T
    rules = {"preserving": alpha**2 + sigma**2, "flow": alpha + sigma, "exploding": alpha}
    for family, value in rules.items():
        if np.abs(value - 1).max() < 1e-6:
            return family  # type: ignore[return-value]
    raise ValueError(
        "nodes follow no known rule, allowed: alpha^2 + sigma^2 = 1, alpha + sigma = 1, alpha = 1; "
        f"node 0 has alpha {alpha[0]:.6g}, sigma {sigma[0]:.6g}"
    )


class Parameters(nn.Module):
    """The free numbers of a sampler, all float64.

    Args:
        start: Sampler whose numbers they are at first.
        noise_schedule: Needed for labels; without it a network is given none.
        free_end: Let the last evaluated node move, if the result has no noise.
        free_start: Let the first node move: which noise level the network is told for x_T.
        offsets: Tell the network labels of other lambdas than those of the nodes, by a free offset each.

    Raises:
        ValueError: If alpha and sigma follow no known rule, the start is to move from alpha = 0, or the
            sampler is not exact for constant data (v3 with tables).
    """

    def __init__(
        self,
        start: Compilable,
        noise_schedule: NoiseSchedule | None = None,
        *,
        free_end: bool = True,
        free_start: bool = False,
        offsets: bool = False,
    ) -> None:
        super().__init__()
        self.nodes, self.first, self.noise_schedule = start.nodes, start.first, noise_schedule
        self.family = family_of(start.nodes)
        self.clean_end = start.nodes[-1].sigma == 0
        if free_start and start.nodes[0].alpha == 0:
            raise ValueError("the first node is pure noise (alpha 0) and cannot move; set free_start=False")
        if offsets and noise_schedule is None:
            raise ValueError("offsets of labels need the noise schedule")
        self._set_nodes(free_end and self.clean_end, free_start)
        rows = LinearSchedule.of(start).weights  # refuses what is no such sampler
        w = np.array([[*row, *[0.0] * (len(rows) - len(row))] for row in rows])
        self.free = nn.ParameterList(_cumulative(row, i) for i, row in enumerate(w))
        self._table = None if noise_schedule is None else _label_table(noise_schedule, start.nodes[0])
        self.offset = nn.Parameter(self._offsets(), requires_grad=offsets)

    def _set_nodes(self, free_end: bool, free_start: bool) -> None:
        lam = [node.lam for node in (self.nodes[:-1] if self.clean_end else self.nodes)]
        if lam[0] == -math.inf:  # a finite stand-in, from which the first gap is measured
            lam[0] = min(lam[1], 0.0) - 2.0 if len(lam) > 1 else 0.0
        gaps = torch.tensor([max(b - a, LEAST_GAP) for a, b in pairwise(lam)], dtype=torch.float64)
        first = torch.tensor(lam[0], dtype=torch.float64)
        self.lam_0 = nn.Parameter(first, requires_grad=free_start)
        self.logits = nn.Parameter(gaps.log(), requires_grad=len(gaps) > 0)
        self.log_range = nn.Parameter(gaps.sum().log(), requires_grad=free_end and len(gaps) > 0)
        self.lam_end = float(first + gaps.sum())

    def _offsets(self) -> Tensor:
        """How far the labels of the start are from those of its nodes, in lambda, N."""
        offset = torch.zeros(len(self.nodes) - 1, dtype=torch.float64)
        if self.noise_schedule is not None and self._table is not None:
            lam, labels = (a.numpy()[::-1] for a in self._table)  # labels fall with lambda
            for i, node in enumerate(self.nodes[:-1]):
                if node.label is not None and node.alpha > 0:
                    own = float(self.noise_schedule.label(self.noise_schedule.t_of_lam(node.lam)))
                    there, here = np.interp([node.label, own], labels, lam)
                    offset[i] = there - here
        return offset

    def lam(self) -> Tensor:
        """Lambda of the nodes where it is finite (a stand-in at alpha = 0), L + 1."""
        if not len(self.logits):
            return self.lam_0[None]
        span = self.lam_end - self.lam_0
        if self.log_range.requires_grad:
            span = self.log_range.exp()
            if self.noise_schedule is not None and self.noise_schedule.t_end > 0:
                span = torch.clamp(
                    span, max=float(self.noise_schedule.lam(self.noise_schedule.t_end)) - self.lam_0
                )
        return self.lam_0 + span * torch.cat(
            [self.lam_0.new_zeros(1), torch.softmax(self.logits, 0).cumsum(0)]
        )

    def levels(self) -> tuple[Tensor, Tensor]:
        """Alpha and sigma of all nodes, N + 1 each; the ends are exactly those of the start where fixed."""
        alpha, sigma = LEVELS[self.family](self.lam())
        if not self.lam_0.requires_grad:
            alpha = torch.cat([alpha.new_tensor([self.nodes[0].alpha]), alpha[1:]])
            sigma = torch.cat([sigma.new_tensor([self.nodes[0].sigma]), sigma[1:]])
        if self.clean_end:
            alpha = torch.cat([alpha, alpha.new_tensor([self.nodes[-1].alpha])])
            sigma = torch.cat([sigma, sigma.new_zeros(1)])
        return alpha, sigma

    def labels(self) -> Tensor | None:
        """What the network is told at each evaluated node, N; None without a noise schedule."""
        if self._table is None:
            return None
        lam = self.lam()[: len(self.nodes) - 1]
        if self.nodes[0].alpha == 0:
            lam = torch.cat([self._table[0][:1], lam[1:]])
        return _interpolate(lam + self.offset, *self._table)

    def weights(self, alpha: Tensor, sigma: Tensor) -> list[Tensor]:
        """W, row i of i + 1 weights."""
        total = alpha[1:] - alpha[:-1] * sigma[1:] / sigma[:-1]
        rows = []
        for i, v in enumerate(self.free):
            edge = torch.cat([v, v.new_ones(1)])
            rows.append(total[i] * torch.diff(edge, prepend=v.new_zeros(1)))
        return rows

    def frozen_nodes(self) -> tuple[Node, ...]:
        """Nodes as they stand, with times and labels."""
        alpha, sigma = (a.detach().tolist() for a in self.levels())
        lam, offset = self.lam().detach().tolist(), self.offset.detach().tolist()
        nodes = []
        for i, node in enumerate(self.nodes):
            if i == len(lam) or (i == 0 and node.alpha == 0):
                nodes.append(node)
                continue
            t = label = None
            if (noise := self.noise_schedule) is not None:
                t = float(noise.t_of_lam(lam[i]))
                label = self._label(lam[i] + offset[i]) if i < len(offset) else float(noise.label(t))
            nodes.append(replace(node, alpha=alpha[i], sigma=sigma[i], t=t, label=label))
        return tuple(nodes)

    def _label(self, lam: float) -> float:
        assert self.noise_schedule is not None
        assert self._table is not None
        first, last = float(self._table[0][0]), float(self._table[0][-1])
        return float(self.noise_schedule.label(self.noise_schedule.t_of_lam(min(max(lam, first), last))))

    def frozen_weights(self, nodes: Sequence[Node]) -> tuple[tuple[float, ...], ...]:
        """Weights on given nodes, with the exact sums."""
        rows = []
        for v, total in zip(self.free, totals(nodes).tolist(), strict=True):
            edges = [0.0, *v.detach().tolist(), 1.0]
            rows.append(tuple(total * (b - a) for a, b in pairwise(edges)))
        return tuple(rows)


def _cumulative(row: np.ndarray, i: int) -> nn.Parameter:
    """V of a row of weights; where the row's sum is 0, V is too."""
    total = row[: i + 1].sum()
    values = np.cumsum(row[:i]) / total if total else np.zeros(i)
    return nn.Parameter(torch.tensor(values, dtype=torch.float64), requires_grad=i > 0)


def _label_table(noise: NoiseSchedule, first: Node) -> tuple[Tensor, Tensor]:
    """Labels on an even grid of lambda, from the start of the schedule (or near pure noise) to its end."""
    tiny = 1e-6 * (noise.t_start - noise.t_end)
    low = float(noise.lam(noise.t_start)) if first.alpha else float(noise.lam(noise.t_start - tiny))
    high = float(noise.lam(noise.t_end if noise.t_end > 0 else tiny))
    lam = np.linspace(min(low, first.lam) if first.alpha else low, high, TABLE)
    labels = np.asarray(noise.label(noise.t_of_lam(lam)))
    return torch.tensor(lam), torch.tensor(labels)


def _interpolate(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """Linear interpolation on an even grid, constant beyond its ends."""
    position = ((x - xs[0]) / (xs[1] - xs[0])).clamp(0, len(xs) - 1)
    k = position.detach().long().clamp(max=len(xs) - 2)
    return ys[k] + (position - k) * (ys[k + 1] - ys[k])
