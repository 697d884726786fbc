"""Helmholtz equation -Lap u - omega^2 a(x) u = 0 on the unit square with u = b on the boundary.

The standard five-point scheme on the closed grid i / (N - 1), solved by a sparse LU factorisation per sample
in float64 on the CPU. The operator is indefinite: omega^2 = 61.7 lies above the first eigenvalues of -Lap,
and samples close to a resonance have large solutions, as in the released data.

Shapes: B samples, N points per axis.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy import sparse
from scipy.sparse.linalg import splu
from torch import Tensor

from thalweg.pde.solvers.recipes import Check, Recipe, SampleRequest
from thalweg.pde.solvers.seeding import draw, integer, uniform

OMEGA = 2.5 * math.pi


def solve(a_NN: Tensor, boundary_NN: Tensor, source_NN: Tensor | None = None, omega: float = OMEGA) -> Tensor:
    """Solution (N, N) of -Lap u - omega^2 a u = f with u given on the boundary.

    Args:
        a_NN: Coefficient on the closed grid.
        boundary_NN: Field whose values on the boundary are taken; the interior is ignored.
        source_NN: Right-hand side f, zero by default.
        omega: Angular frequency.

    Raises:
        ValueError: If the grid has fewer than 3 points per axis.
    """
    n = a_NN.shape[-1]
    if n < 3:
        raise ValueError(f"the Helmholtz solver needs at least 3 points per axis, got {n}")
    inner = (slice(1, -1), slice(1, -1))
    u = boundary_NN.double().cpu().numpy().copy()
    u[inner] = 0.0
    h2 = (n - 1.0) ** -2
    right = np.zeros((n - 2, n - 2)) if source_NN is None else h2 * source_NN.double().cpu().numpy()[inner]
    # Known neighbours on the boundary move to the right-hand side.
    right = right + u[:-2, 1:-1] + u[2:, 1:-1] + u[1:-1, :-2] + u[1:-1, 2:]
    a = a_NN.double().cpu().numpy()[inner]
    second = sparse.diags_array([-1.0, 2.0, -1.0], offsets=(-1, 0, 1), shape=(n - 2, n - 2))
    matrix = sparse.kronsum(second, second) - sparse.diags_array(h2 * omega**2 * a.ravel())
    # The pattern is symmetric, and pivots stay on the diagonal unless they are tiny.
    factors = splu(
        matrix.tocsc(),
        permc_spec="MMD_AT_PLUS_A",
        diag_pivot_thresh=0.01,
        options={"SymmetricMode": True},
    )
    x = factors.solve(right.ravel())
    # One step of refinement restores what the relaxed pivoting may cost.
    x += factors.solve(right.ravel() - matrix @ x)
    u[inner] = x.reshape(n - 2, n - 2)
    return torch.from_numpy(u)


def residual(u_NN: Tensor, a_NN: Tensor, omega: float = OMEGA) -> Tensor:
    """-Lap_h u - omega^2 a u in the interior (N - 2, N - 2)."""
    n = u_NN.shape[-1]
    neighbours = u_NN[:-2, 1:-1] + u_NN[2:, 1:-1] + u_NN[1:-1, :-2] + u_NN[1:-1, 2:]
    inner = u_NN[1:-1, 1:-1]
    return (4.0 * inner - neighbours) * (n - 1.0) ** 2 - omega**2 * a_NN[1:-1, 1:-1] * inner


def wells(rng: torch.Generator, resolution: int) -> Tensor:
    """Coefficient (N, N): minus 2..7 Gaussians, scaled to the range [0, 1].

    Heights U[0.5, 10], widths U[0.05, 0.1], centres U[0.2, 0.8]^2.
    """
    number = integer(rng, 2, 7)
    height_P = uniform(rng, 0.5, 10, number)
    width_P = uniform(rng, 0.05, 0.1, number)
    centre_2P = uniform(rng, 0.2, 0.8, 2, number)
    x = torch.linspace(0, 1, resolution, dtype=torch.float64)
    bump_2PN = torch.exp(-((x - centre_2P[..., None]) ** 2) / (2 * width_P[:, None] ** 2))
    depth_NN = torch.einsum("p,px,py->xy", height_P, bump_2PN[0], bump_2PN[1])
    low, high = depth_NN.aminmax()
    return (high - depth_NN) / (high - low)


def recipe(name: str) -> Recipe:
    """Recipe of Helmholtz."""
    return Recipe(
        name=name,
        sample=sample,
        parameters={
            "omega": OMEGA,
            "a": "minus 2..7 Gaussians, height U[0.5, 10], width U[0.05, 0.1], scaled to [0, 1]",
            "b": "U[0.25, 0.5]",
            "scheme": "five-point differences, sparse LU in float64",
        },
    )


def sample(request: SampleRequest) -> dict[str, Tensor]:
    """Coefficients a (B, N, N), solutions u (B, N, N) and boundary values bc (B,), float64 as published."""
    n = request.resolution

    def make(rng: torch.Generator) -> Tensor:
        a_NN, b = wells(rng, n), uniform(rng, 0.25, 0.5)
        boundary_NN = torch.full_like(a_NN, float(b))
        return torch.stack([a_NN, solve(a_NN, boundary_NN), boundary_NN])

    a_BNN, u_BNN, b_BNN = draw(request, make).unbind(1)
    return {"a": a_BNN, "u": u_BNN, "bc": b_BNN[:, 0, 0]}


def manufactured(resolution: int) -> float:
    """Largest error for u = sin(pi x) cos(2 pi y) + 1 and a = 1 + x y with their source."""
    x = torch.linspace(0, 1, resolution, dtype=torch.float64)
    wave_NN = torch.sin(math.pi * x)[:, None] * torch.cos(2 * math.pi * x)
    a_NN = 1.0 + x[:, None] * x
    exact_NN = wave_NN + 1.0
    source_NN = 5 * math.pi**2 * wave_NN - OMEGA**2 * a_NN * exact_NN
    return float((solve(a_NN, exact_NN, source_NN) - exact_NN).abs().max())


def order() -> float:
    """Slope of :func:`manufactured` between 33 and 65 points."""
    return math.log2(manufactured(33) / manufactured(65))


def relative_residual(resolution: int = 128, seed: int = 0) -> float:
    """Largest residual of a generated sample over the largest of its two terms."""
    fields = sample(recipe("Helmholtz").request((0,), seed=seed, resolution=resolution))
    u_NN, a_NN = fields["u"][0], fields["a"][0]
    scale = 4.0 * (resolution - 1.0) ** 2 * u_NN.abs().max()
    return float(residual(u_NN, a_NN).abs().max() / scale)


def checks() -> list[Check]:
    """Figures about the scheme."""
    return [
        Check(name="Helmholtz: slope, manufactured solution", measure=order, expected="2"),
        Check(name="Helmholtz: residual at 128^2, relative", measure=relative_residual, expected="< 1e-10"),
    ]
