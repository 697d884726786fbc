"""SWAN: stateless steps along row-normalised, whitened gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from thalweg.core_optim.engine.options import FLAG, Option, at_least, choice, integer, more_than
from thalweg.core_optim.engine.rule import Item, MatrixRule, StateSpec
from thalweg.core_optim.linalg.batching import batches
from thalweg.core_optim.linalg.whitening import VARIANTS, normalise_rows, whiten


class SWAN(MatrixRule):
    """SWAN; see the equations.

    For hidden matrices and convolutions (as out x rest); everything else wants another rule. Matrices with
    more rows than columns are handled as their transposes, so "rows" are the shorter dimension.
    """

    outside: ClassVar[Mapping[str, Any]] = {}
    name = "swan"
    title = "SWAN"
    summary = "SGD without state on gradients with normalised rows, whitened by Newton-Schulz iteration"
    source = "Ma et al. 2024, arXiv:2412.13148; no official code, settings of reimplementations"
    equations = """G = g, or gᵀ if there are more rows than columns;  G <- G / sqrt(rowmean(G^2) + eps)
X = G / |G|_F;  Y = X Xᵀ, Z = I;  ns_steps times: R = 3 I - Z Y, Y <- beta Y R, Z <- beta R Z
p <- p (1 - lr wd) - lr sqrt(rows columns) Z X / |Z X|_F
diagonal: Y <- beta Y diag(3 - z y), Z <- beta (3 I - diag(z) Y) diag(z) with the diagonals z, y"""
    state_size = "0"
    decay = "decoupled"
    options: ClassVar[Mapping[str, Option]] = {
        "lr": Option(1e-3, at_least(0.0), "learning rate; updates have a root mean square of 1"),
        "weight_decay": Option(0.0, at_least(0.0), "weight decay"),
        "ns_steps": Option(10, integer(0, 100), "iterations of the whitening"),
        "beta": Option(0.8, more_than(0.0), "factor of the iteration; 0.5 converges to orthogonal rows"),
        "eps": Option(1e-20, more_than(0.0), "added to the mean square of a row"),
        "variant": Option("full", choice(*VARIANTS), "diagonal: fewer products (ns_steps 2, beta 0.4)"),
        "centre": Option(False, FLAG, "subtract the mean of each row, as early versions of the paper do"),
    }

    def states(self, shape: torch.Size, o: Mapping[str, Any]) -> dict[str, StateSpec]:
        """None."""
        return {}

    def refuse(self, parameter: Tensor, o: Mapping[str, Any]) -> str | None:
        """Matrices and convolutions only."""
        if parameter.ndim < 2:
            return "SWAN is for matrices and convolutions; give the rest to another rule such as adamw"
        return None

    def update(self, items: list[Item], h: Mapping[str, Any], o: Mapping[str, Any]) -> list[Tensor | None]:
        """Whitened gradients, in batches of one oriented shape."""
        flat = [item.g.reshape(item.g.shape[0], -1) for item in items]
        tall = [g.shape[0] > g.shape[1] for g in flat]
        lying = [g.mT if turned else g for g, turned in zip(flat, tall)]
        directions: list[Tensor | None] = [None] * len(items)
        for numbers in batches(lying, [g.shape for g in lying]):
            single = len(numbers) == 1
            g = lying[numbers[0]] if single else torch.stack([lying[n] for n in numbers])
            u = whiten(
                normalise_rows(g, h["eps"], centre=o["centre"]), o["ns_steps"], h["beta"], o["variant"]
            )
            for n, one in zip(numbers, [u] if single else u):
                directions[n] = (one.mT if tall[n] else one).reshape(items[n].p.shape)
        return directions
