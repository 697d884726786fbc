"""Kron: PSGD with a Kronecker-factored preconditioner, checkpointable by the step alone."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Mapping
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
from thalweg.core_optim.linalg import psgd

ANNEALED: dict[str, float] = {"max": 1.0, "min": 0.03, "decay": 0.001, "flat_start": 500.0}
"""Schedule of the probability of an update: max exp(-decay (n - flat_start)) between min and max."""
BATCH = 1 << 24
"""Elements of gradients that are handled in one batch."""


class Steps:
    """Steps at which something happens, replayed from the first one: a function of the step, with a memory.

    Args:
        happens: For the steps 1, 2, ... in order, whether it happens.
    """

    def __init__(self, happens: Callable[[int], bool]) -> None:
        self._happens, self._known, self._found = happens, 0, set[int]()

    def __contains__(self, step: int) -> bool:
        while self._known < step:
            self._known += 1
            if self._happens(self._known):
                self._found.add(self._known)
        return step in self._found


def _counter(probability: Callable[[int], float]) -> Callable[[int], bool]:
    count = 0

    def happens(step: int) -> bool:
        nonlocal count
        count += 1
        chance = probability(step - 1)
        if chance <= 0.0 or count < 1.0 / chance:
            return False
        count = 0
        return True

    return happens


@functools.cache
def update_steps(settings: float | tuple[tuple[str, float], ...]) -> Steps:
    """Steps at which the preconditioner is fitted: a counter that fires when it reaches 1 / probability.

    Args:
        settings: A constant probability, or the items of a table like `ANNEALED`.
    """
    if isinstance(settings, float):
        return Steps(_counter(lambda _: settings))
    table = dict(settings)

    def probability(n: int) -> float:
        value = table["max"] * math.exp(-table["decay"] * (n - table["flat_start"]))
        return min(max(value, table["min"]), table["max"])

    return Steps(_counter(probability))


@functools.cache
def balance_steps(seed: int, probability: float) -> Steps:
    """Steps at which factors are balanced, if they are fitted then: one draw of Python's generator a step."""
    source = random.Random(seed)
    return Steps(lambda _: source.random() < probability)


def _table(value: Any) -> dict[str, float]:
    if not isinstance(value, Mapping) or set(value) - set(ANNEALED):
        raise ValueError
    number = at_least(0.0).coerce
    return {**ANNEALED, **{key: float(number(item)) for key, item in value.items()}}


PROBABILITY = either(
    NONE, share(open_above=False), Check(_table, f"a table with some of {', '.join(ANNEALED)}")
)


