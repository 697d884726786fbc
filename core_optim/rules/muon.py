"""Muon: momentum whose matrices are made orthogonal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from thalweg.core_optim.engine.options import (
    FLAG,
    NONE,
    Check,
    Option,
    at_least,
    choice,
    either,
    integer,
    more_than,
    share,
)
from thalweg.core_optim.engine.rule import LIKE, Item, MatrixRule, StateSpec
from thalweg.core_optim.linalg.newton_schulz import DTYPES, QUINTIC, muon_scale, orthogonalise

CONVENTIONS = ("original", "match_rms_adamw", "spectral", "none")
NS_DTYPE = Option(
    "auto",
    choice("auto", *DTYPES),
    "number type of the iteration; auto: bf16 for fp32 matrices from 128 x 128 on where it is fast",
)


def _schedule(value: Any) -> tuple[tuple[float, ...], ...]:
    steps = value if isinstance(value, list | tuple) else ()
    if not steps or not all(isinstance(step, list | tuple) and len(step) == 3 for step in steps):
        raise ValueError
    if not all(isinstance(c, int | float) for step in steps for c in step):
        raise ValueError
    return tuple(tuple(float(c) for c in step) for step in steps)


def _rows(value: Any) -> tuple[int, ...]:
    one = integer(1).coerce
    if not isinstance(value, list | tuple) or not value:
        raise ValueError
    return tuple(one(v) for v in value)


class Muon(MatrixRule):
    """Muon; see the equations.

    For hidden matrices and convolutions (as out x rest); embeddings, heads, norms and biases want another
    rule. Matrices of the same shape, or of that of the transpose, are iterated in batches on GPUs.
    """

    outside: ClassVar[Mapping[str, Any]] = {}
    name = "muon"
    title = "Muon"
    summary = "Momentum whose matrices are replaced by nearly orthogonal ones, by Newton-Schulz iteration"
    source = "Jordan et al. 2024, kellerjordan.github.io/posts/muon; as torch.optim.Muon 2.13"
    equations = """m <- mu m + (1 - mu) g;  n = (1 - mu) g + mu m  (nesterov), else m
X = n / max(|n|_F, eps);  ns_steps times: A = X Xᵀ, X <- 3.4445 X + (-4.7750 A + 2.0315 A²) X
p <- p (1 - lr wd) - lr s X
s: original sqrt(max(1, rows / columns)), match_rms_adamw 0.2 sqrt(max(rows, columns)),
   spectral sqrt(rows / columns), none 1
heads, split: X and s by blocks of rows"""
    state_size = "1"
    decay = "decoupled"
    options: ClassVar[Mapping[str, Option]] = {
        "lr": Option(0.02, at_least(0.0), "learning rate; match_rms_adamw takes that of AdamW"),
        "momentum": Option(0.95, share(), "decay rate mu of the momentum"),
        "weight_decay": Option(0.0, at_least(0.0), "weight decay"),
        "nesterov": Option(True, FLAG, "look ahead by one more momentum step"),
        "ns_steps": Option(5, integer(1, 100), "Newton-Schulz iterations"),
        "eps": Option(1e-7, more_than(0.0), "smallest norm to divide by"),
        "ns_coefficients": Option(
            None,
            either(NONE, Check(_schedule, "a list of three numbers per step")),
            "a, b, c of each iteration, the last ones repeated; Jordan's if none",
        ),
        "adjust_lr": Option("original", choice(*CONVENTIONS), "factor on the update by shape"),
        "ns_dtype": NS_DTYPE,
        "heads": Option(1, integer(1), "orthogonalise that many equal blocks of rows one by one"),
        "split": Option(
            None,
            either(NONE, Check(_rows, "a list of numbers of rows")),
            "orthogonalise blocks of these numbers of rows one by one, as (d, d, d) for a fused QKV",
        ),
    }

    def states(self, shape: torch.Size, o: Mapping[str, Any]) -> dict[str, StateSpec]:
        """Momentum."""
        return {"momentum_buffer": LIKE}

    def refuse(self, parameter: Tensor, o: Mapping[str, Any]) -> str | None:
        """Matrices and convolutions only, and blocks must fit."""
        if parameter.ndim < 2:
            return "Muon is for matrices and convolutions; give the rest to another rule such as adamw"
        rows = parameter.shape[0]
        if o["split"] is not None and sum(o["split"]) != rows:
            return f"split {list(o['split'])} sums to {sum(o['split'])}, but there are {rows} rows"
        if any(size % o["heads"] for size in o["split"] or (rows,)):
            return f"blocks of {list(o['split'] or (rows,))} rows do not divide into {o['heads']} heads"
        return None

    def update(self, items: list[Item], h: Mapping[str, Any], o: Mapping[str, Any]) -> list[Tensor | None]:
        """Orthogonal directions, scaled by shape."""
        blocks: list[Tensor] = []
        counts: list[int] = []
        for item in items:
            found = _blocks(_momentum(item, h["momentum"], o["nesterov"]), o)
            blocks += found
            counts.append(len(found))
        schedule = o["ns_coefficients"] or (QUINTIC,)
        results = orthogonalise(
            blocks, o["ns_dtype"], steps=o["ns_steps"], eps=h["eps"], coefficients=schedule
        )
        directions: list[Tensor | None] = []
        first = 0
        for item, count in zip(items, counts):
            scaled = [_scaled(x, o["adjust_lr"]) for x in results[first : first + count]]
            first += count
            whole = scaled[0] if count == 1 else torch.cat(scaled)
            directions.append(whole.reshape(item.p.shape))
        return directions


def _momentum(item: Item, mu: float, nesterov: bool) -> Tensor:
    m = item.s["momentum_buffer"]
    m.lerp_(item.g.to(m.dtype), 1.0 - mu)
    return item.g.lerp(m.to(item.g.dtype), mu) if nesterov else m.to(item.g.dtype)


def _blocks(x: Tensor, o: Mapping[str, Any]) -> list[Tensor]:
    """Matrices of (rows, rest) that are orthogonalised one by one."""
    x = x.reshape(x.shape[0], -1)
    parts = x.split(list(o["split"])) if o["split"] else [x]
    return [head for part in parts for head in part.chunk(o["heads"])]


def _scaled(x: Tensor, convention: str) -> Tensor:
    scale = muon_scale(x.shape[0], x.shape[1], convention)
    return x if scale == 1.0 else x.mul_(scale)
