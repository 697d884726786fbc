"""M-FAC: gradients preconditioned by the inverse Fisher matrix of the last few of them, in closed form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from thalweg.core_optim.engine.options import (
    FLAG,
    NONE,
    Option,
    at_least,
    choice,
    either,
    integer,
    more_than,
    share,
)
from thalweg.core_optim.engine.rule import LIKE, Item, MatrixRule, StateSpec
from thalweg.core_optim.linalg import fisher


class MFAC(MatrixRule):
    """M-FAC, dynamic; see the equations.

    Each parameter keeps its own columns of the window and their share of G G^T, and a scope adds the shares
    up. So a parameter may be missing from a step, and a window is exact after a checkpoint.
    """

    name = "mfac"
    title = "MFAC"
    summary = "gradients times the inverse Fisher matrix of a window of gradients"
    source = "Frantar et al. 2021, arXiv:2107.03356; code IST-DASLab/M-FAC"
    equations = """x = g + weight_decay p, over all parameters of a scope as one vector (decay: coupled)
row (t - 1) mod m of G <- x;  F = damping I + G^T G / m
u = F^-1 x = m G^T (G G^T + m damping I)^-1 e, with x = G^T e
b <- momentum b + (1 - momentum) u;  p <- p - lr b
m stays the divisor while the window fills. lr, damping and m are coupled: a first step is
lr x / (damping + |x|^2 / m)."""
    state_size = "num_grads (+ 1 with momentum)"
    decay = "coupled"
    options: ClassVar[Mapping[str, Option]] = {
        "lr": Option(1e-3, at_least(0.0), "learning rate"),
        "momentum": Option(0.0, share(), "decay rate of the mean of the preconditioned gradients"),
        "weight_decay": Option(0.0, at_least(0.0), "weight decay; it enters the window"),
        "num_grads": Option(64, integer(1), "gradients in the window; published: 1024"),
        "damping": Option(1e-5, more_than(0.0), "multiple of the identity in F"),
        "scope": Option("joint", choice("joint", "tensor"), "one F for a group, or one for each tensor"),
        "window_dtype": Option(
            None, either(NONE, choice("bfloat16")), "store the window rounded; F is that of rounded gradients"
        ),
        "window_device": Option(None, either(NONE, choice("cpu")), "keep the window in host memory"),
        "sparse": Option(False, FLAG, "keep weights that are 0 before the first step at 0"),
    }

    def states(self, shape: torch.Size, o: Mapping[str, Any]) -> dict[str, StateSpec]:
        """Window, its products, and as asked momentum and mask.

        A bf16 window is kept as the bits in int16, since the engine would widen floating types for every
        step. One on the host is made there at the first step.
        """
        rows = o["num_grads"] if o["window_device"] is None else 0
        bits = torch.int16 if o["window_dtype"] == "bfloat16" else None
        return {
            "window": StateSpec((rows, shape.numel()), bits),
            "gram": StateSpec((rows, rows), torch.float64),
            **({"momentum": LIKE} if o["momentum"] > 0.0 else {}),
            **({"mask": StateSpec("like", torch.bool)} if o["sparse"] else {}),
        }

    def update(self, items: list[Item], h: Mapping[str, Any], o: Mapping[str, Any]) -> list[Tensor | None]:
        """Preconditioned gradients, averaged if there is momentum."""
        scopes = [items] if o["scope"] == "joint" else [[item] for item in items]
        found = [u for scope in scopes for u in _precondition(scope, o)]
        directions: list[Tensor | None] = []
        for item, u in zip(items, found):
            if "momentum" in item.s:
                mean = item.s["momentum"]
                mean.lerp_(u.to(mean.dtype), 1.0 - h["momentum"])
                u = mean.to(u.dtype)
            directions.append(u)
        return directions


def _precondition(items: list[Item], o: Mapping[str, Any]) -> list[Tensor]:
    """F^-1 x of the parameters of a scope, after x has entered the window.

    Where the window is rounded, x is the rounded gradient too: what rounding leaves outside the window would
    come out divided by the damping.
    """
    row = (max(item.t for item in items) - 1) % o["num_grads"]
    windows = [_window(item, o) for item in items]
    for item, window in zip(items, windows):
        fisher.replace_row(window, item.s["gram"], row, _masked(item, o).reshape(-1))
    gram = torch.stack([item.s["gram"] for item in items]).sum(0)
    weights = fisher.row_weights(gram, row, o["damping"])
    directions = []
    for item, window in zip(items, windows):
        u = fisher.window_combine(window, weights, item.g.dtype)
        directions.append(u.to(item.g.device).view(item.g.shape))
    return directions


def _window(item: Item, o: Mapping[str, Any]) -> Tensor:
    """The window in its floating type, on the device where it is kept."""
    device = torch.device(o["window_device"]) if o["window_device"] else item.g.device
    window, gram = item.s["window"], item.s["gram"]
    if len(window) == 0:
        window = torch.zeros(o["num_grads"], item.g.numel(), dtype=window.dtype, device=device)
        gram = torch.zeros(o["num_grads"], o["num_grads"], dtype=torch.float64, device=device)
    # loading a checkpoint puts states on the device of the parameter
    item.s["window"], item.s["gram"] = window.to(device), gram.to(device)
    return item.s["window"].view(torch.bfloat16) if o["window_dtype"] == "bfloat16" else item.s["window"]


def _masked(item: Item, o: Mapping[str, Any]) -> Tensor:
    if not o["sparse"]:
        return item.g
    if item.t == 1:
        item.s["mask"] = item.p != 0
    return item.g * item.s["mask"]
