"""Cosine attention with an additive bias that is trained (Swin v2, arXiv 2111.09883, Eq. 2).

Shapes: X windows (of all samples), N tokens, H heads, E head width, M windows of one grid if each has a bias
of its own, else 1. Queries, keys and values come as X N H E.

``scaled_dot_product_attention`` covers CUDA, compiled code and inference. On CPU it leaves its fused kernel
as soon as the bias needs a gradient and then stores several X x H x N x N arrays; :class:`_CosineAttention`
keeps the fused forward pass and recomputes the probabilities in the backward pass, one window at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from thalweg.pde.poseidon.fused import runs_eagerly_on_cpu

_TINY = 1e-12


def cosine_attention(
    q_XNHE: Tensor, k_XNHE: Tensor, v_XNHE: Tensor, scale_H1: Tensor, bias_MHNN: Tensor, dropout: float = 0.0
) -> Tensor:
    """softmax(scale cos(q, k) + bias) v, shape (X, N, H, E)."""
    inputs = (q_XNHE, k_XNHE, v_XNHE, scale_H1, bias_MHNN)
    if dropout == 0 and bias_MHNN.requires_grad and torch.is_grad_enabled() and runs_eagerly_on_cpu(q_XNHE):
        return _CosineAttention.apply(*inputs)
    q_XNHE, k_XNHE = q_XNHE * (scale_H1 / lengths(q_XNHE)), k_XNHE / lengths(k_XNHE)
    return _attend(q_XNHE, k_XNHE, v_XNHE, bias_MHNN, dropout)


def lengths(t_XNHE: Tensor) -> Tensor:
    """Euclidean length of every head's vector, at least 1e-12, shape (X, N, H, 1).

    The clamp sits below the root: tokens can be exactly zero (at initialisation and lead time 0, in padding),
    and there the root alone has an infinite slope.
    """
    return t_XNHE.square().sum(-1, keepdim=True).clamp_min(_TINY**2).sqrt()


def _attend(
    q_XNHE: Tensor, k_XNHE: Tensor, v_XNHE: Tensor, bias_MHNN: Tensor, dropout: float = 0.0
) -> Tensor:
    num_windows, heads = bias_MHNN.shape[:2]
    q, k, v = (t.transpose(1, 2) for t in (q_XNHE, k_XNHE, v_XNHE))
    if num_windows > 1 and dropout == 0 and not torch.is_grad_enabled() and runs_eagerly_on_cpu(q):
        # Window by window, the strided views need no copies.
        out_XNHE = torch.empty(v_XNHE.shape, dtype=v.dtype)
        for m in range(num_windows):
            at = slice(m, None, num_windows)
            out = F.scaled_dot_product_attention(q[at], k[at], v[at], bias_MHNN[m, None], scale=1.0)
            out_XNHE[at] = out.transpose(1, 2)
        return out_XNHE
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
        length_q, length_k = lengths(q), lengths(k)
        unit_q, unit_k = q / length_q, k / length_k
        # A bias that asks for gradients would rule out the fused kernel even here.
        out = _attend(unit_q * scale, unit_k, v, bias.detach())
        ctx.save_for_backward(unit_q, unit_k, v, out, length_q, length_k, scale, bias)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Gradients from recomputed probabilities P = softmax(scale q k^T + bias) of unit vectors q, k.

        dV = P^T dO,  dS = P (dO V^T - rowsum(dO O)),  dbias = dS,  dq = scale dS k,  dk = scale dS^T q.
        """
        unit_q, unit_k, v, out, length_q, length_k, scale, bias = ctx.saved_tensors
        q, k, v_, do = ((t.transpose(1, 2)) for t in (unit_q * scale, unit_k, v, grad_out))
        row = (grad_out * out).sum(-1).transpose(1, 2).unsqueeze(-1)
        dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype) for t in (unit_q, unit_k, v))
        dbias = torch.zeros_like(bias)
        p, ds = (torch.empty_like(bias[0]) for _ in range(2))
        for x in range(len(q)):
            m = x % len(bias)
            torch.baddbmm(bias[m], q[x], k[x].mT, out=p)
            torch.softmax(p, -1, out=p)
            torch.bmm(do[x], v_[x].mT, out=ds)
            ds.sub_(row[x]).mul_(p)
            dbias[m] += ds
            # Products with the short side first: twice as fast as transposing the N x N factor.
            dv[x] = torch.bmm(do[x].mT, p).permute(2, 0, 1)
            dk[x] = torch.bmm(q[x].mT, ds).permute(2, 0, 1)
            torch.bmm(ds, k[x], out=dq[x].transpose(0, 1))
        dscale = (dq * unit_q).sum(-1, keepdim=True)
        dq, dk = _through_unit(dq * scale, unit_q, length_q), _through_unit(dk, unit_k, length_k)
        return dq, dk, dv, dscale.sum((0, 1)), dbias


def _through_unit(grad: Tensor, unit: Tensor, length: Tensor) -> Tensor:
    """Gradient of t / |t| with respect to t: the part of grad orthogonal to the unit vector, over |t|."""
    along = (grad * unit).sum(-1, keepdim=True)
    return torch.addcmul(grad, unit, along, value=-1).div_(length)
