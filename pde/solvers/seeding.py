"""Random numbers of generated data: one generator per sample, drawn on the CPU in float64.

A sample's numbers depend on (seed, stream, index) alone. They are the same on every device and do not change
with the batch size, the number of workers or after a restart.

Shapes: B samples, ... whatever follows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from thalweg.pde.solvers.recipes import SampleRequest


def generator(seed: int, stream: str, index: int) -> torch.Generator:
    """CPU generator of one sample.

    The 63-bit state comes from BLAKE2b, which is the same in every Python process (``hash`` is not).
    """
    digest = hashlib.blake2b(f"{seed}/{stream}/{index}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def uniform(rng: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    """Independent draws from U[low, high] of a shape, float64 on the CPU."""
    return low + (high - low) * torch.rand(shape, generator=rng, dtype=torch.float64)


def integer(rng: torch.Generator, low: int, high: int) -> int:
    """One draw from the integers low..high, both included."""
    return int(torch.randint(low, high + 1, (), generator=rng))


def geometric(rng: torch.Generator, p: float) -> int:
    """Number of trials up to the first success, P(n) = p (1 - p)^(n - 1) for n = 1, 2, ..."""
    trials = 1
    while float(torch.rand((), generator=rng, dtype=torch.float64)) >= p:
        trials += 1
    return trials


def draw(request: SampleRequest, make: Callable[[torch.Generator], Tensor]) -> Tensor:
    """Stack what ``make`` draws for every requested sample: (B, ...) float64 on the request's device."""
    drawn = [make(generator(request.seed, request.stream, index)) for index in request.indices]
    return torch.stack(drawn).to(request.device)
