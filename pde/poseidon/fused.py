"""Leaner eager code for CPU: the same mathematics in fewer passes over memory.

Nothing here has parameters or changes results beyond rounding. Compiled code, other devices and functional
transforms take the plain formulas, which compilers fuse themselves.

Shapes: B batch, R/S token rows and columns, D width, T = B*R*S tokens, F hidden width.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Hidden activations handled at once: 0.8 MB of float32 stays in the cache of a core.
_CHUNK_ELEMENTS = 3 * 2**16
# From this many products on oneDNN beats the library behind ``F.linear``; a small call costs 10 us more.
_ONEDNN_PRODUCTS = 2**22


def runs_eagerly_on_cpu(x: Tensor) -> bool:
    """True outside compilation, autocast and functional transforms, for ordinary tensors on CPU."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or type(x) not in (Tensor, nn.Parameter):
        return False
    return not torch.is_autocast_enabled("cpu") and not torch._C._are_functorch_transforms_active()


def is_plain_linear(module: nn.Module) -> bool:
    """True for a linear layer whose call does nothing but apply its weight and bias."""
    return type(module) is nn.Linear and not module._forward_hooks and not module._forward_pre_hooks


def modulated_norm(
    y_BRSD: Tensor, gain: Tensor, shift: Tensor, eps: float, residual_BRSD: Tensor | None = None
) -> Tensor:
    """Layer norm with given modulation: shift + gain (y - mean(y)) / sqrt(var(y) + eps), moments over D.

    Gain and shift have shape (B or 1, 1, 1, D). The residual, if given, is added.
    """
    lean = runs_eagerly_on_cpu(y_BRSD)
    if lean and len(gain) == 1:
        # With one modulation for all tokens torch's kernel is twice as fast as separate steps.
        out = F.layer_norm(y_BRSD, y_BRSD.shape[-1:], gain.flatten(), shift.flatten(), eps)
    elif lean and torch.is_grad_enabled():
        return _ModulatedNorm.apply(y_BRSD, gain, shift, eps, residual_BRSD)
    elif lean:
        normal = _normalise(y_BRSD, eps)[0]
        out = torch.addcmul(shift, normal, gain, out=normal)
    else:
        out = torch.addcmul(shift, F.layer_norm(y_BRSD, y_BRSD.shape[-1:], eps=eps), gain)
    if residual_BRSD is None:
        return out
    return out + residual_BRSD if torch.is_grad_enabled() or not lean else out.add_(residual_BRSD)


def _normalise(y: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Tokens of mean 0 and variance 1, and the inverse standard deviations (B, R, S, 1)."""
    weights = _mean_weights(y)
    normal = y - _row_means(y, weights)
    inverse_std = _row_means(normal * normal, weights).add_(eps).rsqrt_()
    return normal.mul_(inverse_std), inverse_std


def _mean_weights(x: Tensor) -> Tensor:
    return torch.full(x.shape[-1:], 1 / x.shape[-1], dtype=x.dtype)


def _row_means(x: Tensor, weights_D: Tensor) -> Tensor:
    """Mean over the last dimension as a matrix-vector product, several times faster than a reduction."""
    return torch.mv(x.reshape(-1, len(weights_D)), weights_D).view(*x.shape[:-1], 1)


class _ModulatedNorm(torch.autograd.Function):
    """Keeps the normalised tokens and nothing else of their size."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, gain: Tensor, shift: Tensor, eps: float, residual: Tensor | None
    ) -> Tensor:
        normal, inverse_std = _normalise(y, eps)
        ctx.save_for_backward(normal, inverse_std, gain)
        out = torch.addcmul(shift, normal, gain)
        return out if residual is None else out.add_(residual)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, Tensor | None]:
        """With g = gain grad:  dy = (g - mean(g) - normal mean(g normal)) / std."""
        normal, inverse_std, gain = ctx.saved_tensors
        product = grad * normal
        dgain, dshift = product.sum((1, 2), keepdim=True), grad.sum((1, 2), keepdim=True)
        dy, weights = grad * gain, _mean_weights(grad)
        slope = _row_means(product.mul_(gain), weights)
        dy.sub_(_row_means(dy, weights)).addcmul_(normal, slope, value=-1).mul_(inverse_std)
        return dy, dgain, dshift, None, grad if ctx.needs_input_grad[4] else None


