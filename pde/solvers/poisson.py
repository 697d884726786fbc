"""Poisson problem -Laplace u = f on the unit square with u = 0 on the boundary, and the set Poisson-Gauss.

Sine series: with f = sum f_kl sin(pi k x) sin(pi l y) the solution has u_kl = f_kl / (pi^2 (k^2 + l^2)).
Coefficients come from grid values by the discrete sine transform (``solve``), or for a sum of Gaussians,
which is a sum of products of functions of x and of y, from one-dimensional integrals (``solve_gaussians``).
A source that does not vanish on the boundary has slowly decaying coefficients; the integrals avoid their
aliasing, so that the accuracy does not depend on the grid.

Shapes: B samples, N points per axis with both ends (x_i = i/(N-1)), K modes, Q quadrature nodes,
G Gaussians.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from thalweg.pde.solvers.recipes import Recipe, SampleRequest
from thalweg.pde.solvers.seeding import generator, geometric, uniform

MODES = 512
"""Sine modes per axis used for Gaussian sources."""


def inverse_laplacian(modes: int) -> Tensor:
    """1 / (pi^2 (k^2 + l^2)) for k, l = 1..modes (K, K), float64."""
    k2 = torch.arange(1, modes + 1, dtype=torch.float64) ** 2
    return 1 / (math.pi**2 * (k2[:, None] + k2))


def solve(source_BNN: Tensor) -> Tensor:
    """Solution (B, N, N) of -Laplace u = f from the values of f at the inner points of the closed grid.

    Exact for sources in the span of the N-2 lowest sine modes per axis, second order for smooth sources that
    do not vanish on the boundary. Computed in the precision and on the device of the source.
    """
    modes = source_BNN.shape[-1] - 2
    symbol = inverse_laplacian(modes).to(source_BNN)
    coefficients = _sine_transform(_sine_transform(source_BNN[..., 1:-1, 1:-1], -1), -2)
    scale = (2 / (modes + 1)) ** 2
    interior = _sine_transform(_sine_transform(coefficients * symbol * scale, -1), -2)
    return torch.nn.functional.pad(interior, (1, 1, 1, 1))


def solve_gaussians(centre_2G: Tensor, width_G: Tensor, resolution: int) -> Tensor:
    """Solution (N, N) for f = sum_g exp(-|x - centre_g|^2 / (2 width_g^2)) by sine series in float64."""
    nodes_Q, weights_Q, waves_QK = _quadrature()
    bumps_2GQ = torch.exp(-((nodes_Q - centre_2G[..., None]) ** 2) / (2 * width_G[:, None] ** 2))
    factors_2GK = 2 * (bumps_2GQ * weights_Q) @ waves_QK
    u_KK = factors_2GK[0].T @ factors_2GK[1] * inverse_laplacian(MODES)
    waves_KN = _sines(resolution)
    return waves_KN.T @ u_KK @ waves_KN


def draw_gaussians(rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Centres (2, G) ~ U[0, 1]^2 and widths (G,) ~ U[0.025, 0.1]; G is geometric with mean 2.5."""
    count = geometric(rng, 0.4)
    return uniform(rng, 0, 1, 2, count), uniform(rng, 0.025, 0.1, count)


def recipe(name: str) -> Recipe:
    """Recipe of Poisson-Gauss."""
    return Recipe(
        name=name,
        sample=sample,
        parameters={
            "source": "sum of G Gaussians exp(-r^2 / (2 s^2)), P(G = n) = 0.4 0.6^(n-1), s ~ U[0.025, 0.1]",
            "scaling": "as in the paper's text; the published constants belong to differently scaled data",
            "scheme": f"sine series, {MODES} modes per axis, float64",
        },
    )


def sample(request: SampleRequest) -> dict[str, Tensor]:
    """Source and solution (B, N, N) of the requested samples; always solved in float64 on the CPU.

    A sample takes milliseconds, and its cost is in matrices that all samples share.
    """
    x_N = torch.linspace(0, 1, request.resolution, dtype=torch.float64)
    sources, solutions = [], []
    for index in request.indices:
        centre_2G, width_G = draw_gaussians(generator(request.seed, request.stream, index))
        bumps_2GN = torch.exp(-((x_N - centre_2G[..., None]) ** 2) / (2 * width_G[:, None] ** 2))
        sources.append(bumps_2GN[0].T @ bumps_2GN[1])
        solutions.append(solve_gaussians(centre_2G, width_G, request.resolution))
    return {"source": torch.stack(sources).float(), "solution": torch.stack(solutions).float()}


def _sine_transform(x: Tensor, dim: int) -> Tensor:
    """DST-I along a dimension, sum_j x_j sin(pi k j / (n + 1)), through the FFT of the odd extension."""
    x = x.movedim(dim, -1)
    zero = torch.zeros_like(x[..., :1])
    odd = torch.cat([zero, x, zero, -x.flip(-1)], dim=-1)
    return (-0.5 * torch.fft.rfft(odd).imag[..., 1:-1]).movedim(-1, dim)


@lru_cache(maxsize=1)
def _quadrature(panels: int = 4 * MODES) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes (Q,), weights (Q,) and sin(pi k x) (Q, K) of Gauss-Legendre quadrature, two nodes per panel."""
    left = torch.arange(panels, dtype=torch.float64)[:, None]
    offset = torch.tensor([0.5 - math.sqrt(1 / 12), 0.5 + math.sqrt(1 / 12)], dtype=torch.float64)
    nodes_Q = ((left + offset) / panels).flatten()
    waves_QK = torch.sin(math.pi * nodes_Q[:, None] * torch.arange(1, MODES + 1, dtype=torch.float64))
    return nodes_Q, torch.full_like(nodes_Q, 0.5 / panels), waves_QK


@lru_cache(maxsize=4)
def _sines(resolution: int) -> Tensor:
    """sin(pi k x_i) on the closed grid (K, N); exactly zero on the boundary."""
    x_N = torch.linspace(0, 1, resolution, dtype=torch.float64)
    waves_KN = torch.sin(math.pi * torch.arange(1, MODES + 1, dtype=torch.float64)[:, None] * x_N)
    waves_KN[:, [0, -1]] = 0
    return waves_KN
