"""Schedule-free AdamW: an average of the iterates in the place of a decaying learning rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from thalweg.core_optim.engine import sharding
from thalweg.core_optim.engine.ops import axpy, axpy_, denominator
from thalweg.core_optim.engine.options import Option, at_least, integer
from thalweg.core_optim.engine.reduce import Context
from thalweg.core_optim.engine.rule import ElementRule, StateSpec, adam_options


class ScheduleFreeAdamW(ElementRule):
    """Weights y for training between the iterate z and its running average x, which is for evaluation.

    Call ``optimizer.train()`` before training and ``optimizer.eval()`` before evaluating or saving weights.
    The state holds z; y and x follow from each other by y = b1 x + (1 - b1) z.
    """

    name = "schedulefree_adamw"
    title = "ScheduleFreeAdamW"
    summary = "AdamW with averaged iterates and a constant learning rate; needs train() and eval()."
    source = "Defazio et al. 2024, arXiv:2405.15682; code schedulefree 1.4.1"
    equations = """v <- b2 v + (1 - b2) g^2,   d = g / (sqrt(v / (1 - b2^t)) + eps) + wd y
lr_t = lr min(1, t / warmup_steps),   c = w_t / sum w,   w_t = t^r max(lr_1..t)^weight_lr_power
z <- z - lr_t d,   x <- (1 - c) x + c z,   y = b1 x + (1 - b1) z"""
    state_size = "2"
    moduli = True
    options: ClassVar[Mapping[str, Option]] = {
        **adam_options(lr=2.5e-3),
        "warmup_steps": Option(0, integer(0), "steps of linear warm-up"),
        "r": Option(0.0, at_least(0.0), "power of the step in the weights of the average"),
        "weight_lr_power": Option(2.0, at_least(0.0), "power of the largest rate so far in the weights"),
    }

    def refuse(self, parameter: Tensor, o: Mapping[str, Any]) -> str | None:
        """With beta1 = 0 the average could not be had back from y; masks and ways of decay have no place."""
        if o["betas"][0] == 0.0:
            return "betas[0] is 0.0, allowed: a number > 0"
        if o["cautious"]:
            return "cautious is True, allowed: false; the weights move by an average besides the update"
        if o["decay"] is not None:
            return f"decay is {o['decay']!r}, allowed: none; decay is part of the direction"
        return None

    def states(self, shape: torch.Size, o: Mapping[str, Any]) -> dict[str, StateSpec]:
        """The iterate, put at the parameter at the first step, and the second moment."""
        return {"z": StateSpec("like", fill=float("nan")), "exp_avg_sq": StateSpec()}

    def begin(self, group: dict[str, Any], slots: Sequence[Any]) -> dict[str, Any]:
        """Weight of the new iterate in the average; the group keeps the sum of the weights."""
        if group.get("mode", "train") != "train":
            raise RuntimeError("the weights for evaluation are in place: call optimizer.train() first")
        k = group.get("k", 0)
        warm = min(1.0, (k + 1) / group["warmup_steps"]) if group["warmup_steps"] else 1.0
        rate = float(group["lr"]) * warm
        group["lr_max"] = max(rate, group.get("lr_max", 0.0))
        weight = (k + 1) ** group["r"] * group["lr_max"] ** group["weight_lr_power"]
        group["weight_sum"] = group.get("weight_sum", 0.0) + weight
        group["k"] = k + 1
        for slot in slots:
            if slot.t == 1:
                slot.state["z"].copy_(slot.parameter)
        share = weight / group["weight_sum"] if group["weight_sum"] else 0.0
        return {"share": share, "rate": rate}

    def scalars(self, t: int, o: Mapping[str, Any]) -> dict[str, float]:
        """Bias correction of the second moment."""
        return {"root_bias2": (1.0 - o["betas"][1] ** t) ** 0.5}

    def decays(self, shape: torch.Size, o: Mapping[str, Any]) -> bool:
        """Decay is part of the direction."""
        return False

    def update(self, p: Tensor, g: Tensor, s: Mapping[str, Tensor], h: Mapping[str, Any], x: Context) -> None:
        """Move y and z."""
        v = x.mean_square_(s["exp_avg_sq"], g, h["beta2"])
        d = axpy(g / denominator(v, h["root_bias2"], h["eps"]), p, h["weight_decay"])
        z, c = s["z"], h["share"]
        p.lerp_(z, c)
        axpy_(p, d, h["rate"] * (h["beta1"] * (1.0 - c) - 1.0))
        axpy_(z, d, -1.0 * h["rate"])

    def exchange(self, group: dict[str, Any], members: list[tuple[Tensor, Any]], mode: str) -> None:
        """Put x or y into the parameters: x = lerp(y, z, 1 - 1 / b1), y = lerp(x, z, 1 - b1)."""
        if mode == group.get("mode", "train"):
            return
        beta1 = group["betas"][0]
        weight = 1.0 - 1.0 / beta1 if mode == "eval" else 1.0 - beta1
        for parameter, state in members:
            target, z = sharding.local(parameter), sharding.local(state["z"])
            target.copy_(torch.lerp(target.to(z.dtype), z, weight))
        group["mode"] = mode
