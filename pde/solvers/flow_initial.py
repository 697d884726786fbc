"""Initial data of the incompressible sets (Herde et al. 2024, appendix on PDEgym).

Every function draws one sample from its generator and evaluates it on an N x N grid of the unit square,
point (i, j) at (i/N, j/N), x along the first axis. The draws do not depend on N, so a sample looks the same
at every resolution. The solver projects the velocity onto divergence-free fields.

Shapes: velocity (2, N, N), scalars (N, N), both float64 on the CPU.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from thalweg.pde.solvers.fourier import SpectralGrid
from thalweg.pde.solvers.seeding import integer, uniform

TWO_PI = 2 * math.pi

PATCH_VORTICITY = 10.0
"""Largest vorticity of a patch. The paper's text says 1, which gives a velocity of rms 0.022; the published
FNS-KF data have 0.220, which 10 reproduces (0.2155)."""

BRIDGE_MODES = 64
"""Wave numbers of the Brownian bridge, all that the published 128 x 128 grid resolves."""


def points(resolution: int) -> Tensor:
    """Coordinates i/N (N,)."""
    return torch.arange(resolution, dtype=torch.float64) / resolution


def velocity_from_vorticity(vorticity_NN: Tensor) -> Tensor:
    """Velocity (2, N, N) of zero mean with a given vorticity; the mean vorticity is dropped."""
    grid = SpectralGrid(len(vorticity_NN))
    return grid.backward(grid.velocity(grid.forward(vorticity_NN), torch.zeros(2)))


def sines(rng: torch.Generator, resolution: int) -> Tensor:
    """NS-Sines: ten by ten sine modes per component, with random amplitudes and phases.

    u = sum_ij a_ij / sqrt(2 pi (i + j)) sin(2 pi i x + b_ij) sin(2 pi j y + c_ij), v with cosines and its own
    coefficients, a ~ U[-1, 1], b, c ~ U[0, 2 pi].
    """
    modes = torch.arange(1, 11, dtype=torch.float64)
    scale_IJ = (TWO_PI * (modes[:, None] + modes)).rsqrt()
    angle_IN = TWO_PI * modes[:, None] * points(resolution)
    components = []
    for wave in (torch.sin, torch.cos):
        a_IJ = uniform(rng, -1, 1, 10, 10) * scale_IJ
        b_IJ, c_IJ = uniform(rng, 0, TWO_PI, 2, 10, 10)
        along_x = wave(angle_IN[:, None] + b_IJ[..., None])
        along_y = wave(angle_IN[None] + c_IJ[..., None])
        components.append(torch.einsum("ij,ijx,ijy->xy", a_IJ, along_x, along_y))
    return torch.stack(components)


def gaussian_vortices(rng: torch.Generator, resolution: int) -> Tensor:
    """NS-Gauss and CE-Gauss: a hundred periodic Gaussian vortices.

    w = sum_i a_i / s_i exp(-r_i^2 / (2 s_i^2)), a ~ U[-1, 1], s ~ U[0.01, 0.1], centres ~ U[0, 1]^2.
    """
    strength = uniform(rng, -1, 1, 100)
    width = uniform(rng, 0.01, 0.1, 100)
    centre = uniform(rng, 0, 1, 2, 100)
    offset = points(resolution)[:, None] - centre[:, None]
    images = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)[:, None, None, None]
    bumps_2NV = torch.exp(-((offset + images) ** 2) / (2 * width**2)).sum(0)
    vorticity = torch.einsum("v,xv,yv->xy", strength / width, bumps_2NV[0], bumps_2NV[1])
    return velocity_from_vorticity(vorticity)


def piecewise_constant(rng: torch.Generator, resolution: int) -> Tensor:
    """NS-PwC and FNS-KF: vorticity constant on ten by ten patches, U[-10, 10] (see PATCH_VORTICITY)."""
    patch_XY = uniform(rng, -PATCH_VORTICITY, PATCH_VORTICITY, 10, 10)
    # Integer arithmetic: a grid line that meets a patch border belongs to the patch on its right.
    cell = torch.arange(resolution) * 10 // resolution
    return velocity_from_vorticity(patch_XY[cell][:, cell])


def brownian_bridge(rng: torch.Generator, resolution: int) -> Tensor:
    """NS-BB before its run-up: a random field with spectrum |k|^-3/2 per component (Hurst index H = 1/2).

    Each component is a sum over k, l >= 0 of (4 pi^2 (k^2 + l^2))^(-(H+1)/2) times the four products of
    cosine and sine in x and y, with coefficients U[-1, 1].
    """
    mode = torch.arange(BRIDGE_MODES, dtype=torch.float64)
    k2 = TWO_PI**2 * (mode[:, None] ** 2 + mode**2)
    amplitude_KL = torch.where(k2 > 0, k2, math.inf) ** -0.75
    coefficients = uniform(rng, -1, 1, 2, 2, 2, BRIDGE_MODES, BRIDGE_MODES) * amplitude_KL
    kept = min(BRIDGE_MODES, resolution // 2)
    angle_KN = TWO_PI * mode[:kept, None] * points(resolution)
    waves = torch.stack([angle_KN.cos(), angle_KN.sin()])
    return torch.einsum("cpqkl,pkx,qly->cxy", coefficients[..., :kept, :kept], waves, waves)


def shear_layer(rng: torch.Generator, resolution: int) -> Tensor:
    """NS-SL: a double shear layer u = tanh(2 pi (y' - 1/4) / d) with a wavy interface, v = 0.

    y' = y + xi + 0.025 sum_{k <= p} a_k sin(2 pi k x - b_k) modulo 1, mirrored at 1/2; p in 7..12,
    a ~ U[0, 1], b ~ U[0, 2 pi], thickness d ~ U[0.08, 0.12], xi ~ U[-1/16, 1/16].
    """
    count = integer(rng, 7, 12)
    a = uniform(rng, 0, 1, count, 1)
    b = uniform(rng, 0, TWO_PI, count, 1)
    thickness = uniform(rng, 0.08, 0.12)
    shift = uniform(rng, -1 / 16, 1 / 16)
    x = points(resolution)
    mode = torch.arange(1, count + 1, dtype=torch.float64)[:, None]
    interface_N = 0.025 * (a * torch.sin(TWO_PI * mode * x - b)).sum(0)
    y_NN = (x + shift + interface_N[:, None]) % 1
    u = torch.tanh(TWO_PI * torch.where(y_NN <= 0.5, y_NN - 0.25, 0.75 - y_NN) / thickness)
    return torch.stack([u, torch.zeros_like(u)])


def vortex_sheet(rng: torch.Generator, resolution: int) -> Tensor:
    """NS-SVS: a vortex sheet of unit strength on a sine curve, mollified over a radius of 5/128.

    The sheet is y = 1/2 + 0.2 sin(2 pi x) + sum_{i <= 10} a_i sin(2 pi (x + b_i)), a ~ U[0, 1/320],
    b ~ U[0, 1]. Its Fourier coefficients, the integral of exp(-i k.x) along the curve, are multiplied by
    those of the mollifier; the mean vorticity is dropped.
    """
    a = uniform(rng, 0, 1 / 320, 10, 1)
    b = uniform(rng, 0, 1, 10, 1)
    x_S = points(2048)
    phase = TWO_PI * (x_S + b)
    y_S = 0.5 + 0.2 * torch.sin(TWO_PI * x_S) + (a * torch.sin(phase)).sum(0)
    slope_S = 0.2 * TWO_PI * torch.cos(TWO_PI * x_S) + (a * TWO_PI * torch.cos(phase)).sum(0)
    length_S = (1 + slope_S**2).sqrt() / len(x_S)
    grid = SpectralGrid(resolution)
    along_x = torch.exp(-1j * grid.kx * x_S) * length_S
    along_y = torch.exp(-1j * grid.ky[:, None] * y_S)
    coefficients_NK = (along_x @ along_y.T) * _mollifier(resolution) * grid.keep
    return grid.backward(grid.velocity(coefficients_NK, torch.zeros(2)))


def disk(resolution: int) -> Tensor:
    """Tracer: one inside the disk of radius 1/4 about the centre, zero outside (N, N)."""
    x = points(resolution) - 0.5
    return ((x[:, None] ** 2 + x**2) < 0.25**2).double()


def kolmogorov_forcing(resolution: int, amplitude: float = 0.1) -> Tensor:
    """Body force of FNS-KF, A (cos 2 pi (x + y), sin 2 pi (x + y)), (2, N, N)."""
    x = points(resolution)
    angle = TWO_PI * (x[:, None] + x)
    return amplitude * torch.stack([angle.cos(), angle.sin()])


@lru_cache(maxsize=4)
def _mollifier(resolution: int, radius: float = 5 / 128, nodes: int = 512) -> Tensor:
    """Fourier transform (N, K) of the radial cubic B-spline with unit integral and support ``radius``.

    Midpoint rule for 2 pi times the integral of psi(r) J_0(k r) r dr, divided by its value at k = 0.
    """
    k_NK = TWO_PI * SpectralGrid(resolution).n2.sqrt()
    r = (torch.arange(nodes, dtype=torch.float64) + 0.5) / nodes
    knots = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0], dtype=torch.float64)[:, None]
    weights = torch.tensor([1.0, -4.0, 6.0, -4.0, 1.0], dtype=torch.float64)[:, None]
    mass = (weights * (r - knots).clamp(min=0) ** 3).sum(0) * r
    return (torch.special.bessel_j0(k_NK[..., None] * radius * r) * mass).sum(-1) / mass.sum()
