"""Richtmyer-Meshkov instability, CE-RM: a circular shock runs into a denser disk with a wavy border.

Scheme and periodic boundary are those of the other compressible sets; T = 2 with 21 snapshots. The published
data were made with a different code; their mean density of 1.196 is the 1 + pi/16 of a unit square with that
disk.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from thalweg.pde.solvers import euler_recipes
from thalweg.pde.solvers.euler_initial import centres
from thalweg.pde.solvers.recipes import Check, Recipe
from thalweg.pde.solvers.seeding import uniform

MODES = 10
"""Modes of the border."""

AMPLITUDE = 0.06
"""epsilon, the largest deviation of the border from its radius 1/4; not given in the paper."""


def imploding_shock(rng: torch.Generator, resolution: int) -> Tensor:
    """Primitive states (4, N, N): a pressure of 20 at the centre and a density of 2 inside a wavy circle.

    p = 20 for r < 0.1 and rho = 2 inside the circle, both 1 elsewhere, at rest; r is the distance from the
    centre (1/2, 1/2). The circle has radius 1/4 + epsilon sum_n a_n cos(n theta + b_n) / sum_n a_n with
    n = 1..10, a ~ U[0, 1] and b ~ U[0, 2 pi].
    """
    x = centres(resolution) - 0.5
    x_NN, y_NN = torch.meshgrid(x, x, indexing="ij")
    radius_NN, angle_NN = torch.hypot(x_NN, y_NN), torch.atan2(y_NN, x_NN)
    mode = torch.arange(1, MODES + 1, dtype=torch.float64)[:, None, None]
    a, b = uniform(rng, 0, 1, MODES, 1, 1), uniform(rng, 0, 2 * math.pi, MODES, 1, 1)
    ripple_NN = (a * torch.cos(mode * angle_NN + b)).sum(0) / a.sum()
    density = 1.0 + (radius_NN < 0.25 + AMPLITUDE * ripple_NN).double()
    pressure = 1.0 + 19.0 * (radius_NN < 0.1).double()
    still = torch.zeros_like(density)
    return torch.stack([density, still, still, pressure])


GAS = euler_recipes.Gas(
    initial=imploding_shock,
    parameters={
        "initial": "p = 20 in r < 0.1, rho = 2 inside a wavy circle of radius 1/4, both 1 elsewhere",
        "modes": MODES,
        "epsilon": AMPLITUDE,
    },
    variable="solution",
    times=tuple(round(0.1 * k, 1) for k in range(21)),
)


def recipe(name: str, supersample: int = 2) -> Recipe:
    """Recipe of CE-RM; ``supersample`` as for the other compressible sets."""
    return euler_recipes.build(name, GAS, supersample)


def checks() -> list[Check]:
    """Figures about the scheme: those of the other compressible sets."""
    return euler_recipes.checks()
