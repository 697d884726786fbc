"""AdaBelief: steps by the belief in the observed gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from thalweg.core_optim.engine.ops import denominator, ema_
from thalweg.core_optim.engine.options import FLAG, Option
from thalweg.core_optim.engine.reduce import Context
from thalweg.core_optim.engine.rule import (
    LIKE,
    Decay,
    ElementRule,
    StateSpec,
    adam_options,
    bias_corrections,
)


class AdaBelief(ElementRule):
    """Adam with the variance about the mean; eps is part of the stored variance, as in the official code."""

    name = "adabelief"
    title = "AdaBelief"
    summary = "Adam whose second moment is the gradient's variance about its moving mean."
    source = "Zhuang et al. 2020, arXiv:2010.07468; code adabelief-pytorch 0.2.1"
    equations = """m <- b1 m + (1 - b1) g
s <- b2 s + (1 - b2) (g - m)^2 + eps
p <- p (1 - lr wd) - lr (m / (1 - b1^t)) / (sqrt(s / (1 - b2^t)) + eps)
rectify: instead lr rho_t m / (sqrt(s) + eps) of RAdam, and plain momentum while rho_t is undefined"""
    state_size = "2 (3 with amsgrad)"
    moduli = True
    options: ClassVar[Mapping[str, Option]] = {
        **adam_options(eps=1e-16),
        "amsgrad": Option(False, FLAG, "divide by the largest variance so far; without effect if rectified"),
        "weight_decouple": Option(True, FLAG, "decay the weights directly rather than through the gradient"),
        "fixed_decay": Option(False, FLAG, "decoupled decay that the learning rate does not scale"),
        "rectify": Option(True, FLAG, "rectified steps (Liu et al. 2020)"),
    }

    def states(self, shape: torch.Size, o: Mapping[str, Any]) -> dict[str, StateSpec]:
        """Mean, variance, and the largest variance on request."""
        return {"exp_avg": LIKE, "exp_avg_var": LIKE, **({"max_exp_avg_var": LIKE} if o["amsgrad"] else {})}

    def refuse(self, parameter: Tensor, o: Mapping[str, Any]) -> str | None:
        """With beta1 = 0 the mean is the gradient, so there is no variance about it."""
        return "betas[0] is 0.0, allowed: a number > 0" if o["betas"][0] == 0.0 else None

    def way_of_decay(self, o: Mapping[str, Any]) -> Decay:
        """Decay by the option names of the official code."""
        if not o["weight_decouple"]:
            return "coupled"
        return "independent" if o["fixed_decay"] else "decoupled"

    def scalars(self, t: int, o: Mapping[str, Any]) -> dict[str, float]:
        """Bias corrections, and the rectification of RAdam."""
        found = bias_corrections(t, o)
        if not o["rectify"]:
            return {"root_bias2": found["root_bias2"], "rectified": 0.0, "step_scale": 1.0 / found["bias1"]}
        beta2 = o["betas"][1]
        limit = 2.0 / (1.0 - beta2) - 1.0
        length = limit - 2.0 * t * beta2**t / (1.0 - beta2**t)
        if length < 5.0:
            return {"root_bias2": 1.0, "rectified": 0.0, "step_scale": 1.0 / found["bias1"]}
        ratio = (length - 4.0) / (limit - 4.0) * (length - 2.0) / length * limit / (limit - 2.0)
        scale = found["root_bias2"] * ratio**0.5 / found["bias1"]
        return {"root_bias2": 1.0, "rectified": 1.0, "step_scale": scale}

    def variant(self, shape: torch.Size, o: Mapping[str, Any], t: int) -> str:
        """Which of the three formulas a step uses."""
        if not o["rectify"]:
            return "plain"
        return "rectified" if self.scalars(t, o)["rectified"] else "momentum"

    def update(
        self, p: Tensor, g: Tensor, s: Mapping[str, Tensor], h: Mapping[str, Any], x: Context
    ) -> Tensor:
        """Mean over the root of the variance."""
        m = ema_(s["exp_avg"], g, h["beta1"])
        residual = g - m
        variance = x.mean_square_(s["exp_avg_var"], residual, h["beta2"]).add_(h["eps"])
        if x.variant == "momentum":
            return m * 1.0
        if x.options["amsgrad"] and x.variant == "plain":
            variance = s["max_exp_avg_var"].copy_(s["max_exp_avg_var"].maximum(variance))
        return m / denominator(variance, h["root_bias2"], h["eps"])
