"""Steps that rules share, for a tensor or a list of tensors, with numbers or 0-d tensors as scalars.

Scalars are numbers in the eager kernels, where torch fuses them into its calls, and 0-d tensors in a compiled
one, so that no value is ever compiled in; the compiler fuses the longer form.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from thalweg.core_optim.engine.tensors import Tensors

Scalar = Any
"""A number, or a 0-d tensor in a compiled kernel."""


def ema_(mean: Tensor, value: Tensor, beta: Scalar) -> Tensor:
    """Mean <- beta mean + (1 - beta) value, in place."""
    return mean.lerp_(value, 1.0 - beta)


def ema_product_(mean: Tensor, a: Tensor, b: Tensor, beta: Scalar) -> Tensor:
    """Mean <- beta mean + (1 - beta) a b, in place."""
    if isinstance(beta, Tensor):
        return mean.mul_(beta).add_(a * b * (1.0 - beta))
    return mean.mul_(beta).addcmul_(a, b, value=1.0 - beta)


def axpy_(y: Tensor, x: Tensor, alpha: Scalar) -> Tensor:
    """Y <- y + alpha x, in place."""
    return y.add_(x * alpha) if isinstance(alpha, Tensor) else y.add_(x, alpha=alpha)


def axpy(y: Tensor, x: Tensor, alpha: Scalar) -> Tensor:
    """Y + alpha x."""
    return y + x * alpha if isinstance(alpha, Tensor) else y.add(x, alpha=alpha)


def denominator(square: Tensor, correction: Scalar, eps: Scalar) -> Tensor:
    """Root of a second moment over ``correction``, plus eps."""
    return square.sqrt().div_(correction).add_(eps)


def where(condition: Tensor, yes: Any, no: Any) -> Tensor:
    """Choose element by element; the condition and either choice may be lists of tensors."""
    if isinstance(condition, Tensors):
        return condition.each(lambda c, a, b: torch.where(c, a, b), yes, no)
    return torch.where(condition, yes, no)


def each(function: Any, x: Tensor, *others: Any) -> Tensor:
    """``function`` of a tensor, or of each tensor in a list with its partners."""
    return x.each(function, *others) if isinstance(x, Tensors) else function(x, *others)
