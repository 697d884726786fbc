"""Cosine attention with an additive bias that is trained (Swin v2, arXiv 2111.09883, Eq. 2).

Shapes: X windows (of all samples), N tokens, H heads, E head width, M windows of one grid if each has a bias
of its own, else 1, G = X*H. Queries, keys and values come as X N H E.

``scaled_dot_product_attention`` covers CUDA, compiled code and inference. On CPU it leaves its fused kernel
as soon as the bias needs a gradient and then stores several X x H x N x N arrays; :class:`_CosineAttention`
keeps the fused forward pass and recomputes the probabilities in the backward pass, a few windows at a time.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from thalweg.pde.poseidon.fused import runs_eagerly_on_cpu

_TINY = 1e-12
# exp2 takes a third of the time of exp and half that of softmax.
_LOG2E = math.log2(math.e)
# Probabilities recomputed at once: 0.8 MB of float32 stays in the cache of a core.
_CHUNK_ELEMENTS = 3 * 2**16


def cosine_attention(
    q_XNHE: Tensor, k_XNHE: Tensor, v_XNHE: Tensor, scale_H1: Tensor, bias_MHNN: Tensor, dropout: float = 0.0
) -> Tensor:
    """softmax(scale cos(q, k) + bias) v, shape (X, N, H, E)."""
    qkv = (q_XNHE, k_XNHE, v_XNHE)
    lean = dropout == 0 and bias_MHNN.requires_grad and torch.is_grad_enabled()
    if lean and runs_eagerly_on_cpu(q_XNHE):
        step = len(bias_MHNN)
        parts = (
            _CosineAttention.apply(*(t[m::step] for t in qkv), scale_H1, bias_MHNN[m, None])
            for m in range(step)
        )
        return torch.stack([*parts], 1).flatten(0, 1) if step > 1 else next(parts)
    q_XNHE, k_XNHE = q_XNHE * inverse_lengths(q_XNHE).mul(scale_H1), k_XNHE * inverse_lengths(k_XNHE)
    return _attend(q_XNHE, k_XNHE, v_XNHE, bias_MHNN, dropout)


def inverse_lengths(t_XNHE: Tensor) -> Tensor:
    """One over the Euclidean length (at least 1e-12) of every head's vector, shape (X, N, H, 1).

    The clamp sits below the root: tokens can be exactly zero (at initialisation and lead time 0, in padding),
    and there the root alone has an infinite slope.
    """
    return (t_XNHE * t_XNHE).sum(-1, keepdim=True).clamp_min(_TINY**2).rsqrt()


def _attend(q_XNHE: Tensor, k_XNHE: Tensor, v_XNHE: Tensor, bias_MHNN: Tensor, dropout: float) -> Tensor:
    num_windows, heads = bias_MHNN.shape[:2]
    q, k, v = (t.transpose(1, 2) for t in (q_XNHE, k_XNHE, v_XNHE))
    if num_windows > 1:
        # Windows become heads, so that the batch shares their biases without copying them.
        q, k, v = (t.reshape(-1, num_windows * heads, *t.shape[2:]) for t in (q, k, v))
        bias_MHNN = bias_MHNN.flatten(0, 1)[None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias_MHNN, dropout_p=dropout, scale=1.0)
    if num_windows > 1:
        out = out.reshape(-1, heads, *out.shape[2:])
    return out.transpose(1, 2)


class _CosineAttention(torch.autograd.Function):
    """First-order differentiable attention that stores nothing of size N x N per sample."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        rate_q, rate_k = inverse_lengths(q).mul_(scale), inverse_lengths(k)
        q, k = q * rate_q, k * rate_k
        # A bias that asks for gradients would rule out the fused kernel even here.
        out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *(t.transpose(1, 2) for t in (q, k, v)), attn_mask=bias.detach(), scale=1.0
        )
        out = out.transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, log_sum, rate_q, rate_k, scale, bias)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Gradients from recomputed probabilities P = exp(q k^T + bias - log_sum), where |q| = scale.

        dV = P^T dO,  dS = P (dO V^T - rowsum(dO O)),  dbias = dS,  dq = dS k,  dk = dS^T q.
        """
        q, k, v, out, log_sum, rate_q, rate_k, scale, bias = ctx.saved_tensors
        row = (grad_out * out).sum(-1, keepdim=True).neg_()
        one = torch.ones(1, 1, 1, 1, dtype=q.dtype).expand_as(row)
        # An extra component carries what is added to every product: log_sum to q k^T, row to dO V^T.
        q_, k_ = _by_head(q, log_sum.neg().transpose(1, 2).unsqueeze(-1)), _by_head(k, one)
        v_, grad_ = _by_head(v, one), _by_head(grad_out, row)
        dq, dk, dv, dbias = _gradients(q_, k_, v_, grad_, bias[0])
        q_, k_ = q_[..., :-1], k_[..., :-1]
        along_q, along_k = ((a * b).sum(-1, keepdim=True) for a, b in ((dq, q_), (dk, k_)))
        along_q = along_q.view(len(q), *scale.shape, -1).div_(scale.unsqueeze(-1))
        dscale = along_q.sum((0, 3))
        dq.addcmul_(q_, along_q.div_(scale.unsqueeze(-1)).view(len(q_), -1, 1), value=-1)
        dk.addcmul_(k_, along_k, value=-1)
        dq, dk, dv = (_by_token(t, q.shape[2]) for t in (dq, dk, dv))
        return dq.mul_(rate_q), dk.mul_(rate_k), dv, dscale, dbias[None]


def _by_head(t_XNHE: Tensor, last_XNH1: Tensor) -> Tensor:
    """Vectors with one more component, shape (G, N, E+1)."""
    return torch.cat((t_XNHE, last_XNH1), -1).transpose(1, 2).flatten(0, 1)


def _by_token(t_GNE: Tensor, heads: int) -> Tensor:
    """Shape (X, N, H, E); three times as fast as the copy of a permuted view."""
    return torch.stack(t_GNE.unflatten(0, (-1, heads)).unbind(1), 2)


def _gradients(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, bias_HNN: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v (G, N, E) and of the bias from extended vectors (G, N, E+1)."""
    heads = len(bias_HNN)
    windows = len(q) // heads
    step = min(windows, max(1, _CHUNK_ELEMENTS // bias_HNN.numel()))
    bias = bias_HNN.repeat(step, 1, 1) if step > 1 else bias_HNN
    dbias = torch.zeros_like(bias)
    dq, dk, dv = (torch.empty_like(t[..., :-1], memory_format=torch.contiguous_format) for t in (q, k, v))
    p, ds = torch.empty_like(bias), torch.empty_like(bias)
    for start in range(0, len(q), len(bias)):
        at = slice(start, start + len(bias))
        q_, k_, grad_ = q[at], k[at], grad[at]
        if len(q_) < len(bias):
            p, ds, bias = p[: len(q_)], ds[: len(q_)], bias[: len(q_)]
        torch.baddbmm(bias, q_, k_.mT, beta=_LOG2E, alpha=_LOG2E, out=p).exp2_()
        # Products with the N x N factor untransposed; turning their narrow results is a third of the price.
        dv[at] = torch.bmm(grad_[..., :-1].mT, p).mT
        torch.bmm(grad_, v[at].mT, out=ds).mul_(p)
        torch.bmm(ds, k_[..., :-1], out=dq[at])
        dk[at] = torch.bmm(q_[..., :-1].mT, ds).mT
        dbias[: len(q_)] += ds
    return dq, dk, dv, dbias.view(step, *bias_HNN.shape).sum(0) if step > 1 else dbias
