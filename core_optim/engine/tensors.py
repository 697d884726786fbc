"""A list of tensors that answers to the methods of one tensor, through torch's multi-tensor kernels.

Rules are written once with the methods below and run on a tensor (loop, compile) or on a list (foreach).
Where torch has no multi-tensor kernel, ``each`` goes through the list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


class Tensors:
    """A list of tensors with elementwise methods; an argument is a number, a 0-d tensor or such a list.

    Args:
        items: The tensors, on one device and of one dtype.
    """

    __slots__ = ("items",)

    def __init__(self, items: list[Tensor] | tuple[Tensor, ...]) -> None:
        self.items = list(items)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)

    def each(self, function: Callable[..., Tensor], *others: Any) -> Tensors:
        """``function`` of each tensor, and of its partners in other lists."""
        columns = [o.items if isinstance(o, Tensors) else [o] * len(self.items) for o in others]
        return Tensors([function(*row) for row in zip(self.items, *columns)])

    def lerp_(self, end: Tensors, weight: float) -> Tensors:
        """X <- x + weight (end - x)."""
        torch._foreach_lerp_(self.items, end.items, weight)
        return self

    def addcmul_(self, a: Tensors, b: Tensors, value: float = 1.0) -> Tensors:
        """X <- x + value a b."""
        torch._foreach_addcmul_(self.items, a.items, b.items, value)
        return self

    def add(self, other: Any, alpha: float = 1.0) -> Tensors:
        """X + alpha other."""
        if isinstance(other, Tensors):
            return Tensors(torch._foreach_add(self.items, other.items, alpha=alpha))
        return Tensors(torch._foreach_add(self.items, other))

    def add_(self, other: Any, alpha: float = 1.0) -> Tensors:
        """X <- x + alpha other."""
        if isinstance(other, Tensors):
            torch._foreach_add_(self.items, other.items, alpha=alpha)
        else:
            torch._foreach_add_(self.items, other)
        return self

    def __add__(self, other: Any) -> Tensors:
        return self.add(other)

    def __sub__(self, other: Any) -> Tensors:
        return _binary(self, "sub", other)

    def __mul__(self, other: Any) -> Tensors:
        return _binary(self, "mul", other)

    def __truediv__(self, other: Any) -> Tensors:
        return _binary(self, "div", other)

    __radd__ = __add__
    __rmul__ = __mul__

    def __neg__(self) -> Tensors:
        return Tensors(torch._foreach_neg(self.items))


def _binary(x: Tensors, name: str, other: Any) -> Tensors:
    """A two-argument kernel, out of place, or in place for a name that ends in an underscore."""
    argument = other.items if isinstance(other, Tensors) else other
    found = getattr(torch, f"_foreach_{name}")(x.items, argument)
    return x if found is None else Tensors(found)


def _unary(x: Tensors, name: str) -> Tensors:
    found = getattr(torch, f"_foreach_{name}")(x.items)
    return x if found is None else Tensors(found)


def _install() -> None:
    """Give the class the remaining methods, which differ in the name of the kernel alone."""

    def binary(name: str) -> Callable[[Tensors, Any], Tensors]:
        return lambda self, other: _binary(self, name, other)

    def unary(name: str) -> Callable[[Tensors], Tensors]:
        return lambda self: _unary(self, name)

    for name in ("maximum", "mul_", "div_", "copy_"):
        setattr(Tensors, name, binary(name))
    for name in ("sqrt", "abs", "sigmoid", "sign_"):
        setattr(Tensors, name, unary(name))


_install()
