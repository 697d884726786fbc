"""NAdamW in the form of optax."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from thalweg.core_optim.engine.ops import axpy_, denominator, ema_
from thalweg.core_optim.engine.options import Option
from thalweg.core_optim.engine.reduce import Context
from thalweg.core_optim.engine.rule import adam_options, bias_corrections
from thalweg.core_optim.rules.adam import Adam


class NAdamW(Adam):
    """AdamW with Nesterov momentum."""

    name = "nadamw"
    title = "NAdamW"
    summary = "AdamW that looks ahead by one momentum step; not torch.optim.NAdam."
    source = "Dozat 2016; optax.nadamw, as in Wen et al. 2025, arXiv:2509.02046"
    equations = """m <- b1 m + (1 - b1) g
v <- b2 v + (1 - b2) g^2
n = b1 m / (1 - b1^(t+1)) + (1 - b1) g / (1 - b1^t)
p <- p (1 - lr wd) - lr n / (sqrt(v / (1 - b2^t)) + eps)"""
    moduli = True
    options: ClassVar[Mapping[str, Option]] = adam_options(weight_decay=1e-2)

    def scalars(self, t: int, o: Mapping[str, Any]) -> dict[str, float]:
        """Weights of momentum and gradient in the look-ahead."""
        beta1 = o["betas"][0]
        return {
            "root_bias2": bias_corrections(t, o)["root_bias2"],
            "of_m": beta1 / (1.0 - beta1 ** (t + 1)),
            "of_g": (1.0 - beta1) / (1.0 - beta1**t),
        }

    def update(
        self, p: Tensor, g: Tensor, s: Mapping[str, Tensor], h: Mapping[str, Any], x: Context
    ) -> Tensor:
        """Look-ahead momentum over the root of the second moment."""
        m = ema_(s["exp_avg"], g, h["beta1"])
        v = x.mean_square_(s["exp_avg_sq"], g, h["beta2"])
        return axpy_(m * h["of_m"], g, h["of_g"]).div_(denominator(v, h["root_bias2"], h["eps"]))
