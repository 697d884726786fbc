"""SGD with momentum, as torch.optim.SGD."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from thalweg.core_optim.engine.ops import axpy, axpy_
from thalweg.core_optim.engine.options import FLAG, Option, at_least, share
from thalweg.core_optim.engine.reduce import Context
from thalweg.core_optim.engine.rule import LIKE, ElementRule, StateSpec


class SGD(ElementRule):
    """Stochastic gradient descent; the first momentum is the first gradient."""

    name = "sgd"
    title = "SGD"
    summary = "Stochastic gradient descent with momentum."
    source = "Sutskever et al. 2013; torch.optim.SGD"
    equations = """b <- mu b + (1 - dampening) g   (b = g at the first step)
p <- p - lr b                  (nesterov: p <- p - lr (g + mu b))"""
    state_size = "1 (0 without momentum)"
    decay = "coupled"
    moduli = True
    options: ClassVar[Mapping[str, Option]] = {
        "lr": Option(1e-3, at_least(0.0), "learning rate"),
        "momentum": Option(0.0, share(), "decay rate mu of the momentum"),
        "dampening": Option(0.0, share(open_above=False), "share of a gradient kept out of the momentum"),
        "weight_decay": Option(0.0, at_least(0.0), "weight decay"),
        "nesterov": Option(False, FLAG, "look ahead by one more momentum step"),
    }

    def states(self, shape: torch.Size, o: Mapping[str, Any]) -> dict[str, StateSpec]:
        """The momentum, if there is any."""
        return {"momentum_buffer": LIKE} if o["momentum"] else {}

    def scalars(self, t: int, o: Mapping[str, Any]) -> dict[str, float]:
        """Weight of the gradient in the momentum: all of it at the first step."""
        return {"fresh": 1.0 if t == 1 else 1.0 - o["dampening"]}

    def update(
        self, p: Tensor, g: Tensor, s: Mapping[str, Tensor], h: Mapping[str, Any], x: Context
    ) -> Tensor:
        """Momentum, or the gradient itself."""
        if "momentum_buffer" not in s:
            return g
        buffer = axpy_(s["momentum_buffer"].mul_(h["momentum"]), g, h["fresh"])
        return axpy(g, buffer, h["momentum"]) if x.options["nesterov"] else buffer
