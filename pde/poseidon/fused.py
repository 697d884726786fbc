"""Leaner eager code for CPU: the same mathematics in fewer passes over memory.

Nothing here has parameters or changes results beyond rounding. Compiled code, other devices and functional
transforms take the plain formulas, which compilers fuse themselves.

Shapes: B batch, R/S token rows and columns, D width, T = B*R*S tokens, F hidden width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Hidden activations handled at once: 0.8 MB of float32 stays in the cache of a core.
_CHUNK_ELEMENTS = 3 * 2**16


def runs_eagerly_on_cpu(x: Tensor) -> bool:
    """True outside compilation, autocast and functional transforms, for tensors on CPU."""
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return False
    return not torch.is_autocast_enabled("cpu") and not torch._C._are_functorch_transforms_active()


def is_plain_linear(module: nn.Module) -> bool:
    """True for a linear layer whose call does nothing but apply its weight and bias."""
    return type(module) is nn.Linear and not module._forward_hooks and not module._forward_pre_hooks


def modulated_norm(y_BRSD: Tensor, gain: Tensor, shift: Tensor, eps: float) -> Tensor:
    """Layer norm with given modulation: shift + gain (y - mean(y)) / sqrt(var(y) + eps), moments over D.

    Gain and shift have shape (B or 1, 1, 1, D).
    """
    if not runs_eagerly_on_cpu(y_BRSD):
        return torch.addcmul(shift, F.layer_norm(y_BRSD, y_BRSD.shape[-1:], eps=eps), gain)
    if torch.is_grad_enabled():
        return _ModulatedNorm.apply(y_BRSD, gain, shift, eps)
    return torch.addcmul(shift, _normalise(y_BRSD, eps)[0], gain)


def _normalise(y: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Tokens of mean 0 and variance 1, and the inverse standard deviations (B, R, S, 1)."""
    normal = y - _row_means(y)
    inverse_std = (_row_means(normal.square()) + eps).rsqrt_()
    return normal.mul_(inverse_std), inverse_std


def _row_means(x: Tensor) -> Tensor:
    """Mean over the last dimension as a matrix-vector product, several times faster than a reduction."""
    width = x.shape[-1]
    weights = torch.full((width,), 1 / width, dtype=x.dtype)
    return torch.mv(x.reshape(-1, width), weights).view(*x.shape[:-1], 1)


class _ModulatedNorm(torch.autograd.Function):
    """Keeps the normalised tokens and nothing else of their size."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, gain: Tensor, shift: Tensor, eps: float) -> Tensor:
        normal, inverse_std = _normalise(y, eps)
        ctx.save_for_backward(normal, inverse_std, gain)
        return torch.addcmul(shift, normal, gain)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """With g = gain grad:  dy = (g - mean(g) - normal mean(g normal)) / std."""
        normal, inverse_std, gain = ctx.saved_tensors
        product = grad * normal
        dgain, dshift = product.sum((1, 2), keepdim=True), grad.sum((1, 2), keepdim=True)
        if len(gain) == 1:
            dgain, dshift = dgain.sum(0, keepdim=True), dshift.sum(0, keepdim=True)
        dy = grad * gain
        slope = _row_means(product.mul_(gain))
        dy.sub_(_row_means(dy)).addcmul_(normal, slope, value=-1).mul_(inverse_std)
        return dy, dgain, dshift, None


def gelu_mlp(x: Tensor, weight_FD: Tensor, bias_F: Tensor, weight_DF: Tensor, bias_D: Tensor) -> Tensor:
    """linear(gelu(linear(x))) with the exact gelu."""
    parameters = (weight_FD, bias_F, weight_DF, bias_D)
    if not runs_eagerly_on_cpu(x):
        return F.linear(F.gelu(F.linear(x, weight_FD, bias_F)), weight_DF, bias_D)
    x_TD = x.reshape(-1, x.shape[-1])
    if torch.is_grad_enabled():
        return _GeluMLP.apply(x_TD, *parameters).view(x.shape)
    step = _pieces(len(x_TD), len(weight_FD))[0].stop
    scratch_TF = torch.empty(min(step, len(x_TD)), len(weight_FD), dtype=x.dtype)
    return _gelu_mlp_by_pieces(x_TD, *parameters, scratch_TF).view(x.shape)


def _gelu_mlp_by_pieces(
    x_TD: Tensor, w_FD: Tensor, b_F: Tensor, w_DF: Tensor, b_D: Tensor, hidden_TF: Tensor
) -> Tensor:
    """The MLP; pre-activations stay in ``hidden_TF`` if it has a row for every token, else it is scratch."""
    out_TD = torch.empty(len(x_TD), len(w_DF), dtype=x_TD.dtype)
    active_TF: Tensor | None = None
    for piece in _pieces(len(x_TD), len(w_FD)):
        x_, out_ = x_TD[piece], out_TD[piece]
        hidden = hidden_TF[piece] if len(hidden_TF) == len(x_TD) else hidden_TF[: len(x_)]
        active_TF = torch.empty_like(hidden) if active_TF is None else active_TF
        torch.addmm(b_F, x_, w_FD.t(), out=hidden)
        active = torch.ops.aten.gelu.out(hidden, out=active_TF[: len(x_)])
        torch.addmm(b_D, active, w_DF.t(), out=out_)
    return out_TD


class _GeluMLP(torch.autograd.Function):
    """Works through the tokens in cache-sized pieces and keeps the hidden layer once, not twice."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, w_FD: Tensor, b_F: Tensor, w_DF: Tensor, b_D: Tensor) -> Tensor:
        hidden_TF = torch.empty(len(x_TD), len(w_FD), dtype=x_TD.dtype)
        out_TD = _gelu_mlp_by_pieces(x_TD, w_FD, b_F, w_DF, b_D, hidden_TF)
        ctx.save_for_backward(x_TD, hidden_TF, w_FD, w_DF)
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, hidden_TF, w_FD, w_DF = ctx.saved_tensors
        dx_TD = torch.empty_like(x_TD)
        dw_FD, dw_DF = torch.zeros_like(w_FD), torch.zeros_like(w_DF)
        db_F = torch.zeros(len(w_FD), dtype=x_TD.dtype)
        for piece in _pieces(len(x_TD), len(w_FD)):
            grad, hidden = grad_TD[piece], hidden_TF[piece]
            dw_DF.addmm_(grad.t(), F.gelu(hidden))
            dhidden = torch.ops.aten.gelu_backward(grad @ w_DF, hidden)
            dw_FD.addmm_(dhidden.t(), x_TD[piece])
            db_F += dhidden.sum(0)
            torch.mm(dhidden, w_FD, out=dx_TD[piece])
        return dx_TD, dw_FD, db_F, dw_DF, grad_TD.sum(0)


def _pieces(tokens: int, hidden: int) -> list[slice]:
    step = max(16, _CHUNK_ELEMENTS // hidden)
    return [slice(start, start + step) for start in range(0, tokens, step)]
