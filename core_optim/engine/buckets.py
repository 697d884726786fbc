"""Parameters of a group that may be updated in one call, and the kernels that do it.

A bucket holds parameters of one dtype, device, layout, step and case of the rule.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thalweg.core_optim.engine import sharding
from thalweg.core_optim.engine.groups import COMMON
from thalweg.core_optim.engine.random import Randomness, mix
from thalweg.core_optim.engine.reduce import Context
from thalweg.core_optim.engine.rounding import Numbers
from thalweg.core_optim.engine.rule import ElementRule, Item, MatrixRule, Rule
from thalweg.core_optim.engine.tensors import Tensors
from thalweg.core_optim.engine.update import (
    Plan,
    apply_update,
    caution,
    compiled,
    element_step,
    narrow_,
    prepare_gradient,
    widen,
)
from thalweg.core_optim.engine.views import as_real, can_view, like_order, viewed

PIECE = 131072
"""Elements of a piece: long enough that the calls cost little, short enough for the last level of a cache."""
SMALL = 4096
"""Elements below which a few plain operations of a CPU take less time than the call of a compiled kernel."""


@dataclass
class Slot:
    """One parameter in a step."""

    parameter: Tensor
    gradient: Tensor
    state: dict[str, Any]
    t: int
    index: int
    name: str


@dataclass(frozen=True)
class Job:
    """What the slots of a bucket have in common."""

    rule: Rule
    plan: Plan
    variant: str
    kernel: str
    options: Mapping[str, Any]
    numbers: dict[str, float]
    random: Randomness


@dataclass
class Views:
    """Local real views of a slot's tensors, and what has to be copied back because it could not be viewed."""

    p: Tensor
    g: Tensor
    s: dict[str, Tensor]
    back: list[tuple[Tensor, Tensor]]


def views_of(slot: Slot, rule: ElementRule) -> Views:
    """Tensors of a slot in the shape in which its rule wants them."""
    p = as_real(sharding.local(slot.parameter).detach())
    g = as_real(sharding.local(slot.gradient))
    full = slot.parameter.shape
    states = {
        name: as_real(sharding.local(value))
        for name, value in slot.state.items()
        if isinstance(value, Tensor) and name != "step"
    }
    like = {name for name in states if slot.state[name].shape == full and states[name].shape == p.shape}
    strides = {states[name].stride() for name in like} | {p.stride()}
    if (len(strides) == 1 or p.is_contiguous()) and can_view(p, rule.view):
        s = {name: viewed(v, rule.view) if name in like else v for name, v in states.items()}
        return Views(viewed(p, rule.view), viewed(like_order(g, p), rule.view), s, [])
    back: list[tuple[Tensor, Tensor]] = []

    def packed(x: Tensor) -> Tensor:
        copy = x.clone(memory_format=torch.contiguous_format)
        back.append((x, copy))
        return viewed(copy, rule.view)

    s = {name: packed(v) if name in like else v for name, v in states.items()}
    return Views(packed(p), viewed(g.contiguous(), rule.view), s, back)


def rounding_keys(slot: Slot, random: Randomness) -> dict[str, tuple[int, Numbers]]:
    """Keys of the stochastic rounding of a parameter, ``p``, and its states, and where elements are counted.

    Replicas of a parameter get the same, and parts of one get theirs of the whole.
    """
    key = mix(random.seed, slot.t, slot.index)
    tensors = {"p": slot.parameter, **{name: value for name, value in slot.state.items() if name != "step"}}
    return {
        name: ((key + stream * 0x3C6EF35) & 0x7FFFFFFF, sharding.numbers_of(value))
        for stream, (name, value) in enumerate(tensors.items())
        if value.dtype == torch.bfloat16
    }


def run_elements(job: Job, slots: list[Slot]) -> None:
    """Update a bucket with an element rule."""
    rule = job.rule
    assert isinstance(rule, ElementRule)
    sharded = sharding.is_sharded(slots[0].parameter)
    views = [views_of(slot, rule) for slot in slots]
    keys = [rounding_keys(slot, job.random) for slot in slots] if job.plan.stochastic else None
    moduli = job.options["complex"] == "modulus" and slots[0].parameter.is_complex()
    if job.kernel == "foreach":
        layouts = [sharding.layout_of(slot.parameter) for slot in slots] if sharded else None
        x = Context(job.options, job.variant, layouts, moduli=moduli)
        s = {name: Tensors([v.s[name] for v in views]) for name in views[0].s}
        p, g = Tensors([v.p for v in views]), Tensors([v.g for v in views])
        element_step(rule, job.plan, p, g, s, job.numbers, x, keys)  # type: ignore[arg-type]
    elif job.kernel == "compile":
        _run_compiled(job, views, keys, moduli)
    else:
        _run_loop(job, views, keys, moduli, slots[0])
    for v in views:
        for target, copy in v.back:
            target.copy_(copy.view(target.shape))


def _run_loop(job: Job, views: list[Views], keys: Any, moduli: bool, first: Slot) -> None:
    rule = job.rule
    assert isinstance(rule, ElementRule)
    x = Context(job.options, job.variant, moduli=moduli)
    pieces = can_be_cut(job, first)
    for i, v in enumerate(views):
        own = keys and keys[i]
        for p, g, s, key in cut(v, own) if pieces else [(v.p, v.g, v.s, own)]:
            element_step(rule, job.plan, p, g, s, job.numbers, x, key)


