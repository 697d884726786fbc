"""MARS: variance reduction by the change of the gradient, before AdamW."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from thalweg.core_optim.engine.ops import axpy, denominator, each, ema_
from thalweg.core_optim.engine.options import BETAS, Option, at_least, choice, more_than
from thalweg.core_optim.engine.reduce import Context
from thalweg.core_optim.engine.rule import LIKE, ElementRule, StateSpec, bias_corrections


class MARS(ElementRule):
    """AdamW on gradients corrected by their change since the last step.

    Matrices only, as in the official code; other tensors take AdamW's step with options of their own. The
    previous gradient is a copy, so later changes of ``p.grad`` do no harm.
    """

    name = "mars"
    title = "MARS"
    summary = "AdamW on gradients with their change added and their norm clipped."
    source = "Yuan et al. 2024, arXiv:2411.10438; code AGI-Arena/MARS, mars-adamw"
    equations = """c = g + gamma b1 / (1 - b1) (g - g_previous),   g_previous = 0 at first (first = grad: g)
c <- c / |c| if |c| > 1, norm of the tensor
m, v as in Adam, from c
p <- p (1 - lr wd) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
lion: p <- p (1 - lr wd) - lr sign(m)
tensors that are not matrices: AdamW with lr lr_ratio_1d, betas_1d and weight_decay_1d"""
    state_size = "3"
    sums = True
    moduli = True
    options: ClassVar[Mapping[str, Option]] = {
        "lr": Option(3e-3, at_least(0.0), "learning rate"),
        "betas": Option((0.95, 0.99), BETAS, "decay rates of the first and second moment"),
        "eps": Option(1e-8, more_than(0.0), "term added to the denominator"),
        "weight_decay": Option(0.0, at_least(0.0), "weight decay of matrices"),
        "gamma": Option(0.025, at_least(0.0), "weight of the gradient's change"),
        "variant": Option("adamw", choice("adamw", "lion"), "what is done with the corrected gradient"),
        "first": Option("zero", choice("zero", "grad"), "previous gradient of the first step"),
        "lr_ratio_1d": Option(1.0, at_least(0.0), "learning rate of other tensors, as a multiple of lr"),
        "betas_1d": Option((0.9, 0.95), BETAS, "decay rates for other tensors"),
        "weight_decay_1d": Option(0.1, at_least(0.0), "weight decay of other tensors"),
    }

    def refuse(self, parameter: Tensor, o: Mapping[str, Any]) -> str | None:
        """Lion's sign is one of real numbers."""
        if o["variant"] == "lion" and o["complex"] == "modulus" and parameter.is_complex():
            return "complex is 'modulus', allowed with variant lion: real"
        return None

    def states(self, shape: torch.Size, o: Mapping[str, Any]) -> dict[str, StateSpec]:
        """Two moments, and the previous gradient of a matrix."""
        moments = {"exp_avg": LIKE, "exp_avg_sq": LIKE}
        return {**moments, "previous_grad": LIKE} if len(shape) == 2 else moments

    def variant(self, shape: torch.Size, o: Mapping[str, Any], t: int) -> str:
        """Matrices and others; the first step of a matrix if that is special."""
        if len(shape) != 2:
            return "other"
        return "first" if t == 1 and o["first"] == "grad" else "matrix"

    def decays(self, shape: torch.Size, o: Mapping[str, Any]) -> bool:
        """Other tensors have a weight decay of their own, which their update contains."""
        return len(shape) == 2

    def scalars(self, t: int, o: Mapping[str, Any]) -> dict[str, float]:
        """Bias corrections of both kinds of tensors."""
        found, other = bias_corrections(t, o), bias_corrections(t, {"betas": o["betas_1d"]})
        beta1 = o["betas"][0]
        return {
            "change": o["gamma"] * beta1 / (1.0 - beta1),
            "bias1": found["bias1"],
            "root_bias2": found["root_bias2"],
            "beta1_1d": o["betas_1d"][0],
            "beta2_1d": o["betas_1d"][1],
            "scale_1d": o["lr_ratio_1d"] / other["bias1"],
            "root_bias2_1d": other["root_bias2"],
            "decay_1d": o["lr_ratio_1d"] * o["weight_decay_1d"],
        }

    def update(
        self, p: Tensor, g: Tensor, s: Mapping[str, Tensor], h: Mapping[str, Any], x: Context
    ) -> Tensor:
        """AdamW's direction for the corrected gradient."""
        if x.variant == "other":
            return _adamw_1d(p, g, s, h, x)
        c = g if x.variant == "first" else axpy(g, g - s["previous_grad"], h["change"])
        s["previous_grad"].copy_(g)
        c = c / each(lambda n: n.clamp(min=1.0), x.norm(c))
        m = ema_(s["exp_avg"], c, h["beta1"])
        v = x.mean_square_(s["exp_avg_sq"], c, h["beta2"])
        if x.options["variant"] == "lion":
            return each(torch.sign, m)
        return m / (denominator(v, h["root_bias2"], h["eps"]) * h["bias1"])


def _adamw_1d(p: Tensor, g: Tensor, s: Mapping[str, Tensor], h: Mapping[str, Any], x: Context) -> Tensor:
    """AdamW with the options for tensors that are not matrices, decay included."""
    m = ema_(s["exp_avg"], g, h["beta1_1d"])
    v = x.mean_square_(s["exp_avg_sq"], g, h["beta2_1d"])
    u = m / denominator(v, h["root_bias2_1d"], h["eps"]) * h["scale_1d"]
    return axpy(u, p, h["decay_1d"])
