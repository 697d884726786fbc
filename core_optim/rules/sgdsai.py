"""SGD-SaI: SGD with momentum and one learning rate per tensor, fixed by its first gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from thalweg.core_optim.engine import sharding
from thalweg.core_optim.engine.ops import each, ema_, where
from thalweg.core_optim.engine.options import FLAG, Option, at_least, more_than, share
from thalweg.core_optim.engine.reduce import Context
from thalweg.core_optim.engine.rule import LIKE, ElementRule, StateSpec
from thalweg.core_optim.engine.tensors import Tensors
from thalweg.core_optim.engine.update import widen
from thalweg.core_optim.engine.views import as_real

if TYPE_CHECKING:
    from thalweg.core_optim.engine.buckets import Slot


class SGDSaI(ElementRule):
    """The ratio of a tensor's gradient norm to the spread of its entries scales its learning rate for good.

    The official code takes the ratio from the first gradient, and a tensor whose first gradient is exactly 0,
    such as the A matrices of a fresh LoRA, never trains. Here the first gradient that is not 0 counts.
    """

    name = "sgdsai"
    title = "SGDSaI"
    summary = "SGD with momentum, each tensor's rate scaled once by its gradient's signal-to-noise ratio."
    source = "Xu et al. 2024, arXiv:2412.11768; code sgd-sai 1.0.3; zero first gradients repaired"
    equations = """s = |g|_2 / (std(g) + eps) at the first gradient that is not 0, then fixed
m <- g at that step, afterwards mu m + (1 - mu) g
p <- p (1 - lr wd) - lr s m           (normalize: s / max over the group)"""
    state_size = "1 + a number per tensor"
    sums = True
    options: ClassVar[Mapping[str, Option]] = {
        "lr": Option(1e-2, at_least(0.0), "learning rate; each tensor multiplies it by about sqrt(size)"),
        "momentum": Option(0.9, share(), "decay rate mu of the momentum"),
        "eps": Option(1e-8, more_than(0.0), "term added to the standard deviation"),
        "weight_decay": Option(1e-2, at_least(0.0), "weight decay"),
        "normalize": Option(False, FLAG, "divide the ratios by the largest of their group, as in the paper"),
    }

    def states(self, shape: torch.Size, o: Mapping[str, Any]) -> dict[str, StateSpec]:
        """Momentum and the ratio, 0 until a gradient has come."""
        once = {"fresh": StateSpec((), torch.float32)} if o["normalize"] else {}
        return {"momentum_buffer": LIKE, "gsnr": StateSpec((), torch.float32), **once}

    def case(self, slot: Slot, o: Mapping[str, Any]) -> str:
        """Whether the ratio is fixed already; only a CPU can tell without waiting for a device."""
        ratio = slot.state["gsnr"]
        if not o["normalize"] and slot.t > 1 and ratio.device.type == "cpu" and float(ratio) != 0.0:
            return "settled"
        return "open"

    def needs_sums(self, variant: str) -> bool:
        """Until the ratio is fixed."""
        return variant != "settled"

    def begin(self, group: dict[str, Any], slots: Sequence[Slot]) -> dict[str, Any]:
        """With ``normalize``, all ratios of the group before any update, and the largest of them."""
        if not group["normalize"]:
            return {}
        for slot in slots:
            slot.state["fresh"].copy_(slot.state["gsnr"] == 0.0)
            sharded = sharding.is_sharded(slot.parameter)
            g = Tensors([as_real(sharding.local(slot.gradient)).reshape(-1)])
            x = Context(group, "", [sharding.layout_of(slot.parameter)] if sharded else None)
            _settle(Tensors([slot.state["gsnr"]]), widen(g), group["eps"], x)  # type: ignore[arg-type]
        largest = torch.stack([slot.state["gsnr"] for slot in slots]).amax()
        return {"largest": torch.where(largest > 0.0, largest, torch.ones_like(largest))}

    def update(
        self, p: Tensor, g: Tensor, s: Mapping[str, Tensor], h: Mapping[str, Any], x: Context
    ) -> Tensor:
        """Momentum times the ratio."""
        ratio, m = s["gsnr"], s["momentum_buffer"]
        if x.variant == "settled":
            return ema_(m, g, h["momentum"]) * ratio
        if x.options["normalize"]:
            # the ratio has been fixed before the step, so it no longer tells whether this gradient did it
            fresh = each(lambda f: f != 0.0, s["fresh"])
        else:
            fresh = each(lambda r: r == 0.0, ratio)
            _settle(ratio, g, h["eps"], x)
        m.copy_(where(fresh, g, m * h["momentum"] + g * (1.0 - h["momentum"])))
        return m * ratio / h["largest"] if x.options["normalize"] else m * ratio


def _settle(ratio: Tensor, g: Tensor, eps: Any, x: Context) -> None:
    """Fix a ratio that is still 0 by this gradient; a single element has no spread, and gets the ratio 1."""
    norm = x.norm(g)
    found = norm / (x.std(g) + eps)
    alone = x.alone(g)
    ratio.copy_(where(each(lambda r: r == 0.0, ratio), where(alone, each(_nonzero, norm), found), ratio))


def _nonzero(norm: Tensor) -> Tensor:
    return (norm > 0.0).to(norm.dtype)
