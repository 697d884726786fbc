"""Adam-mini: one second moment for a block of parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from thalweg.core_optim.engine.ops import denominator, ema_
from thalweg.core_optim.engine.options import Option, choice, integer
from thalweg.core_optim.engine.reduce import Context
from thalweg.core_optim.engine.rule import LIKE, StateSpec, adam_options
from thalweg.core_optim.rules.adam import Adam


class AdamMini(Adam):
    """AdamW with the mean square of a block in the place of each element's square.

    Blocks are declared per group. The official code guesses them from parameter names; for a transformer it
    takes ``heads`` for queries and keys, ``rows`` for values, projections, MLPs, embeddings and the output,
    ``tensor`` for norms, ``full`` for biases.
    """

    name = "adammini"
    title = "AdamMini"
    summary = "AdamW with one second moment per block: row, head or tensor."
    source = "Zhang et al. 2024, arXiv:2406.16793; code adam-mini 1.1.1, blocks declared instead of guessed"
    equations = """m <- b1 m + (1 - b1) g
v <- b2 v + (1 - b2) mean over the block of g^2
p <- p (1 - lr wd) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)"""
    state_size = "1 + a number per block"
    view = "rows"
    sums = True
    moduli = True
    options: ClassVar[Mapping[str, Option]] = {
        **adam_options(),
        "block": Option(
            "rows", choice("full", "rows", "heads", "tensor"), "what shares a second moment; full is AdamW"
        ),
        "heads": Option(1, integer(1), "equal runs of rows for block heads"),
    }

    def refuse(self, parameter: Tensor, o: Mapping[str, Any]) -> str | None:
        """Heads must divide the rows."""
        rows = parameter.shape[0] if parameter.dim() else 1
        if o["block"] == "heads" and rows % o["heads"]:
            return f"its {rows} rows do not split into {o['heads']} heads; allowed: a divisor"
        return None

    def states(self, shape: torch.Size, o: Mapping[str, Any]) -> dict[str, StateSpec]:
        """Momentum, and a number per block."""
        v = LIKE if o["block"] == "full" else StateSpec(() if o["block"] == "tensor" else "rows")
        if o["block"] == "heads":
            v = StateSpec((o["heads"], 1))
        return {"exp_avg": LIKE, "exp_avg_sq": v}

    def variant(self, shape: torch.Size, o: Mapping[str, Any], t: int) -> str:
        """The kind of block."""
        return str(o["block"])

    def update(
        self, p: Tensor, g: Tensor, s: Mapping[str, Tensor], h: Mapping[str, Any], x: Context
    ) -> Tensor:
        """Momentum over the root of its block's second moment."""
        m = ema_(s["exp_avg"], g, h["beta1"])
        v, square = s["exp_avg_sq"], x.agreement(g, g)
        if x.variant == "tensor":
            square = x.mean(square)
        elif x.variant == "rows":
            square = x.row_mean(square)
        elif x.variant == "heads":
            square = x.block_mean(square, x.options["heads"])
        ema_(v, square, h["beta2"])
        if x.variant == "heads":
            v = x.block_rows(v, g)
        return m / denominator(v, h["root_bias2"], h["eps"])
