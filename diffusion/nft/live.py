"""How many bytes a computation holds at once, counted on the meta device.

Every operation runs on shapes alone. A storage counts from the operation that makes it until nothing refers
to it any more, be that a variable or what autograd keeps for the backward pass. So the count follows the very
program that will run, gradient checkpointing included.

What it cannot see: scratch memory inside of kernels, and what the allocator wastes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

LOWER = {
    "__matmul__", "addbmm", "addmm", "addmv", "baddbmm", "bmm", "conv1d", "conv2d", "conv3d",
    "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "einsum", "linear", "matmul", "mm", "mv",
    "prelu", "scaled_dot_product_attention",
}  # fmt: skip
"""Operations that autocast does in half precision on a GPU."""
UPPER = {
    "__pow__", "__rpow__", "cosine_similarity", "cumprod", "cumsum", "exp", "expm1", "group_norm",
    "interpolate", "layer_norm", "log", "log10", "log1p", "log2", "log_softmax", "logsumexp", "mse_loss",
    "norm", "pow", "prod", "reciprocal", "rsqrt", "softmax", "softplus", "sum",
}  # fmt: skip
"""Those that it does in float32."""


class LiveBytes(TorchDispatchMode):
    """Bytes of storages made within its context that are still there.

    Args:
        others: Tensors that are not to be counted, nor views of them: weights and inputs.
    """

    def __init__(self, others: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = 0
        """Bytes."""
        self.peak = 0
        """Most bytes at any time."""
        self._others = [value.untyped_storage() for value in others]
        self._known: dict[int, Any] = {storage._cdata: None for storage in self._others}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count what it made."""
        found = func(*args, **(kwargs or {}))
        for value in tree_leaves(found):
            if isinstance(value, Tensor):
                self._add(value.untyped_storage())
        return found

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known[key] = weakref.finalize(storage, self._drop, key, size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _drop(self, key: int, size: int) -> None:
        self.now -= size
        del self._known[key]


class GpuKernels(TorchFunctionMode):
    """What a GPU would do differently from the meta device: fused attention, and autocast.

    Args:
        autocast: Precision of autocast, None for none.
        lower: Names of operations that autocast does in it.
        upper: Names of those that it does in float32.
    """

    def __init__(
        self,
        autocast: torch.dtype | None = None,
        lower: Iterable[str] = LOWER,
        upper: Iterable[str] = UPPER,
    ) -> None:
        super().__init__()
        self.autocast, self.lower, self.upper = autocast, frozenset(lower), frozenset(upper)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation on inputs in the precision that it will have."""
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if self.autocast is not None and name in self.lower:
            args, kwargs = _cast((args, kwargs), self.autocast)
        elif self.autocast is not None and name in self.upper:
            args, kwargs = _cast((args, kwargs), torch.float32)
        if name == "scaled_dot_product_attention":
            return _fused_attention(*args, **kwargs)
        return func(*args, **kwargs)


def _cast(given: Any, dtype: torch.dtype) -> Any:
    def one(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64:
            return value.to(dtype)
        return value

    return tree_map(one, given)


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **other: Any,
) -> Tensor:
    """Attention that keeps no weights: its inputs, its answer and a number for each row.

    The kernels of GPUs keep the same; this one is taken because every build of torch knows its shapes.
    """
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = attn_mask.to(query.dtype)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=other.get("scale"))[0]


def checkpointed(kernels: TorchFunctionMode) -> Callable[..., Any]:
    """What ``enable_gradient_checkpointing`` of diffusers is to be given.

    Modes for functions are left in the backward pass; so what is computed again there enters them once more.
    """
    return partial(checkpoint, use_reentrant=False, context_fn=lambda: (nullcontext(), kernels))


def inference_bytes(
    call: Callable[[], Any], others: Iterable[Tensor], kernels: TorchFunctionMode | None = None
) -> int:
    """Most bytes beside others that a call holds at once, without gradients, its answer included."""
    with torch.no_grad(), LiveBytes(others) as live, _entered(kernels):
        call()
    return live.peak


def training_bytes(
    call: Callable[[], Tensor],
    network: nn.Module,
    others: Iterable[Tensor],
    kernels: TorchFunctionMode | None,
) -> tuple[int, int]:
    """Bytes beside weights and gradients of a forward and a backward pass.

    Args:
        call: Gives the answer of the network, on the meta device.
        network: Owner of the weights. Its gradients are there already, as in all micro-batches but the first.
        others: More tensors that are not counted.
        kernels: What differs from the meta device.

    Returns:
        Bytes that wait for the backward pass, and the most at any time of both.
    """
    weights = list(network.parameters())
    for value in weights:
        value.grad = torch.zeros_like(value) if value.requires_grad else None
    grads = [value.grad for value in weights if value.grad is not None]
    with LiveBytes([*weights, *network.buffers(), *grads, *others]) as live, _entered(kernels):
        answer = call()
        waiting = live.now
        answer.backward(torch.empty_like(answer))
    for value in weights:
        value.grad = None
    return waiting, live.peak


def _entered(mode: TorchFunctionMode | None) -> AbstractContextManager[Any]:
    return nullcontext() if mode is None else mode