class Kron(MatrixRule):
    """PSGD Kron; see the equations.

    Nothing beside tensors is remembered: the counter of the updates and the draws of the balancing are
    replayed from the step, and probes come from (seed, step, parameter). A gradient that is zero everywhere
    leaves the factors alone.
    """

    name = "kron"
    title = "Kron"
    summary = "PSGD: a Kronecker-factored preconditioner is fitted so that it whitens gradients"
    source = "Li 2018, arXiv:1512.04202; code evanatyourservice/kron_torch 0.3.3"
    equations = """m <- b1 m + (1 - b1) g;  M = m / (1 - b1^t), a matrix where merge_dims
at an update (a counter reaches 1 / probability), with v ~ N(0, 1):
    M <- M + 2^-11.5 mean|M| v;  A = (Q1 x ... x Qn) M;  B = (Q1 x ... x Qn)^-T v
    Qk <- Qk - precond_lr triu(Ak Ak^T - Bk Bk^T) Qk / lower bound of |Ak Ak^T + Bk Bk^T|
u = (Q1^T Q1 x ... x Qn^T Qn) M;  u <- u min(1, 1.1 / rms(u))
p <- p - lr (u + weight_decay p), decay only with two dimensions or more"""
    state_size = "1 + sum d^2 / prod d"
    decay = "decoupled"
    options: ClassVar[Mapping[str, Option]] = {
        "lr": Option(3e-4, at_least(0.0), "learning rate; updates have a root mean square of at most 1.1"),
        "b1": Option(0.9, share(), "decay rate of the momentum"),
        "weight_decay": Option(0.0, at_least(0.0), "weight decay of tensors with two dimensions or more"),
        "preconditioner_update_probability": Option(
            None, PROBABILITY, "share of steps that fit the preconditioner, or its schedule; annealed if none"
        ),
        "max_size_triangular": Option(8192, integer(0), "larger dimensions get a diagonal factor"),
        "min_ndim_triangular": Option(2, integer(0), "tensors of fewer dimensions get diagonal factors"),
        "memory_save_mode": Option(
            None,
            either(NONE, choice(*[mode for mode in psgd.MEMORY_MODES if mode])),
            "make factors diagonal: of the largest dimension, of a strictly largest one, of all",
        ),
        "momentum_into_precond_update": Option(True, FLAG, "fit to the momentum instead of the gradient"),
        "precond_lr": Option(0.1, at_least(0.0), "step of the fit"),
        "precond_init_scale": Option(1.0, more_than(0.0), "the preconditioner's factors start at this scale"),
        "merge_dims": Option(
            True,
            either(FLAG, choice("square")),
            "treat tensors of more than two dimensions as matrices, as published or as square as can be",
        ),
        "balance_probability": Option(0.01, share(open_above=False), "share of updates that balance factors"),
        "balance_seed": Option(42, integer(0), "seed of the draws that decide on balancing"),
    }

    def states(self, shape: torch.Size, o: Mapping[str, Any]) -> dict[str, StateSpec]:
        """Momentum and one factor per (merged) dimension, which becomes the identity at the first step."""
        merged = psgd.merged_shape(shape, o["merge_dims"])
        factors = {
            f"factor_{mode}": StateSpec((size,) if diagonal else (size, size))
            for mode, (size, diagonal) in enumerate(zip(merged, self._diagonal(merged, o)))
        }
        return {"momentum": LIKE, **factors}

    def _diagonal(self, merged: tuple[int, ...], o: Mapping[str, Any]) -> tuple[bool, ...]:
        return psgd.diagonal_modes(
            merged,
            max_size=o["max_size_triangular"],
            min_ndim=o["min_ndim_triangular"],
            memory_save_mode=o["memory_save_mode"],
        )

    def decays(self, shape: torch.Size, o: Mapping[str, Any]) -> bool:
        """Vectors and scalars do not decay."""
        return len(shape) >= 2

    def update(self, items: list[Item], h: Mapping[str, Any], o: Mapping[str, Any]) -> list[Tensor | None]:
        """Preconditioned momenta, in batches of one shape and step."""
        batches: dict[Any, list[int]] = {}
        for number, item in enumerate(items):
            merged = psgd.merged_shape(item.p.shape, o["merge_dims"])
            batches.setdefault((merged, item.t), []).append(number)
        directions: list[Tensor | None] = [None] * len(items)
        for (merged, t), numbers in batches.items():
            size = max(1, BATCH // max(1, math.prod(merged)))
            for part in _parts(numbers, size):
                members = [items[number] for number in part]
                u = self._batch(members, merged, t, h, o)
                for number, item, direction in zip(part, members, u):
                    directions[number] = direction.reshape(item.p.shape)
        return directions

    def _batch(
        self, items: list[Item], merged: tuple[int, ...], t: int, h: Mapping[str, Any], o: Mapping[str, Any]
    ) -> Tensor:
        names = [f"factor_{mode}" for mode in range(len(merged))]
        if t == 1:
            self._start(items, merged, o)
        for item in items:
            item.s["momentum"].mul_(h["b1"]).add_(item.g, alpha=1.0 - h["b1"])
        m = torch.stack([item.s["momentum"].reshape(merged).to(item.g.dtype) for item in items])
        m = m / (1.0 - h["b1"] ** t)
        factors = [torch.stack([item.s[name].to(item.g.dtype) for item in items]) for name in names]
        if t in _updates(o):
            if len(merged) > 1 and t in balance_steps(o["balance_seed"], o["balance_probability"]):
                factors = psgd.balance(factors)
            v = torch.stack([i.random.normal(merged, step=t, index=i.index, like=i.g) for i in items])
            if o["momentum_into_precond_update"]:
                # as published, the noise stays in what is applied
                m = source = psgd.add_noise(m, v)
            else:
                source = psgd.add_noise(torch.stack([i.g.reshape(merged) for i in items]), v)
            factors = psgd.update_factors(factors, source, v, h["precond_lr"])
            for name, factor in zip(names, factors):
                for item, value in zip(items, factor):
                    item.s[name].copy_(value)
        return psgd.clip_rms(psgd.precondition(factors, m))

    def _start(self, items: list[Item], merged: tuple[int, ...], o: Mapping[str, Any]) -> None:
        diagonal = self._diagonal(merged, o)
        for item in items:
            for mode, (size, single) in enumerate(zip(merged, diagonal)):
                factor = psgd.initial_factor(size, single, o["precond_init_scale"], len(merged), item.g)
                item.s[f"factor_{mode}"].copy_(factor)


def _updates(o: Mapping[str, Any]) -> Steps:
    setting = o["preconditioner_update_probability"]
    table = ANNEALED if setting is None else setting
    return update_steps(table if isinstance(table, float) else tuple(sorted(table.items())))


def _parts(numbers: list[int], size: int) -> list[list[int]]:
    return [numbers[start : start + size] for start in range(0, len(numbers), size)]
