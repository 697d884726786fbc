"""AdamW, and AdamW with a cautious mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from thalweg.core_optim.engine import sharding
from thalweg.core_optim.engine.ops import denominator, ema_
from thalweg.core_optim.engine.options import FLAG, Option
from thalweg.core_optim.engine.reduce import Context
from thalweg.core_optim.engine.rule import adam_options
from thalweg.core_optim.engine.views import like_order
from thalweg.core_optim.rules.adam import Adam

if TYPE_CHECKING:
    from thalweg.core_optim.engine.buckets import Slot


class AdamW(Adam):
    """Adam with decoupled weight decay."""

    name = "adamw"
    title = "AdamW"
    summary = "Adam with decoupled weight decay."
    source = "Loshchilov & Hutter 2019, arXiv:1711.05101; torch.optim.AdamW"
    equations = """m <- b1 m + (1 - b1) g
v <- b2 v + (1 - b2) g^2
p <- p (1 - lr wd) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)"""
    moduli = True
    options: ClassVar[Mapping[str, Option]] = adam_options(weight_decay=1e-2)

    def update(
        self, p: Tensor, g: Tensor, s: Mapping[str, Tensor], h: Mapping[str, Any], x: Context
    ) -> Tensor:
        """First moment over the root of the second."""
        m = ema_(s["exp_avg"], g, h["beta1"])
        v = x.mean_square_(s["exp_avg_sq"], g, h["beta2"])
        return m / denominator(v, h["root_bias2"], h["eps"])

    def fused(self, slots: Sequence[Slot], h: Mapping[str, Any]) -> None:
        """The same step by torch's own kernel, which makes one pass over the memory."""
        device = slots[0].parameter.device
        # torch counts a step on before it uses it
        steps = list(torch.full((len(slots),), slots[0].t - 1.0, device=device).unbind())
        part = sharding.local
        adamw(
            [part(slot.parameter) for slot in slots],
            [like_order(part(slot.gradient), part(slot.parameter)) for slot in slots],
            [part(slot.state["exp_avg"]) for slot in slots],
            [part(slot.state["exp_avg_sq"]) for slot in slots],
            [],
            steps,
            fused=True,
            amsgrad=False,
            beta1=h["beta1"],
            beta2=h["beta2"],
            lr=h["lr"],
            weight_decay=h["weight_decay"],
            eps=h["eps"],
            maximize=False,
        )
        # that kernel does not tell autograd, which would take old graphs for valid
        torch.autograd.graph.increment_version([part(slot.parameter) for slot in slots])


class CAdamW(AdamW):
    """AdamW whose updates are dropped where the gradient opposes them."""

    name = "cadamw"
    title = "CAdamW"
    summary = "AdamW without the entries of an update that the gradient opposes."
    source = "Liang et al. 2024, arXiv:2411.16085; code kyleliang919/C-Optim"
    equations = AdamW.equations + "\nwith the update u <- u [u g > 0] / max(mean [u g > 0], 1e-3)"
    options: ClassVar[Mapping[str, Option]] = {
        **AdamW.options,
        "cautious": Option(True, FLAG, "drop what the gradient opposes"),
    }
