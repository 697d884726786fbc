"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from thalweg.core_optim.engine.options import (
    BETAS,
    FLAG,
    Option,
    at_least,
    choice,
    either,
    integer,
    more_than,
)
from thalweg.core_optim.engine.rule import LIKE, Item, MatrixRule, StateSpec
from thalweg.core_optim.linalg import eigenbasis
from thalweg.core_optim.linalg.batching import batches, gathered, write_back


class SOAP(MatrixRule):
    """SOAP; see the equations.

    Both moments live in the eigenbasis, so a step projects the gradient alone; a refresh takes the first
    moment to the new basis, from a copy in the parameter's own coordinates or, without that, through both
    bases. In one batch go parameters of the same shape and step. Of large outer products on a CPU only the
    part above the diagonal is current.
    """

    name = "soap"
    title = "SOAP"
    summary = "Adam in the eigenbasis of the averages of G Gᵀ and Gᵀ G, which is refreshed now and then"
    source = "Vyas et al. 2024, arXiv:2409.11321; code nikhilvyas/SOAP"
    equations = """first call, no update: GGk = (1 - bs) Gk Gkᵀ for unfoldings Gk, Qk = eigenvectors of GGk
call n + 1:  g' = g in the bases Qk;  m <- b1 m + (1 - b1) g';  v <- b2 v + (1 - b2) g'^2
    u = m / (sqrt(v) + eps), back from the bases  (normalize_grads: u / rms(u))
    p <- p - lr sqrt(1 - b2^n) / (1 - b1^n) u;  p <- p (1 - lr wd)
    GGk <- bs GGk + (1 - bs) Gk Gkᵀ              (bs = shampoo_beta, or b2 where that is negative)
    every precondition_frequency updates: sort Qk and v by diag(Qkᵀ GGk Qk);  Qk <- qr(GGk Qk);
    m to the new bases"""
    state_size = "3 + 2 sum d^2 / prod d (2 + ... without keep_momentum)"
    decay = "after"
    options: ClassVar[Mapping[str, Option]] = {
        "lr": Option(3e-3, at_least(0.0), "learning rate"),
        "betas": Option((0.95, 0.95), BETAS, "decay rates of the moments"),
        "shampoo_beta": Option(
            -1.0,
            either(choice(-1, -1.0), at_least(0.0, 1.0)),
            "decay rate of the outer products; -1 for beta2",
        ),
        "eps": Option(1e-8, more_than(0.0), "term added to the root of the second moment"),
        "weight_decay": Option(0.01, at_least(0.0), "weight decay"),
        "precondition_frequency": Option(10, integer(1), "updates between two refreshes of the bases"),
        "max_precond_dim": Option(10000, integer(0), "larger dimensions keep the identity for a basis"),
        "merge_dims": Option(False, FLAG, "merge neighbouring dimensions up to max_precond_dim"),
        "precondition_1d": Option(False, FLAG, "give vectors a basis too"),
        "normalize_grads": Option(False, FLAG, "scale each update to a root mean square of 1"),
        "correct_bias": Option(True, FLAG, "correct the moments for their start at 0"),
        "keep_momentum": Option(
            True, FLAG, "keep the momentum in the parameter's coordinates too, which makes a refresh cheaper"
        ),
        "stagger": Option(
            False,
            FLAG,
            "refresh parameter i one update after parameter i - 1, which levels the time of steps",
        ),
    }

    def states(self, shape: torch.Size, o: Mapping[str, Any]) -> dict[str, StateSpec]:
        """Moments in the eigenbasis, and outer products and basis of each mode, never in half precision."""
        dtype = None if o["state_dtype"] is None else torch.float32
        square = {
            f"{kind}_{mode}": StateSpec((size, size), dtype)
            for mode, size in enumerate(self._modes(shape, o))
            for kind in ("outer", "basis")
            if size <= _limit(shape, o)
        }
        own = {"exp_avg_own": LIKE} if o["keep_momentum"] else {}
        return {"exp_avg": LIKE, "exp_avg_sq": LIKE, **own, **square}

    def _modes(self, shape: torch.Size, o: Mapping[str, Any]) -> tuple[int, ...]:
        if o["merge_dims"] and len(shape) > 1:
            return eigenbasis.merged_shape(shape, o["max_precond_dim"])
        return tuple(shape)

    def update(self, items: list[Item], h: Mapping[str, Any], o: Mapping[str, Any]) -> list[Tensor | None]:
        """Directions; None at a parameter's first step."""
        directions: list[Tensor | None] = [None] * len(items)
        keys = [(i.p.shape, i.t, i.index % o["precondition_frequency"] if o["stagger"] else 0) for i in items]
        for numbers in batches([item.g for item in items], keys):
            members = [items[number] for number in numbers]
            u = self._batch(members, h, o)
            for k, number in enumerate(numbers):
                directions[number] = None if u is None else u[k].reshape(items[number].p.shape)
        return directions

    def _batch(self, items: list[Item], h: Mapping[str, Any], o: Mapping[str, Any]) -> Tensor | None:
        first = items[0]
        sizes = self._modes(first.p.shape, o)
        names = [str(mode) if size <= _limit(first.p.shape, o) else None for mode, size in enumerate(sizes)]
        g = gathered([item.g for item in items]).reshape(len(items), *sizes)
        s = {name: gathered([item.s[name] for item in items]) for name in first.s}
        averages = [None if name is None else s[f"outer_{name}"] for name in names]
        bases = [None if name is None else s[f"basis_{name}"].to(g.dtype) for name in names]
        beta = h["beta2"] if o["shampoo_beta"] < 0 else float(o["shampoo_beta"])
        u = None
        if first.t > 1:
            u = self._direction(g, bases, s, first.t - 1, h, o)
        for mode, average in enumerate(averages):
            if average is not None:
                eigenbasis.average_outer_(average, g.to(average.dtype), mode, 1.0 - beta)
        if first.t == 1:
            for name, average in zip(names, averages):
                if average is not None:
                    s[f"basis_{name}"].copy_(eigenbasis.eigenbasis(average))
        elif (first.t - 1 + (first.index if o["stagger"] else 0)) % o["precondition_frequency"] == 0:
            self._refresh(s, names, averages, bases, g)
        write_back([item.s for item in items], s)
        return u

    def _direction(
        self,
        g: Tensor,
        bases: eigenbasis.Bases,
        s: dict[str, Tensor],
        n: int,
        h: Mapping[str, Any],
        o: Mapping[str, Any],
    ) -> Tensor:
        """Update of Adam in the bases, with the step size's correction for bias."""
        if o["keep_momentum"]:
            own = s["exp_avg_own"].view(g.shape)
            own.lerp_(g.to(own.dtype), 1.0 - h["beta1"])
        g = eigenbasis.project(g, bases)
        m, v = s["exp_avg"].view(g.shape), s["exp_avg_sq"].view(g.shape)
        m.lerp_(g.to(m.dtype), 1.0 - h["beta1"])
        v.mul_(h["beta2"]).addcmul_(g, g, value=1.0 - h["beta2"])
        u = v.sqrt().add_(h["eps"])
        u = eigenbasis.project_back(torch.div(m, u, out=u), bases)
        scale = 1.0
        if o["correct_bias"]:
            scale = math.sqrt(1.0 - h["beta2"] ** n) / (1.0 - h["beta1"] ** n)
        if o["normalize_grads"]:
            dims = tuple(range(1, u.ndim))
            return u * (scale / (u.square().mean(dims, keepdim=True).sqrt() + 1e-30))
        return u.mul_(scale)

    def _refresh(
        self,
        s: dict[str, Tensor],
        names: list[str | None],
        averages: list[Tensor | None],
        old: list[Tensor | None],
        g: Tensor,
    ) -> None:
        """One step of power iteration on each basis; both moments follow."""
        m, v = s["exp_avg"].view(g.shape), s["exp_avg_sq"].view(g.shape)
        new: list[Tensor | None] = []
        sorted_v = v
        for mode, (name, average) in enumerate(zip(names, averages)):
            if average is None:
                new.append(None)
                continue
            key = f"basis_{name}"
            s[key], order = eigenbasis.refresh_basis(average, s[key])
            sorted_v = eigenbasis.permute_mode(sorted_v, order, mode)
            new.append(s[key].to(g.dtype))
        v.copy_(sorted_v)
        if "exp_avg_own" in s:
            m.copy_(eigenbasis.project(s["exp_avg_own"].view(g.shape).to(g.dtype), new))
        else:
            m.copy_(eigenbasis.change_bases(m.to(g.dtype), old, new))


def _limit(shape: torch.Size, o: Mapping[str, Any]) -> int:
    """Largest size of a mode that gets a basis."""
    if len(shape) == 1 and not o["precondition_1d"]:
        return 0
    return o["max_precond_dim"]
