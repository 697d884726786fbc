"""Lion: the sign of an interpolated momentum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from thalweg.core_optim.engine.ops import axpy_, ema_
from thalweg.core_optim.engine.options import BETAS, Option, at_least
from thalweg.core_optim.engine.reduce import Context
from thalweg.core_optim.engine.rule import LIKE, ElementRule, StateSpec


class Lion(ElementRule):
    """Sign of a momentum that counts the new gradient more than the stored momentum does."""

    name = "lion"
    title = "Lion"
    summary = "Sign of the momentum; wants 3 to 10 times less lr and as much more decay than AdamW."
    source = "Chen et al. 2023, arXiv:2302.06675; code google/automl/lion"
    equations = """u = sign(b1 m + (1 - b1) g)
p <- p (1 - lr wd) - lr u
m <- b2 m + (1 - b2) g"""
    state_size = "1"
    options: ClassVar[Mapping[str, Option]] = {
        "lr": Option(1e-4, at_least(0.0), "learning rate"),
        "betas": Option((0.9, 0.99), BETAS, "weight of the momentum in the update, and in the momentum"),
        "weight_decay": Option(0.0, at_least(0.0), "weight decay"),
    }

    def states(self, shape: torch.Size, o: Mapping[str, Any]) -> dict[str, StateSpec]:
        """The momentum."""
        return {"exp_avg": LIKE}

    def update(
        self, p: Tensor, g: Tensor, s: Mapping[str, Tensor], h: Mapping[str, Any], x: Context
    ) -> Tensor:
        """Sign of the interpolation."""
        u = axpy_(s["exp_avg"] * h["beta1"], g, 1.0 - h["beta1"]).sign_()
        ema_(s["exp_avg"], g, h["beta2"])
        return u
