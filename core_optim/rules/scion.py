"""Scion: steps in the steepest direction of a norm that fits each layer, within a ball of that norm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from thalweg.core_optim.engine.options import (
    FLAG,
    NONE,
    Check,
    Option,
    at_least,
    choice,
    either,
    mapping,
    more_than,
)
from thalweg.core_optim.engine.rule import LIKE, Item, MatrixRule, StateSpec
from thalweg.core_optim.linalg import lmo
from thalweg.core_optim.rules.muon import NS_DTYPE


def _weight(value: Any) -> float:
    found = float(at_least(0.0, 1.0).coerce(value))
    if found == 0.0:
        raise ValueError
    return found


class Scion(MatrixRule):
    """Scion; see the equations.

    The radius ``scale`` sets the size of the weights, which stay within it when constrained. Norms are chosen
    per group; ``linalg.lmo.init_`` gives initial weights that fit.
    """

    name = "scion"
    title = "Scion"
    summary = "Momentum replaced by the steepest direction of a norm per layer, within a ball if constrained"
    source = "Pethick et al. 2025, arXiv:2502.07529; code LIONS-EPFL/scion"
    equations = """m <- (1 - a) m + a g;  constrained: p <- (1 - lr) p;  p <- p - lr scale lmo(m)
lmo: Spectral sqrt(out / in) U Vᵀ by five Newton-Schulz steps; SpectralConv the same, divided by the kernel's
size; Sign sign(m) / in; ColNorm columns of rms 1; RowNorm rows of 2-norm 1 / sqrt(in); BiasRMS m / rms(m)"""
    state_size = "1 (0 for momentum 1)"
    decay = "decoupled"
    options: ClassVar[Mapping[str, Option]] = {
        "lr": Option(1e-3, at_least(0.0), "learning rate"),
        "momentum": Option(
            0.1, Check(_weight, "a number in (0, 1]"), "weight of the new gradient; 1 keeps no state"
        ),
        "weight_decay": Option(0.0, at_least(0.0), "weight decay where not constrained"),
        "constrained": Option(True, FLAG, "stay in the ball of radius scale: shrink by the learning rate"),
        "norm": Option("Auto", choice(*lmo.SETTINGS), "norm of the group"),
        "scale": Option(1.0, more_than(0.0), "radius of the ball"),
        "norm_kwargs": Option(
            None, either(NONE, mapping("settings of the norm: max, normalized, steps, transpose")), "settings"
        ),
        "ns_dtype": NS_DTYPE,
    }

    def states(self, shape: torch.Size, o: Mapping[str, Any]) -> dict[str, StateSpec]:
        """Momentum, unless the last gradient is all there is to it."""
        return {} if o["momentum"] == 1.0 else {"momentum_buffer": LIKE}

    def refuse(self, parameter: Tensor, o: Mapping[str, Any]) -> str | None:
        """Shapes that the norm is not for, and settings it does not have."""
        try:
            lmo.settings(o["norm"], o["norm_kwargs"])
        except ValueError as error:
            return str(error)
        return lmo.unsuitable(lmo.resolve(o["norm"], parameter.ndim), parameter.shape)

    def decays(self, shape: torch.Size, o: Mapping[str, Any]) -> bool:
        """Constrained weights shrink by the learning rate instead."""
        return not o["constrained"]

    def shrink(self, lr: float, o: Mapping[str, Any]) -> float | None:
        """1 - lr where constrained."""
        return 1.0 - lr if o["constrained"] else None

    def update(self, items: list[Item], h: Mapping[str, Any], o: Mapping[str, Any]) -> list[Tensor | None]:
        """Steepest directions times the radius."""
        momenta = []
        for item in items:
            m = item.s.get("momentum_buffer")
            if m is not None:
                m.mul_(1.0 - h["momentum"]).add_(item.g, alpha=h["momentum"])
            momenta.append(item.g if m is None else m.to(item.g.dtype))
        found = lmo.directions(momenta, o["norm"], o["norm_kwargs"], o["ns_dtype"])
        return [u if h["scale"] == 1.0 else u * h["scale"] for u in found]
