"""Parameters and gradients drawn from fixed seeds, and steps of an optimizer on them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Params = list[nn.Parameter]


def parameters(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Params:
    source = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=source, dtype=dtype)) for shape in shapes]


def gradients(params: Params, t: int, scale: float = 1.0) -> list[Tensor]:
    """Of step `t`, counted from 0."""
    source = torch.Generator().manual_seed(100 + t)
    return [scale * torch.randn(p.shape, generator=source, dtype=p.dtype) for p in params]


def run(optimizer: Any, params: Params, steps: int, *, start: int = 0, scale: float = 1.0) -> None:
    for t in range(start, start + steps):
        for p, g in zip(params, gradients(params, t, scale)):
            p.grad = g
        optimizer.step()


def run_in_two(make: Callable[[Params], Any], params: Params, steps: int, at: int, file: Path) -> Any:
    """Steps of which those from `at` on are made by a new optimizer with the state that the first left.

    Returns:
        The second optimizer.
    """
    optimizer = make(params)
    run(optimizer, params, at)
    torch.save(optimizer.state_dict(), file)
    optimizer = make(params)
    optimizer.load_state_dict(torch.load(file, weights_only=True))
    run(optimizer, params, steps - at, start=at)
    return optimizer
