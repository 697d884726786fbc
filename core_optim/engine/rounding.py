"""Stochastic rounding from fp32 to bf16: up or down with the probabilities that make it right on average.

The random bits come from a hash of (key, number of the element), the same on every device, for every kernel,
and for a shard of a parameter as for the whole of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

Numbers = Tensor | int
"""Number of the first element of a part within the whole, or the numbers of all of its elements (int32)."""


def hashed_bits(n: int, key: Tensor | int, numbers: Numbers, device: torch.device) -> Tensor:
    """16 random bits (int32) for each of n elements, from their numbers by a murmur3-like mix."""
    if isinstance(numbers, Tensor) and numbers.dim():
        x = numbers
    else:
        x = torch.arange(n, dtype=torch.int32, device=device) + numbers
    x = x * 0x9E3779B + key
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x45D9F3B
    x = (x ^ ((x >> 15) & 0x1FFFF)) * 0x2C1B3C6D
    x = x ^ ((x >> 16) & 0xFFFF)
    return x & 0xFFFF


def stochastic_round(x: Tensor, key: Tensor | int, numbers: Numbers = 0) -> Tensor:
    """Nearest bf16 below or above each element of a fp32 tensor; what bf16 holds exactly stays as it is.

    Args:
        x: fp32, finite.
        key: 32-bit number, different for each tensor and step.
        numbers: Where its elements are counted in the whole, for a shard.
    """
    bits = x.contiguous().view(torch.int32).reshape(-1)
    noise = hashed_bits(bits.numel(), key, numbers, x.device)
    rounded = (bits + noise) & -0x10000
    return rounded.view(torch.float32).reshape(x.shape).to(torch.bfloat16)