def linear(module: nn.Module, x: Tensor) -> Tensor:
    """Result of a linear layer, or of whatever stands in its place (adapters, quantised or hooked layers)."""
    if not (is_plain_linear(module) and runs_eagerly_on_cpu(x)) or not _is_large(x, module.weight):
        return module(x)
    weight_FD, bias_F = module.weight, module.bias
    x_TD = x.reshape(-1, x.shape[-1])
    if torch.is_grad_enabled():
        return _Linear.apply(x_TD, weight_FD, bias_F).view(*x.shape[:-1], -1)
    return _product(x_TD, weight_FD, bias_F).view(*x.shape[:-1], -1)


def _product(x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None, gelu: bool = False) -> Tensor:
    """Linear map of tokens, x W^T + b, and perhaps its gelu.

    Large ones go to oneDNN, which saves 5 to 15 % (transposed weights included) and the pass of the gelu.
    """
    if (gelu or _is_large(x_TD, weight_FD)) and _suits_onednn(x_TD, weight_FD):
        activation = ("gelu", [], "none") if gelu else ("none", [], "")
        return torch.ops.mkldnn._linear_pointwise(x_TD, weight_FD, bias_F, *activation)
    out_TF = F.linear(x_TD, weight_FD, bias_F)
    return F.gelu(out_TF) if gelu else out_TF


def _is_large(x: Tensor, weight_FD: Tensor) -> bool:
    return x.numel() * len(weight_FD) >= _ONEDNN_PRODUCTS


def _suits_onednn(x_TD: Tensor, weight_FD: Tensor) -> bool:
    dense = weight_FD.is_contiguous() or weight_FD.t().is_contiguous()
    ordinary = x_TD.dtype == weight_FD.dtype == torch.float32 and len(x_TD) > 0 and x_TD.is_contiguous()
    return dense and ordinary and _has_onednn()


