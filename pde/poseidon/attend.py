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
    inputs = (q_XNHE, k_XNHE, v_XNHE, scale_H1, bias_MHNN)
    if dropout == 0 and bias_MHNN.requires_grad and torch.is_grad_enabled() and runs_eagerly_on_cpu(q_XNHE):
        return _CosineAttention.apply(*inputs) if len(bias_MHNN) == 1 else _window_by_window(*inputs)
    q_XNHE, k_XNHE = q_XNHE * inverse_lengths(q_XNHE).mul(scale_H1), k_XNHE * inverse_lengths(k_XNHE)
    return _attend(q_XNHE, k_XNHE, v_XNHE, bias_MHNN, dropout)


def _window_by_window(q: Tensor, k: Tensor, v: Tensor, scale: Tensor, bias_MHNN: Tensor) -> Tensor:
    step = len(bias_MHNN)
    parts = [
        _CosineAttention.apply(q[m::step], k[m::step], v[m::step], scale, bias_HNN[None])
        for m, bias_HNN in enumerate(bias_MHNN)
    ]
    return torch.stack(parts, 1).flatten(0, 1)


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
        width = q.shape[-1]
        # An extra component carries what is added to every product: log_sum to q k^T, row to dO V^T.
        vectors = q.new_empty(4, *log_sum.shape, width + 1)
        for slot, t in zip(vectors[..., :-1].transpose(2, 3), (q, k, v, grad_out)):
            slot.copy_(t)
        extra = vectors[..., -1].fill_(1.0)
        torch.neg(log_sum, out=extra[0])
        torch.neg((grad_out * out).sum(-1).transpose(1, 2), out=extra[3])
        grads, dbias = _gradients(*vectors.flatten(1, 2), bias[0])
        grads_XHNE, qk_XHNE = grads.view(3, *log_sum.shape, width), vectors[:2, ..., :-1]
        along = (grads_XHNE[:2] * qk_XHNE).sum(-1, keepdim=True)
        scale = scale.unsqueeze(-1)
        dscale = along[0].div_(scale).sum((0, 2))
        along[0].div_(scale)
        grads_XHNE[:2].addcmul_(qk_XHNE, along, value=-1)
        # Three times as fast as the copy of a permuted view.
        dq, dk, dv = torch.stack(grads_XHNE.unbind(2), 3)
        return dq.mul_(rate_q), dk.mul_(rate_k), dv, dscale, dbias[None]


def _gradients(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, bias_HNN: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients (3, G, N, E) of q, k, v and (H, N, N) of the bias from extended vectors (G, N, E+1)."""
    heads = len(bias_HNN)
    windows = len(q) // heads
    step = min(windows, max(1, _CHUNK_ELEMENTS // bias_HNN.numel()))
    bias = bias_HNN.repeat(step, 1, 1) if step > 1 else bias_HNN
    grads = q.new_empty(3, *q.shape[:2], q.shape[2] - 1)
    p, ds = torch.empty_like(bias), torch.empty_like(bias)
    dbias = torch.zeros_like(bias) if windows > step else ds
    for start in range(0, len(q), len(bias)):
        at = slice(start, start + len(bias))
        (dq, dk, dv), q_, k_, grad_ = grads[:, at], q[at], k[at], grad[at]
        if len(q_) < len(bias):
            p, ds, bias = p[: len(q_)], ds[: len(q_)], bias[: len(q_)]
        torch.baddbmm(bias, q_, k_.mT, beta=_LOG2E, alpha=_LOG2E, out=p).exp2_()
        # Products with the N x N factor untransposed; turning their narrow results is a third of the price.
        dv.copy_(torch.bmm(grad_[..., :-1].mT, p).mT)
        torch.bmm(grad_, v[at].mT, out=ds).mul_(p)
        torch.bmm(ds, k_[..., :-1], out=dq)
        dk.copy_(torch.bmm(q_[..., :-1].mT, ds).mT)
        if windows > step:
            dbias[: len(q_)] += ds
    return grads, dbias.view(step, *bias_HNN.shape).sum(0) if step > 1 else dbias
