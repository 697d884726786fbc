"""Wave-Gauss and Wave-Layer: Gaussian pulses run through a smooth or a layered medium and leave the square.

Speeds are in m/s as in the published files. Neither the length of the square nor the time between snapshots
is documented there. Here the snapshots span one second and the square is as long as sound travels in that
time through the mean medium, 2600 m and 3500 m: a front crosses the square about once. Coordinates of pulses,
bumps and layers are fractions of the side; u is dimensionless.

Shapes: B samples, T snapshots, N points per axis of the closed grid i / (N - 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from thalweg.pde.solvers import wave_checks
from thalweg.pde.solvers.recipes import Check, Recipe, SampleRequest
from thalweg.pde.solvers.seeding import draw, integer, uniform
from thalweg.pde.solvers.wave_solver import CFL, Wave

PULSE_DISTANCE = 0.125
"""Least distance of two pulses; the paper says only that they are not too close."""

LAYER_MODES = 10
"""Sine modes of each interface."""

LAYER_WAVE = 0.25
"""Largest excursion of an interface over the thickness of a layer; not given. Interfaces never cross."""


def points(resolution: int) -> Tensor:
    """Coordinates of the closed grid (N,)."""
    return torch.linspace(0, 1, resolution, dtype=torch.float64)


def pulses(rng: torch.Generator, resolution: int) -> Tensor:
    """Sum (N, N) of 2..6 Gaussians of height 1, width U[0.039, 0.156], centres U[1/6, 5/6] kept apart."""
    x = points(resolution)
    centres: list[Tensor] = []
    number = integer(rng, 2, 6)
    while len(centres) < number:
        candidate = uniform(rng, 1 / 6, 5 / 6, 2)
        if all(float((candidate - other).norm()) >= PULSE_DISTANCE for other in centres):
            centres.append(candidate)
    width_P = uniform(rng, 0.039, 0.156, number)
    return gaussians(x, torch.stack(centres), width_P, torch.ones_like(width_P))


def gaussians(x: Tensor, centre_P2: Tensor, width_P: Tensor, height_P: Tensor) -> Tensor:
    """Sum (N, N) of isotropic Gaussians height exp(-r^2 / (2 width^2))."""
    bump_P2N = torch.exp(-((x - centre_P2[..., None]) ** 2) / (2 * width_P[:, None, None] ** 2))
    return torch.einsum("p,px,py->xy", height_P, bump_P2N[:, 0], bump_P2N[:, 1])


def bumpy_medium(rng: torch.Generator, resolution: int) -> Tensor:
    """Wave-Gauss: c = c_0 + 4 bumps, one per quarter; (N, N) in m/s.

    c_0 ~ U[1500, 2500]; heights U[1000, 2500], widths U[1/12, 1/6], centres (1/4 | 3/4, 1/4 | 3/4) shifted by
    U[-0.3125, 0.3125].
    """
    base = uniform(rng, 1500, 2500)
    quarter = torch.tensor([[0.25, 0.25], [0.25, 0.75], [0.75, 0.25], [0.75, 0.75]], dtype=torch.float64)
    centre_P2 = quarter + uniform(rng, -0.3125, 0.3125, 4, 2)
    height_P, width_P = uniform(rng, 1000, 2500, 4), uniform(rng, 1 / 12, 1 / 6, 4)
    return base + gaussians(points(resolution), centre_P2, width_P, height_P)


def layered_medium(rng: torch.Generator, resolution: int) -> Tensor:
    """Wave-Layer: 3..6 layers across y with wavy interfaces and speeds U[2000, 5000]; (N, N) in m/s.

    Interface l of n layers is y = l / n + (1/4n) sum_k a_k sin(2 pi (k x + b_k)) / sum_k a_k, k = 1..10,
    a, b ~ U[0, 1].
    """
    layers = integer(rng, 3, 6)
    c_L = uniform(rng, 2000, 5000, layers)
    x = points(resolution)
    mode = torch.arange(1, LAYER_MODES + 1, dtype=torch.float64)[:, None]
    layer_NN = torch.zeros(resolution, resolution, dtype=torch.int64)
    for interface in range(1, layers):
        a, b = uniform(rng, 0, 1, LAYER_MODES, 1), uniform(rng, 0, 1, LAYER_MODES, 1)
        ripple_N = (a * torch.sin(2 * math.pi * (mode * x + b))).sum(0) / a.sum()
        layer_NN += x >= (interface + LAYER_WAVE * ripple_N[:, None]) / layers
    return c_L[layer_NN]


@dataclass(frozen=True, kw_only=True, slots=True)
class Medium:
    """One family of media and the scales of its set."""

    speed: Callable[[torch.Generator, int], Tensor]
    """Draws a wave speed (N, N) from a generator."""
    distribution: str
    """The distribution in words, stored in the file."""
    width: float
    """Length of the square in m."""
    frames: int
    """Snapshots over one second, both ends included."""


MEDIA: Mapping[str, Medium] = {
    "Wave-Gauss": Medium(
        speed=bumpy_medium,
        distribution="c_0 ~ U[1500, 2500] plus four Gaussians of height U[1000, 2500]",
        width=2600.0,
        frames=16,
    ),
    "Wave-Layer": Medium(
        speed=layered_medium,
        distribution="3..6 layers with wavy interfaces, c ~ U[2000, 5000]",
        width=3500.0,
        frames=21,
    ),
}


def recipe(name: str) -> Recipe:
    """Recipe of one of :data:`MEDIA`."""
    medium = MEDIA[name]
    return Recipe(
        name=name,
        sample=partial(sample, medium),
        parameters={
            "initial": "2..6 Gaussians of height 1, width U[0.039, 0.156], at rest",
            "medium": medium.distribution,
            "pulse_distance": PULSE_DISTANCE,
            "width": medium.width,
            "boundary": "du/dn = -u_t / c",
            "cfl": CFL,
            "scheme": "fourth-order summation by parts, Taylor series of order 4 in time",
        },
        times=tuple(k / (medium.frames - 1) for k in range(medium.frames)),
    )


def sample(medium: Medium, request: SampleRequest) -> dict[str, Tensor]:
    """Fields (B, T, N, N) and wave speeds (B, N, N) of the requested samples, float32 on the device."""
    n = request.resolution
    both_B2NN = draw(request, lambda rng: torch.stack([pulses(rng, n), medium.speed(rng, n)]))
    u_BNN, c_BNN = both_B2NN.unbind(1)
    solver = Wave(c_BNN, medium.width, request.torch_dtype)
    u_BTNN = solver.snapshots(u_BNN, torch.zeros_like(u_BNN), request.times)
    return {"solution": u_BTNN.float(), "c": c_BNN.float()}


def checks() -> list[Check]:
    """Figures about the scheme."""
    return wave_checks.checks()