@cache
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class _Linear(torch.autograd.Function):
    """Linear layer with the products of :func:`_product` in both directions."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_TD, weight_FD)
        ctx.has_bias = bias_F is not None
        return _product(x_TD, weight_FD, bias_F)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TF: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_FD = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        dx_TD = _product(grad_TF, weight_FD.t()) if needs_x else None
        dw_FD = grad_TF.t() @ x_TD if needs_weight else None
        return dx_TD, dw_FD, grad_TF.sum(0) if needs_bias else None


def gelu_mlp(x: Tensor, weight_FD: Tensor, bias_F: Tensor, weight_DF: Tensor, bias_D: Tensor) -> Tensor:
    """linear(gelu(linear(x))) with the exact gelu."""
    parameters = (weight_FD, bias_F, weight_DF, bias_D)
    if not runs_eagerly_on_cpu(x):
        return F.linear(F.gelu(F.linear(x, weight_FD, bias_F)), weight_DF, bias_D)
    x_TD = x.reshape(-1, x.shape[-1])
    if torch.is_grad_enabled():
        return _GeluMLP.apply(x_TD, *parameters).view(x.shape)
    pieces = [
        _product(_product(x_TD[piece], weight_FD, bias_F, gelu=True), weight_DF, bias_D)
        for piece in _pieces(len(x_TD), len(weight_FD))
    ]
    return (torch.cat(pieces) if len(pieces) > 1 else pieces[0]).view(x.shape)


class _GeluMLP(torch.autograd.Function):
    """Keeps the hidden layer once, not twice; goes back through it in pieces that fit the cache."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, w_FD: Tensor, b_F: Tensor, w_DF: Tensor, b_D: Tensor) -> Tensor:
        hidden_TF = _product(x_TD, w_FD, b_F)
        ctx.save_for_backward(x_TD, hidden_TF, w_FD, w_DF)
        return _product(F.gelu(hidden_TF), w_DF, b_D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, hidden_TF, w_FD, w_DF = ctx.saved_tensors
        dx_TD = torch.empty_like(x_TD)
        dw_FD, dw_DF = torch.empty_like(w_FD), torch.empty_like(w_DF)
        db_F = w_FD.new_zeros(len(w_FD))  # 0 times what was never written may be NaN
        for i, piece in enumerate(_pieces(len(x_TD), len(w_FD))):
            grad, hidden = grad_TD[piece], hidden_TF[piece]
            before = 0 if i == 0 else 1
            torch.addmm(dw_DF, grad.t(), F.gelu(hidden), beta=before, out=dw_DF)
            dhidden = _product(grad, w_DF.t())
            torch.ops.aten.gelu_backward.grad_input(dhidden, hidden, grad_input=dhidden)
            torch.addmm(dw_FD, dhidden.t(), x_TD[piece], beta=before, out=dw_FD)
            db_F += dhidden.sum(0)
            dx_TD[piece] = _product(dhidden, w_FD.t())
        return dx_TD, dw_FD, db_F, dw_DF, grad_TD.sum(0)


def _pieces(tokens: int, hidden: int) -> list[slice]:
    step = max(16, _CHUNK_ELEMENTS // hidden)
    return [slice(start, start + step) for start in range(0, tokens, step)]


def slide_back(x: Tensor, dim: int, size: int) -> Tensor:
    """Windows x[size-1-i : 2 size-1-i] along a dimension, i = 0 .. size-1 being a new dimension 1."""
    if not runs_eagerly_on_cpu(x):
        return x.unfold(dim, size, 1).flip(dim).movedim((dim, -1), (1, dim + 1))
    return _SlideBack.apply(x, dim, size)


class _SlideBack(torch.autograd.Function):
    """Copies and adds whole slices, where unfolding would move single numbers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, size: int) -> Tensor:
        ctx.shape, ctx.dim = x.shape, dim
        return torch.stack(_slices(x, dim, size), 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        dx = grad.new_zeros(ctx.shape)
        for part, grad_part in zip(_slices(dx, ctx.dim, grad.shape[1]), grad.unbind(1)):
            part.add_(grad_part)
        return dx, None, None


def _slices(x: Tensor, dim: int, size: int) -> tuple[Tensor, ...]:
    return x.unfold(dim, size, 1).movedim(-1, dim + 1).unbind(dim)[::-1]


def depthwise_convolution(x_BRSD: Tensor, module: nn.Conv2d) -> Tensor:
    """Depthwise convolution of odd size that keeps the grid, tokens last."""
    x_BDRS = x_BRSD.permute(0, 3, 1, 2)
    plain = type(module) is nn.Conv2d and not module._forward_hooks and not module._forward_pre_hooks
    if plain and torch.is_grad_enabled() and runs_eagerly_on_cpu(x_BRSD):
        return _Depthwise.apply(x_BDRS, module.weight, module.bias).permute(0, 2, 3, 1)
    return module(x_BDRS).permute(0, 2, 3, 1)


class _Depthwise(torch.autograd.Function):
    """Gradients by means of the forward kernel and of matrix products: 40 % less time than torch's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), (needs_x, needs_weight, needs_bias) = ctx.saved_tensors, ctx.needs_input_grad
        size, dx, dw = weight.shape[-1], None, None
        if needs_x:
            dx = F.conv2d(grad, weight.flip(2, 3), padding=size // 2, groups=len(weight))
        if needs_weight:
            dw = _depthwise_weight_gradient(x, grad, size)
        return dx, dw, grad.sum((0, 2, 3)) if needs_bias else None


def _depthwise_weight_gradient(x_BDRS: Tensor, grad_BDRS: Tensor, size: int) -> Tensor:
    """dW[i, j] = sum over b, r, s of x[r + i, s + j] grad[r, s] per channel, x being padded.

    For every i the sum over b and r is a product of matrices (columns of x, columns of grad), whose
    diagonals are then summed. torch's kernel runs through x and grad size^2 times instead.
    """
    rows, cols = grad_BDRS.shape[2:]
    x_DBRS = F.pad(x_BDRS.transpose(0, 1), 4 * (size // 2,)).contiguous()
    grad_DKS = grad_BDRS.transpose(0, 1).contiguous().view(len(x_DBRS), -1, cols)
    dw = grad_DKS.new_empty(len(x_DBRS), 1, size, size)
    for i in range(size):
        x_DKS = x_DBRS[:, :, i : i + rows].reshape(len(x_DBRS), -1, cols + size - 1)
        pairs = torch.bmm(x_DKS.mT, grad_DKS)
        dw[:, 0, i] = pairs.as_strided((len(dw), size, cols), (pairs.stride(0), cols, cols + 1)).sum(-1)
    return dw