def _run_compiled(job: Job, views: list[Views], keys: Any, moduli: bool) -> None:
    rule = job.rule
    assert isinstance(rule, ElementRule)
    # a group may also hold counters, which must not become part of a graph
    known = {k: job.options[k] for k in (*COMMON, *rule.options)}
    fixed = tuple(sorted((k, v) for k, v in known.items() if isinstance(v, bool | int | str)))
    kernel = compiled(rule, job.plan, job.variant, fixed, moduli, tuple(job.numbers))
    numbers = _scalars(job.numbers, views[0].p.device)
    small = SMALL if views[0].p.device.type == "cpu" else 0
    x = Context(job.options, job.variant, moduli=moduli)
    for i, v in enumerate(views):
        if v.p.numel() < max(small, 2):  # the compiler would make a graph of its own for a single element
            element_step(rule, job.plan, v.p, v.g, v.s, job.numbers, x, keys and keys[i])
            continue
        # of a view the compiler would see the shape of what it views, and make a graph for every kind of that
        torch.autograd.graph.increment_version(v.p)
        v = Views(v.p.data, v.g.data, {name: value.data for name, value in v.s.items()}, [])
        kernel(
            v.p,
            v.g,
            v.s,
            numbers,
            keys and {name: tuple(map(_int32, pair)) for name, pair in keys[i].items()},
        )


def _scalars(numbers: Mapping[str, Any], device: torch.device) -> dict[str, Tensor] | Tensor:
    """Numbers as tensors in fp64, since 1 - beta must not be rounded first: 0-d on the CPU for any device.

    On a CPU they are put into one tensor. A GPU's kernels take 0-d CPU tensors as arguments, without a copy.
    """
    if device.type == "cpu":
        return torch.tensor([float(value) for value in numbers.values()], dtype=torch.float64)
    return {
        name: value.double() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
        for name, value in numbers.items()
    }


def _int32(number: Numbers) -> Tensor:
    return number if isinstance(number, Tensor) else torch.tensor(number, dtype=torch.int32)


def can_be_cut(job: Job, slot: Slot) -> bool:
    """Whether the loop may go through a parameter in pieces that fit a CPU's cache."""
    rule = job.rule
    assert isinstance(rule, ElementRule)
    needs_sums = rule.needs_sums(job.variant) or job.plan.cautious
    return rule.view == "flat" and not needs_sums and slot.parameter.device.type == "cpu"


def cut(v: Views, keys: Mapping[str, Any] | None) -> Iterator[tuple[Tensor, Tensor, dict[str, Tensor], Any]]:
    """Pieces of flat views: every pass over a piece but the first finds it in the cache."""
    n = v.p.numel()
    if n <= PIECE or any(value.numel() not in (n, 1) for value in v.s.values()):
        yield v.p, v.g, v.s, keys
        return
    for start in range(0, n, PIECE):
        part = slice(start, start + PIECE)
        states = {name: value[part] if value.numel() == n else value for name, value in v.s.items()}
        yield v.p[part], v.g[part], states, keys and {k: _of(part, *pair) for k, pair in keys.items()}


def _of(part: slice, key: int, numbers: Numbers) -> tuple[int, Numbers]:
    return key, numbers[part] if isinstance(numbers, Tensor) else numbers + part.start


def run_matrices(job: Job, slots: list[Slot]) -> None:
    """Update all parameters of a group with a matrix rule; parts of matrices are gathered first."""
    rule, plan, h = job.rule, job.plan, job.numbers
    assert isinstance(rule, MatrixRule)
    items, gradients = [], []
    for slot in slots:
        p, g = widen(slot.parameter.detach()), widen(slot.gradient)
        g = sharding.whole(prepare_gradient(plan, p, g, h))
        state = {k: v for k, v in slot.state.items() if k != "step"}
        wide = {k: widen(v) if v.dtype in (torch.bfloat16, torch.float16) else v for k, v in state.items()}
        items.append(Item(sharding.whole(p), g, wide, slot.t, slot.index, slot.name, job.random))
        gradients.append(g)
    directions = rule.update(items, h, job.options)
    x = Context(job.options)
    for slot, item, g, u in zip(slots, items, gradients, directions):
        _keep_state(slot, item, job)
        if u is None:
            continue
        if plan.cautious:
            u = caution(u, g, x)
        _apply_whole(job, slot, u, x)


def _keep_state(slot: Slot, item: Item, job: Job) -> None:
    """Put what the rule left in an item into the state, in the dtype that the state has."""
    for name, value in item.s.items():
        old = slot.state.get(name)
        if old is value:
            continue
        if old is None or old.shape != value.shape or old.dtype == value.dtype:
            dtype = value.dtype if old is None or not old.is_floating_point() else old.dtype
            slot.state[name] = value.to(dtype)
        else:
            narrow_(old, value, rounding_keys(slot, job.random) if job.plan.stochastic else None, name)


def _apply_whole(job: Job, slot: Slot, u: Tensor, x: Context) -> None:
    target = sharding.local(slot.parameter).detach()
    u = sharding.part_of(u, slot.parameter)
    p = widen(target)
    factor = job.rule.shrink(job.numbers["lr"], job.options)
    if factor is not None:
        p.mul_(factor)
    apply_update(job.plan, p, u.view(p.shape) if u.shape != p.shape else u, job.numbers, x)
    if p is not target:
        narrow_(target, p, rounding_keys(slot, job.random) if job.plan.stochastic else None, "p")
