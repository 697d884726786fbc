"""Initial data of the periodic compressible sets CE-* (Herde et al. 2024, appendix on PDEgym).

Every function draws one sample from its generator and evaluates it at the centres of N x N cells of the unit
square, x along the first axis. The draws do not depend on N, so a sample looks the same at every resolution.
What the paper leaves open, or where its text cannot be what was released, is a constant with its reason here.

Shapes: primitive states (4, N, N) = (rho, u, v, p), float64 on the CPU.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from thalweg.pde.solvers.flow_initial import gaussian_vortices
from thalweg.pde.solvers.seeding import uniform

TWO_PI = 2 * math.pi

Range = tuple[float, float]

CURVED_MODES = 2
"""p of CE-CRP, the modes per direction that bend the interfaces; not given in the paper."""

UNCERTAIN_MODES = 2
"""p of CE-RPUI; not given. Wave numbers are 1 + 2 p^2 .. p + 2 p^2, so 9 and 10, which 64 cells resolve."""

LAYER_MODES = 10
"""Modes of each interface of CE-KH; not given in the paper."""

UNCERTAIN_STATES: tuple[Range, Range, Range, Range] = ((1.0, 3.0), (-1.0, 1.0), (-1.0, 1.0), (1.0, 1.4))
"""Ranges of (rho, u, v, p) in CE-RPUI. The text has u, v in [-10, 10] and p in [5, 7], but the released data
are normalised with a mean pressure of 1.33 and velocities of 0.39: about a tenth and a fifth of the text."""

QUADRANT_STATES: tuple[Range, Range, Range, Range] = ((0.1, 1.0), (-1.0, 1.0), (-1.0, 1.0), (0.1, 1.0))
"""Ranges of (rho, u, v, p) in CE-RP and CE-CRP."""


def centres(resolution: int) -> Tensor:
    """Coordinates (i + 1/2)/N of cell centres (N,)."""
    return (torch.arange(resolution, dtype=torch.float64) + 0.5) / resolution


def four_states(rng: torch.Generator, ranges: tuple[Range, Range, Range, Range]) -> Tensor:
    """Four constant states drawn from ranges of (rho, u, v, p): (4 variables, 2, 2 places)."""
    return torch.stack([uniform(rng, low, high, 2, 2) for low, high in ranges])


def assign(states_422: Tensor, x_NN: Tensor, y_NN: Tensor) -> Tensor:
    """States by place: the fractional parts of x and y below or above one half."""
    return states_422[:, ((x_NN % 1) >= 0.5).long(), ((y_NN % 1) >= 0.5).long()]


def quadrants(rng: torch.Generator, resolution: int) -> Tensor:
    """CE-RP: constant states in the four quadrants; rho, p ~ U[0.1, 1], u, v ~ U[-1, 1]."""
    x = centres(resolution)
    states = four_states(rng, QUADRANT_STATES)
    return assign(states, *torch.meshgrid(x, x, indexing="ij"))


def bent_quadrants(
    rng: torch.Generator,
    resolution: int,
    states: tuple[Range, Range, Range, Range],
    modes: int,
    offset: int,
    amplitude: float,
) -> Tensor:
    """Four states on places bounded by bent lines.

    A point belongs to the place that x + sx and y + sy fall into, where sx and sy are independent sums of
    a_ij sin(2 pi ((i + m) x + (j + m) y + b_ij)) over i, j = 1..p with a ~ U[-A, A] and b ~ U[0, 1]. The
    factor 2 pi applies to the whole phase, so that the lines are periodic in y as well.

    Args:
        rng: Generator of the sample.
        resolution: Cells per axis.
        states: Ranges of (rho, u, v, p).
        modes: Number p of modes per direction.
        offset: The wave number shift m.
        amplitude: The largest coefficient A.
    """
    values = four_states(rng, states)
    x = centres(resolution)
    wave = torch.arange(1, modes + 1, dtype=torch.float64) + offset
    shifts = []
    for _ in range(2):
        a_IJ = uniform(rng, -amplitude, amplitude, modes, modes)
        b_IJ = uniform(rng, 0, 1, modes, modes)
        along_x = TWO_PI * (wave[:, None, None] * x + b_IJ[..., None])
        along_y = TWO_PI * wave[:, None] * x
        # sin(s + t) = sin s cos t + cos s sin t keeps the sum separable.
        shifts.append(
            torch.einsum("ij,ijx,jy->xy", a_IJ, along_x.sin(), along_y.cos())
            + torch.einsum("ij,ijx,jy->xy", a_IJ, along_x.cos(), along_y.sin())
        )
    return assign(values, x[:, None] + shifts[0], x + shifts[1])


def curved_quadrants(rng: torch.Generator, resolution: int) -> Tensor:
    """CE-CRP: the states of CE-RP on places with curved borders, a ~ U[-0.1, 0.1]."""
    return bent_quadrants(rng, resolution, QUADRANT_STATES, modes=CURVED_MODES, offset=0, amplitude=0.1)


def uncertain_interfaces(rng: torch.Generator, resolution: int) -> Tensor:
    """CE-RPUI: places with finely rippled borders, a ~ U[-0.01, 0.01], wave numbers shifted by 2 p^2."""
    p = UNCERTAIN_MODES
    return bent_quadrants(rng, resolution, UNCERTAIN_STATES, modes=p, offset=2 * p * p, amplitude=0.01)


def shear_layers(rng: torch.Generator, resolution: int) -> Tensor:
    """CE-KH: a heavy layer, 0.25 + s_0(x) <= y <= 0.75 + s_1(x), that slides against its surroundings.

    s = 0.05 sum_j a_j cos(2 pi j (x + b_j)) / sum_j a_j, a, b ~ U[0, 1]; (rho, u, v, p) = (2, -0.5, 0, 2.5)
    inside and (1, 0.5, 0, 2.5) outside.
    """
    x = centres(resolution)
    mode = torch.arange(1, LAYER_MODES + 1, dtype=torch.float64)[:, None]
    borders = []
    for level in (0.25, 0.75):
        a, b = uniform(rng, 0, 1, LAYER_MODES, 1), uniform(rng, 0, 1, LAYER_MODES, 1)
        ripple_N = (a * torch.cos(TWO_PI * mode * (x + b))).sum(0) / a.sum()
        borders.append(level + 0.05 * ripple_N[:, None])
    inside = ((x >= borders[0]) & (x <= borders[1])).double()
    return torch.stack([1.0 + inside, 0.5 - inside, 0.0 * inside, 2.5 + 0.0 * inside])


def vortices(rng: torch.Generator, resolution: int) -> Tensor:
    """CE-Gauss: the velocity of NS-Gauss in a light gas at rest, rho = 0.1 and p = 2.5."""
    u, v = gaussian_vortices(rng, resolution)
    return torch.stack([torch.full_like(u, 0.1), u, v, torch.full_like(u, 2.5)])
