"""Softmax attention with an additive bias that is trained.

Shapes: B batch (and windows of one grid, where all share a bias), H heads, N tokens, E head width.

``scaled_dot_product_attention`` covers CUDA, compiled code and inference. On CPU it leaves its fused kernel
as soon as the bias needs a gradient and then stores several B x H x N x N arrays; :class:`_BiasedAttention`
keeps the fused forward pass and recomputes the probabilities in the backward pass, one cache-sized piece at a
time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Probabilities held at once in the backward pass; 3 MB of float32 stays in the cache of a core.
_CHUNK_ELEMENTS = 3 * 2**18


def attend(q_BHNE: Tensor, k_BHNE: Tensor, v_BHNE: Tensor, bias_HNN: Tensor, dropout: float = 0.0) -> Tensor:
    """softmax(q k^T + bias) v, shape (B, H, N, E). The scale is already part of q."""
    if _recompute_pays(q_BHNE, bias_HNN, dropout):
        return _BiasedAttention.apply(q_BHNE, k_BHNE, v_BHNE, bias_HNN)
    return F.scaled_dot_product_attention(
        q_BHNE, k_BHNE, v_BHNE, attn_mask=bias_HNN[None], dropout_p=dropout, scale=1.0
    )


def _recompute_pays(q: Tensor, bias: Tensor, dropout: float) -> bool:
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not bias.requires_grad or dropout > 0:
        return False
    return q.device.type == "cpu" and not torch._C._are_functorch_transforms_active()


class _BiasedAttention(torch.autograd.Function):
    """First-order differentiable attention; needs memory for q, k, v and the output only."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        # A bias that asks for gradients would rule out the fused kernel even here.
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.detach()[None], scale=1.0)
        ctx.save_for_backward(q, k, v, bias, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """With P = softmax(S):  dV = P^T dO,  dS = P (dO V^T - rowsum(dO O)),  dQ = dS K,  dK = dS^T Q."""
        q, k, v, bias, out = ctx.saved_tensors
        (batch, heads, tokens, _), piece = q.shape, _CHUNK_ELEMENTS // q.shape[2] ** 2
        step_H = max(1, min(heads, piece))
        step_B = max(1, min(batch, piece // step_H))
        dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype) for t in (q, k, v))
        dbias = torch.zeros_like(bias)
        for h in range(0, heads, step_H):
            for b in range(0, batch, step_B):
                at = (slice(b, b + step_B), slice(h, h + step_H))
                q_, k_, v_, o_, do = (t[at].reshape(-1, *t.shape[2:]) for t in (q, k, v, out, grad_out))
                shape = (-1, min(step_H, heads - h), tokens, tokens)
                p = torch.bmm(q_, k_.mT)
                p.view(shape).add_(bias[h : h + step_H])
                torch.softmax(p, -1, out=p)
                ds = torch.bmm(do, v_.mT)
                ds.sub_((do * o_).sum(-1, keepdim=True)).mul_(p)
                dv[at] = torch.bmm(p.mT, do).view(dv[at].shape)
                dq[at] = torch.bmm(ds, k_).view(dq[at].shape)
                dk[at] = torch.bmm(ds.mT, q_).view(dk[at].shape)
                dbias[h : h + step_H] += ds.view(shape).sum(0)
        return dq, dk, dv, dbias
