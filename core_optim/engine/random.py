"""Random numbers of the optimizers: a function of (seed, step, parameter), never of the global generator.

So a checkpoint needs the seed and the step alone, and processes that hold the same parameter draw the same.
Replace ``optimizer.random`` by an object with these methods to prescribe draws.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

import torch
from torch import Tensor


def mix(*numbers: int) -> int:
    """A 63-bit number that looks random and depends on all of some integers."""
    packed = struct.pack(f"<{len(numbers)}q", *numbers)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


class Randomness:
    """Draws named by step, parameter and stream.

    Args:
        seed: Seed of all draws.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def generator(
        self, *, step: int, index: int, stream: int = 0, device: torch.device | str = "cpu"
    ) -> torch.Generator:
        """Generator for one parameter at one step; streams separate several uses."""
        return torch.Generator(device).manual_seed(mix(self.seed, step, index, stream))

    def normal(self, shape: Sequence[int], *, step: int, index: int, like: Tensor, stream: int = 0) -> Tensor:
        """Standard normal numbers of a tensor's device and dtype; kinds of devices draw differently."""
        if like.device.type == "meta":
            return like.new_empty(tuple(shape))
        source = self.generator(step=step, index=index, stream=stream, device=like.device)
        return torch.randn(tuple(shape), generator=source, device=like.device, dtype=like.dtype)

    def permutation(self, n: int, *, step: int, index: int, stream: int = 0) -> Tensor:
        """The numbers from 0 to n - 1 in random order, int64 on the CPU."""
        return torch.randperm(n, generator=self.generator(step=step, index=index, stream=stream))

    def uniform(self, *, step: int, index: int, stream: int = 0) -> float:
        """One number in [0, 1), drawn on the CPU."""
        return torch.rand((), generator=self.generator(step=step, index=index, stream=stream)).item()
