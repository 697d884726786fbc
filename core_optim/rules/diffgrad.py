"""diffGrad: Adam with a friction where gradients change little."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from thalweg.core_optim.engine.ops import denominator, ema_
from thalweg.core_optim.engine.options import Option
from thalweg.core_optim.engine.reduce import Context
from thalweg.core_optim.engine.rule import LIKE, ElementRule, StateSpec, adam_options, bias_corrections


class DiffGrad(ElementRule):
    """Adam whose step shrinks where the gradient hardly changes; the second, corrected release."""

    name = "diffgrad"
    title = "DiffGrad"
    summary = "Adam times a friction in [1/2, 1), small where the gradient hardly changes."
    source = "Dubey et al. 2020, arXiv:1909.11015; code shivram1987/diffGrad, diffGrad_v2"
    equations = """m, v as in Adam, g with coupled decay
xi = 1 / (1 + exp(-|g_previous - g|)),   g_previous = 0 at first
p <- p - lr sqrt(1 - b2^t) / (1 - b1^t) xi m / (sqrt(v) + eps)"""
    state_size = "3"
    decay = "coupled"
    options: ClassVar[Mapping[str, Option]] = adam_options()

    def states(self, shape: torch.Size, o: Mapping[str, Any]) -> dict[str, StateSpec]:
        """Two moments and the previous gradient."""
        return {"exp_avg": LIKE, "exp_avg_sq": LIKE, "previous_grad": LIKE}

    def scalars(self, t: int, o: Mapping[str, Any]) -> dict[str, float]:
        """Both bias corrections in the step; eps is not scaled."""
        found = bias_corrections(t, o)
        return {"step_scale": found["root_bias2"] / found["bias1"]}

    def update(
        self, p: Tensor, g: Tensor, s: Mapping[str, Tensor], h: Mapping[str, Any], x: Context
    ) -> Tensor:
        """Adam's direction times the friction."""
        m = ema_(s["exp_avg"], g, h["beta1"])
        v = x.mean_square_(s["exp_avg_sq"], g, h["beta2"])
        friction = (s["previous_grad"] - g).abs().sigmoid()
        s["previous_grad"].copy_(g)
        return friction.mul_(m).div_(denominator(v, 1.0, h["eps"]))
