"""Networks and data of the ladder of optimizers that need more than a line."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from thalweg.pde.poseidon import ScOT


class LowRank(nn.Module):
    """Frozen weights W and a trained product B A, with A random and B = 0 as LoRA starts."""

    weight: Tensor

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        out, features = weight.shape
        self.register_buffer("weight", weight)
        self.lora_A = nn.Parameter(torch.randn(rank, features) / features**0.5)
        self.lora_B = nn.Parameter(torch.zeros(out, rank))

    def forward(self, x: Tensor) -> Tensor:
        """X (W + B A)^T, (..., out)."""
        return x @ self.weight.T + (x @ self.lora_A.T) @ self.lora_B.T


def tiny_scot() -> ScOT:
    """49 thousand parameters in two levels."""
    from thalweg.pde.poseidon import ScOT, ScOTConfig

    return ScOT(
        ScOTConfig(
            image_size=16,
            patch_size=2,
            num_channels=1,
            num_out_channels=1,
            embed_dim=16,
            depths=(1, 1),
            num_heads=(1, 2),
            skip_connections=(1, 0),
            window_size=4,
            drop_path_rate=0.0,
        )
    )


@functools.cache
def poisson_data() -> tuple[Tensor, Tensor]:
    """Standardised sources and solutions of 256 samples of Poisson-Gauss, (256, 1, 16, 16) each."""
    from thalweg.pde.solvers.poisson import sample
    from thalweg.pde.solvers.recipes import SampleRequest

    request = SampleRequest(indices=tuple(range(256)), seed=0, stream="ladder", resolution=16, times=())
    fields = sample(request)

    def standard(x: Tensor) -> Tensor:
        return ((x - x.mean()) / x.std())[:, None]

    return standard(fields["source"]), standard(fields["solution"])
