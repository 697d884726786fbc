"""FRUGAL: AdamW on a changing part of the gradient, sign descent without state on the rest."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from thalweg.core_optim.engine.options import FLAG, Option, at_least, choice, integer, share
from thalweg.core_optim.engine.rule import LIKE, Item, MatrixRule, StateSpec, adam_options
from thalweg.core_optim.linalg import projectors

SPLITS = ("blocks", "coord", "svd", "random")
INACTIVE = ("sign_sgd", "sgd", "none")


class FRUGAL(MatrixRule):
    """FRUGAL; see the equations.

    What is projected is decided by each parameter's own step, so one without gradients stops no other. The
    order of whole-tensor blocks is that of the parameters of a group that have a gradient. Keys are tensors
    in the state, and random ones come from (seed, step, parameter). The state of ``split: blocks`` changes
    its size with the turns, so torch.distributed.checkpoint cannot load it from files into a fresh optimizer;
    a full state dict in one file is no trouble.
    """

    outside: ClassVar[Mapping[str, Any]] = {"proj": False}
    name = "frugal"
    title = "FRUGAL"
    summary = "AdamW on a subspace that changes every few hundred steps, sign descent on the rest"
    source = "Zmushko et al. 2024, arXiv:2411.07837; code fzmushko/FRUGAL"
    equations = """every update_gap steps: choose a projection P with P P^T = I, and set m = v = 0, k = 0
    (blocks: whole tensors; coord: columns, rows or entries; svd, random: a subspace)
k <- k + 1;  a = P g;  m <- beta1 m + (1 - beta1) a;  v <- beta2 v + (1 - beta2) a^2
u = P^T [m / (1 - beta1^k)] / [sqrt(v / (1 - beta2^k)) + eps];  r = g - P^T P g
p <- p (1 - lr weight_decay) - lr proj_lr_scale (u + inactive_lr_scale sign(r))
without projection (proj: false): AdamW"""
    state_size = "2 rho (2 without projection)"
    decay = "decoupled"
    options: ClassVar[Mapping[str, Option]] = {
        **adam_options(weight_decay=0.01),
        "proj": Option(True, FLAG, "split the gradients of this group; false: AdamW"),
        "rho": Option(0.25, share(open_above=False), "share of tensors, coordinates or ranks with state"),
        "update_gap": Option(200, integer(1), "steps between two choices of the projection"),
        "split": Option("blocks", choice(*SPLITS), "what is projected on"),
        "block_order": Option("random", choice(*projectors.BLOCK_ORDERS), "order in which blocks take turns"),
        "coord_choice": Option("columns", choice(*projectors.COORDINATES), "coordinates of split: coord"),
        "reset_statistics": Option(True, FLAG, "forget moments when the projection changes"),
        "inactive_update_rule": Option("sign_sgd", choice(*INACTIVE), "what is done with the rest"),
        "inactive_lr_scale": Option(1.0, at_least(0.0), "factor on the learning rate of the rest"),
        "proj_lr_scale": Option(1.0, at_least(0.0), "factor on the learning rate of split gradients"),
    }

    def refuse(self, parameter: Tensor, o: Mapping[str, Any]) -> str | None:
        """Subspaces are of matrices."""
        if o["proj"] and o["split"] in ("svd", "random") and parameter.ndim != 2:
            return f"split: {o['split']} needs a matrix; use blocks or coord, or proj: false"
        return None

    def states(self, shape: torch.Size, o: Mapping[str, Any]) -> dict[str, StateSpec]:
        """Moments of the projected part, a count of their steps and the key of the projection.

        Whole tensors start without moments; those whose turn it is get some.
        """
        count = StateSpec((), torch.int64)
        if not o["proj"]:
            return {"exp_avg": LIKE, "exp_avg_sq": LIKE, "count": count}
        if o["split"] == "blocks":
            empty = StateSpec((0,))
            return {"exp_avg": empty, "exp_avg_sq": empty, "count": count}
        if o["split"] == "coord":
            way = o["coord_choice"]
            number = projectors.coordinate_count(shape, way, o["rho"])
            low = projectors.projected_shape(shape, way, number)
            key = StateSpec((number,), torch.int64)
        else:
            rank = projectors.subspace_rank(shape, o["rho"])
            low = projectors.projected_shape(shape, projectors.subspace_side(shape), rank)
            # a basis in low precision would not be orthonormal
            key = StateSpec((min(shape), rank), torch.float32 if o["state_dtype"] else None)
        return {"exp_avg": StateSpec(low), "exp_avg_sq": StateSpec(low), "count": count, "key": key}

    def state_elements(
        self, shapes: Sequence[torch.Size], o: Mapping[str, Any]
    ) -> list[dict[str, StateSpec]]:
        """Whole tensors: the moments of those whose turn comes first, in random order the largest number."""
        specs = [self.states(shape, o) for shape in shapes]
        if o["proj"] and o["split"] == "blocks":
            order = () if o["block_order"] != "random" else range(len(shapes))
            for i in projectors.active_blocks(len(shapes), o["rho"], 0, o["block_order"], list(order)):
                specs[i] |= {"exp_avg": LIKE, "exp_avg_sq": LIKE}
        return specs

    def update(self, items: list[Item], h: Mapping[str, Any], o: Mapping[str, Any]) -> list[Tensor | None]:
        """Adam's direction on the projected part plus the sign of the rest."""
        if not o["proj"]:
            return [_adam(item, item.g, h) for item in items]
        blocks = o["split"] == "blocks"
        if blocks:
            _choose_blocks(items, o)
        return [(_block_direction if blocks else _split_direction)(item, h, o) for item in items]


