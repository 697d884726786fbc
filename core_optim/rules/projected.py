"""AdamP and SGDP: no step along the weights of a layer that a normalisation makes blind to their scale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from thalweg.core_optim.engine.ops import axpy, axpy_, denominator, each, ema_, where
from thalweg.core_optim.engine.options import FLAG, Option, at_least, more_than, share
from thalweg.core_optim.engine.reduce import Context
from thalweg.core_optim.engine.rule import LIKE, ElementRule, StateSpec, adam_options
from thalweg.core_optim.rules.adam import Adam

PROJECTION = {
    "delta": Option(0.1, at_least(0.0), "threshold of the cosine, times the root of a row's length"),
    "wd_ratio": Option(0.1, at_least(0.0), "factor on the weight decay of a tensor that is projected"),
    "nesterov": Option(False, FLAG, "look ahead by one more momentum step"),
}
TEST = """for tensors of 2 or more dimensions, by rows, then as a whole:
  if max |cos(g, p)| < delta / sqrt(length): u <- u - p (p . u) / |p|^2, decay times wd_ratio, stop"""


def project(u: Tensor, p: Tensor, g: Tensor, h: Mapping[str, Any], x: Context) -> tuple[Tensor, Tensor]:
    """Direction without its part along a parameter that looks scale-invariant, and the decay's factor.

    Heo et al. 2021, algorithm 2. Everything is computed for both views and chosen on the device.
    """
    eps = h["eps"]
    gp_row, gg_row, pp_row, pu_row = (x.row_sum(a) for a in (g * p, g * g, p * p, p * u))
    gp, gg, pp, pu = (x.rows_total(a) for a in (gp_row, gg_row, pp_row, pu_row))
    rows = x.below(x.row_max(_cosine(gp_row, gg_row, pp_row, eps)), h["delta"], p, rows=True)
    tensor = x.below(_cosine(gp, gg, pp, eps), h["delta"], p, rows=False)
    by_row = p * _along(pu_row, pp_row, eps)
    by_tensor = p * _along(pu, pp, eps)
    u = u - where(rows, by_row, where(tensor, by_tensor, 0.0))
    either = each(torch.logical_or, rows, tensor)
    one = each(torch.ones_like, gp)
    return u, where(either, one * h["wd_ratio"], one)


def _cosine(gp: Tensor, gg: Tensor, pp: Tensor, eps: Any) -> Tensor:
    """|g . p| / (max(|g|, eps) max(|p|, eps))."""
    return gp.abs() / (_floor(gg.sqrt(), eps) * _floor(pp.sqrt(), eps))


def _floor(x: Tensor, eps: Any) -> Tensor:
    return each(lambda t: t.clamp(min=eps), x)


def _along(pu: Tensor, pp: Tensor, eps: Any) -> Tensor:
    """Coefficient of p in the part of u along p / (|p| + eps)."""
    norm = pp.sqrt() + eps
    return pu / (norm * norm)


class AdamP(Adam):
    """AdamW without the part of a step that only changes the scale of scale-invariant weights."""

    name = "adamp"
    title = "AdamP"
    summary = "AdamW whose steps keep clear of the direction of scale-invariant weights."
    source = "Heo et al. 2021, arXiv:2006.08217; code adamp 0.3.0"
    equations = "u = AdamW's direction\n" + TEST + "\np <- p (1 - lr wd ratio) - lr u"
    view = "rows"
    sums = True
    moduli = True
    options: ClassVar[Mapping[str, Option]] = {**adam_options(), **PROJECTION}

    def variant(self, shape: torch.Size, o: Mapping[str, Any], t: int) -> str:
        """Vectors are never projected."""
        return "project" if len(shape) > 1 else ""

    def update(
        self, p: Tensor, g: Tensor, s: Mapping[str, Tensor], h: Mapping[str, Any], x: Context
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Adam's direction, projected."""
        m = ema_(s["exp_avg"], g, h["beta1"])
        v = x.mean_square_(s["exp_avg_sq"], g, h["beta2"])
        if x.options["nesterov"]:
            m = axpy_(m * h["beta1"], g, 1.0 - h["beta1"])
        u = m / denominator(v, h["root_bias2"], h["eps"])
        return project(u, p, g, h, x) if x.variant == "project" else u


class SGDP(ElementRule):
    """SGD with the same projection. The momentum itself is never projected, unlike in the released code."""

    name = "sgdp"
    title = "SGDP"
    summary = "SGD with momentum whose steps keep clear of the direction of scale-invariant weights."
    source = "Heo et al. 2021, arXiv:2006.08217; code adamp 0.3.0, its stored momentum not projected"
    equations = (
        "b <- mu b + (1 - dampening) g,   u = b   (nesterov: u = g + mu b)\n"
        + TEST
        + "\np <- p (1 - lr wd ratio / (1 - mu)) - lr u"
    )
    state_size = "1"
    view = "rows"
    sums = True
    moduli = True
    options: ClassVar[Mapping[str, Option]] = {
        "lr": Option(1e-3, at_least(0.0), "learning rate"),
        "momentum": Option(0.0, share(), "decay rate mu of the momentum"),
        "dampening": Option(0.0, share(open_above=False), "share of a gradient kept out of the momentum"),
        "weight_decay": Option(0.0, at_least(0.0), "weight decay"),
        "eps": Option(1e-8, more_than(0.0), "smallest norm"),
        **PROJECTION,
    }

    def states(self, shape: torch.Size, o: Mapping[str, Any]) -> dict[str, StateSpec]:
        """The momentum."""
        return {"momentum_buffer": LIKE}

    def variant(self, shape: torch.Size, o: Mapping[str, Any], t: int) -> str:
        """Vectors are never projected."""
        return "project" if len(shape) > 1 else ""

    def update(
        self, p: Tensor, g: Tensor, s: Mapping[str, Tensor], h: Mapping[str, Any], x: Context
    ) -> tuple[Tensor, Tensor]:
        """Momentum, projected; the decay grows as the momentum lets steps last."""
        mu = h["momentum"]
        u = axpy_(s["momentum_buffer"].mul_(mu), g, 1.0 - h["dampening"])
        if x.options["nesterov"]:
            u = axpy(g, u, mu)
        if x.variant == "project":
            u, ratio = project(u, p, g, h, x)
        else:
            ratio = x.sum(p) * 0.0 + 1.0
        return u, ratio / (1.0 - mu)
