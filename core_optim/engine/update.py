"""The part of a step that all rules share: widen, decay, cautious mask, subtract, round.

Everything works on a tensor or on a list of tensors (see ``tensors``), and compiles.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thalweg.core_optim.engine.ops import axpy, axpy_, each, where
from thalweg.core_optim.engine.reduce import Context
from thalweg.core_optim.engine.rounding import stochastic_round
from thalweg.core_optim.engine.rule import Decay, ElementRule
from thalweg.core_optim.engine.tensors import Tensors

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Plan:
    """What is fixed about an update, apart from tensors and numbers; the key of its compiled form."""

    decay: Decay | None
    cautious: bool
    maximize: bool
    stochastic: bool


def element_step(
    rule: ElementRule,
    plan: Plan,
    p: Tensor,
    g: Tensor,
    s: Mapping[str, Tensor],
    h: Mapping[str, Any],
    x: Context,
    keys: Any,
) -> None:
    """One step of an element rule on views of parameters, gradients and states, in place.

    Args:
        rule: The algorithm.
        plan: What is fixed.
        p: Parameter; half precision is widened for the step.
        g: Gradient.
        s: States.
        h: Numbers of the rule, ``lr``, ``weight_decay`` and ``lr_peak``.
        x: Context of the rule.
        keys: For stochastic rounding, by name of a state or ``p``, a key and the numbers of the elements; for
            lists of tensors, a list of such tables.
    """
    p_wide, g = widen(p), widen(g)
    s_wide = {name: widen(value) for name, value in s.items()}
    g = prepare_gradient(plan, p_wide, g, h)
    u = rule.update(p_wide, g, s_wide, h, x)
    if u is not None:
        u, ratio = u if isinstance(u, tuple) else (u, None)
        if plan.cautious:
            u = caution(u, g, x)
        apply_update(plan, p_wide, u, h, x, ratio)
    for name, value in s.items():
        if s_wide[name] is not value:
            narrow_(value, s_wide[name], keys, name)
    if p_wide is not p:
        narrow_(p, p_wide, keys, "p")


def prepare_gradient(plan: Plan, p: Tensor, g: Tensor, h: Mapping[str, Any]) -> Tensor:
    """Gradient of what is minimised, with coupled decay added."""
    if plan.maximize:
        g = -g
    if plan.decay == "coupled" and _present(h["weight_decay"]):
        g = axpy(g, p, h["weight_decay"])
    return g


def caution(u: Tensor, g: Tensor, x: Context) -> Tensor:
    """Update with the entries set to 0 that the gradient opposes, rescaled (Liang et al. 2024, alg. 1).

    The rest is divided by the share of entries that stay, or by 1e-3 if fewer do.
    """
    mask = each(lambda a: (a > 0).to(a.dtype), x.agreement(u, g))
    share = x.mean(mask)
    if isinstance(share, Tensors):
        return u * mask / share.each(lambda t: t.clamp(min=1e-3))
    return u * mask / share.clamp(min=1e-3)


def apply_update(
    plan: Plan, p: Tensor, u: Tensor, h: Mapping[str, Any], x: Context, ratio: Any = None
) -> None:
    """Decay and p <- p - lr step_scale u, in place; ``ratio`` scales the decay of each parameter."""
    lr, decay = h["lr"], h["weight_decay"]
    if plan.decay is not None and plan.decay != "coupled" and _present(decay):
        if plan.decay == "cautious":
            axpy_(p, where(each(lambda a: a > 0, x.agreement(u, p)), p, 0.0), -lr * decay)
        elif plan.decay != "after":
            # a rate of 0 is a step that must change nothing, such as the one by which torch makes all states
            rate = decay * (lr != 0.0) if plan.decay == "independent" else lr * decay
            if plan.decay == "corrected":
                rate = rate * (lr / h["lr_peak"])
            p.mul_(1.0 - rate if ratio is None else (ratio * -rate) + 1.0)
    axpy_(p, u, -lr * h.get("step_scale", 1.0))
    if plan.decay == "after" and _present(decay):
        p.mul_(1.0 - lr * decay)


def _present(number: Any) -> bool:
    """Whether a number may differ from 0; of a 0-d tensor nobody asks."""
    return isinstance(number, Tensor) or number != 0.0


def widen(x: Tensor) -> Tensor:
    """Half precision to fp32; anything else as it is."""
    if isinstance(x, Tensors):
        return Tensors([widen(t) for t in x]) if x.items[0].dtype in HALF else x
    return x.float() if x.dtype in HALF else x


def narrow_(target: Tensor, value: Tensor, keys: Any, name: str) -> None:
    """Write fp32 numbers into half precision, in place; stochastically where keys are given."""
    if isinstance(target, Tensors):
        for i, (t, v) in enumerate(zip(target, value)):
            narrow_(t, v, None if keys is None else keys[i], name)
    elif keys is None or target.dtype != torch.bfloat16:
        target.copy_(value)
    else:
        target.copy_(stochastic_round(value, *keys[name]))


@functools.lru_cache(maxsize=256)
def compiled(
    rule: ElementRule,
    plan: Plan,
    variant: str,
    fixed: tuple[tuple[str, Any], ...],
    moduli: bool,
    names: tuple[str, ...],
) -> Callable[..., None]:
    """The step as one compiled graph for parameters of every size.

    Args:
        rule: The algorithm.
        plan: What is fixed about the update.
        variant: Case of the rule.
        fixed: Options that are not numbers; numbers arrive as 0-d tensors.
        moduli: Whether second moments are those of complex moduli.
        names: Of the numbers, which on a CPU arrive in one tensor: every argument of a call costs time.
    """
    x = Context(dict(fixed), variant, moduli=moduli)

    def kernel(
        p: Tensor,
        g: Tensor,
        s: dict[str, Tensor],
        h: dict[str, Tensor] | Tensor,
        keys: Mapping[str, Any] | None,
    ) -> None:
        if isinstance(h, Tensor):
            h = dict(zip(names, h.unbind()))
        element_step(rule, plan, p, g, s, h, x, keys)

    # the compiler counts the graphs of a code object, and every case of every rule has one of its own
    code = kernel.__code__.replace(co_name=f"{rule.name}_step")
    own = types.FunctionType(code, globals(), code.co_name, None, kernel.__closure__)
    return torch.compile(own, dynamic=True, fullgraph=True)