def _refreshes(item: Item, o: Mapping[str, Any]) -> bool:
    return (item.t - 1) % o["update_gap"] == 0


def _choose_blocks(items: list[Item], o: Mapping[str, Any]) -> None:
    """Give moments to the whole tensors whose turn it is and take them from the others."""
    chosen: dict[int, set[int]] = {}
    for position, item in enumerate(items):
        if not _refreshes(item, o):
            continue
        turn = (item.t - 1) // o["update_gap"]
        if turn not in chosen:
            draw = items[0].random.permutation(len(items), step=item.t, index=items[0].index)
            order = draw.tolist() if o["block_order"] == "random" else ()
            chosen[turn] = projectors.active_blocks(len(items), o["rho"], turn, o["block_order"], order)
        active = position in chosen[turn]
        if active and not o["reset_statistics"] and item.s["exp_avg"].shape == item.g.shape:
            continue
        for name in ("exp_avg", "exp_avg_sq"):
            item.s[name] = torch.zeros_like(item.g) if active else item.g.new_zeros(0)
        item.s["count"].zero_()


def _block_direction(item: Item, h: Mapping[str, Any], o: Mapping[str, Any]) -> Tensor:
    if item.s["exp_avg"].shape == item.g.shape:
        return h["proj_lr_scale"] * _adam(item, item.g, h)
    return _rest(item.g, h, o)


def _split_direction(item: Item, h: Mapping[str, Any], o: Mapping[str, Any]) -> Tensor:
    shape = item.g.shape
    subspace = o["split"] in ("svd", "random")
    way = projectors.subspace_side(shape) if subspace else o["coord_choice"]
    if _refreshes(item, o):
        _choose_key(item, way, o)
    key = item.s["key"]
    u = projectors.embed(_adam(item, projectors.project(item.g, way, key), h), way, key, shape)
    if subspace and key.shape[1] == min(shape):
        # nothing is left of a full basis but rounding, which has a sign too
        return h["proj_lr_scale"] * u
    return h["proj_lr_scale"] * u + _rest(projectors.residual(item.g, way, key), h, o)


def _choose_key(item: Item, way: str, o: Mapping[str, Any]) -> None:
    key, shape = item.s["key"], item.g.shape
    if o["split"] == "coord":
        total = projectors.coordinate_total(shape, way)
        draw = item.random.permutation(total, step=item.t, index=item.index)
        item.s["key"] = draw[: len(key)].to(key.device)
    elif o["split"] == "svd":
        item.s["key"] = projectors.svd_basis(item.g, key.shape[1]).to(key.dtype)
    else:
        draw = item.random.normal(key.shape, step=item.t, index=item.index, like=item.g)
        item.s["key"] = projectors.orthonormal(draw).to(key.dtype)
    if o["reset_statistics"] or item.t == 1:
        for name in ("exp_avg", "exp_avg_sq", "count"):
            item.s[name].zero_()


def _rest(r: Tensor, h: Mapping[str, Any], o: Mapping[str, Any]) -> Tensor:
    if o["inactive_update_rule"] == "none":
        return torch.zeros_like(r)
    direction = r.sign() if o["inactive_update_rule"] == "sign_sgd" else r
    return direction * (h["proj_lr_scale"] * h["inactive_lr_scale"])


def _adam(item: Item, g: Tensor, h: Mapping[str, Any]) -> Tensor:
    """Adam's direction of a (projected) gradient; bias corrections follow the count of the moments."""
    m, v, count = item.s["exp_avg"], item.s["exp_avg_sq"], item.s["count"]
    count += 1
    m.lerp_(g.to(m.dtype), 1.0 - h["beta1"])
    v.mul_(h["beta2"]).addcmul_(g.to(v.dtype), g.to(v.dtype), value=1.0 - h["beta2"])
    # 1 - beta^k without a wait for the device, and without cancellation in fp32
    k = count.to(m.dtype)
    bias1, bias2 = (-torch.expm1(k * math.log(max(h[beta], 1e-300))) for beta in ("beta1", "beta2"))
    return (m / bias1) / ((v / bias2).sqrt() + h["eps"])
