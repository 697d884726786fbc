"""Figures about the Euler scheme: order of convergence, distance from exact solutions, conservation, speed.

The functions are used by the tests and by ``benchmarks/pde_solvers.py``.

Shapes: B samples, T snapshots, C channels (rho, u, v, p) or conserved ones, X and Y cells.
"""

from __future__ import annotations

import math
import time

import torch
from scipy.optimize import brentq
from torch import Tensor

from thalweg.pde.solvers.euler import solve, to_primitive
from thalweg.pde.solvers.euler_initial import centres, quadrants
from thalweg.pde.solvers.recipes import Check
from thalweg.pde.solvers.seeding import generator

GAMMA = 1.4

State = tuple[float, float, float]
"""Density, velocity and pressure on one side of a Riemann problem in one dimension."""

SOD: tuple[State, State] = ((1.0, 0.0, 1.0), (0.125, 0.0, 0.1))


def checks() -> list[Check]:
    """What the benchmark prints about the compressible families."""
    return [
        Check(name="Euler: slope, diagonal density wave", measure=density_wave_order, expected="2"),
        Check(name="Euler: slope, isentropic vortex", measure=vortex_order, expected="2 or more"),
        Check(name="Euler: Sod density, L1 at t = 0.2, 400 cells", measure=sod_error, expected="< 2e-3"),
        Check(name="Euler: drift of mass, momentum, energy", measure=conservation, expected="round-off"),
        Check(name="Euler: seconds per CE-RP trajectory, 64^2", measure=seconds, expected="timing"),
        Check(name="Euler: the same, 128^2", measure=lambda: seconds(128), expected="timing"),
    ]


def density_wave(cells: int) -> float:
    """L1 error of the density 1 + 0.2 sin 2 pi (x + y), advected once around the unit square with (1, 1)."""
    x = torch.linspace(0, 1, cells + 1, dtype=torch.float64)
    # Exact averages over cells: the sine's integral in each direction shrinks it by a sinc.
    shrink = math.sin(math.pi / cells) / (math.pi / cells)
    phase_XY = 2 * math.pi * (x[:-1, None] + x[:-1] + 1 / cells)
    rho_XY = 1 + 0.2 * shrink**2 * torch.sin(phase_XY)
    one = torch.ones_like(rho_XY)
    q_BTCXY = solve(torch.stack([rho_XY, one, one, one])[None], (1.0,))
    return float((q_BTCXY[0, 0, 0] - rho_XY).abs().mean())


def density_wave_order() -> float:
    """Slope of :func:`density_wave` between 32 and 64 cells."""
    return math.log2(density_wave(32) / density_wave(64))


def vortex(cells: int) -> float:
    """L1 error of the density of an isentropic vortex that drifts by (1/2, 1/4) over a periodic square.

    (u, v) = (2, 1) + b / (2 pi) exp((1 - r^2) / 2) (-y, x), rho = T^(1 / (gamma - 1)), p = rho T and
    T = 1 - (gamma - 1) b^2 / (8 gamma pi^2) exp(1 - r^2) in the square [-5, 5]^2, with b = 5.
    """
    width, beta, drift, t = 10.0, 5.0, (2.0, 1.0), 2.5

    def state(shift: tuple[float, float]) -> Tensor:
        axes = [(width * (centres(cells) - s / width) % width) - width / 2 for s in shift]
        x_XY, y_XY = torch.meshgrid(*axes, indexing="ij")
        swirl_XY = beta / (2 * math.pi) * torch.exp((1 - x_XY**2 - y_XY**2) / 2)
        heat_XY = 1 - (GAMMA - 1) / (2 * GAMMA) * swirl_XY**2
        rho_XY = heat_XY ** (1 / (GAMMA - 1))
        u_XY, v_XY = drift[0] - swirl_XY * y_XY, drift[1] + swirl_XY * x_XY
        return torch.stack([rho_XY, u_XY, v_XY, rho_XY * heat_XY])

    q_BTCXY = solve(state((0.0, 0.0))[None], (t,), width=width)
    exact_CXY = state((drift[0] * t, drift[1] * t))
    return float((q_BTCXY[0, 0, 0] - exact_CXY[0]).abs().mean())


def vortex_order() -> float:
    """Slope of :func:`vortex` between 64 and 128 cells."""
    return math.log2(vortex(64) / vortex(128))


def exact_riemann(left: State, right: State, speed: Tensor) -> Tensor:
    """Exact solution (rho, u, p) of a Riemann problem at x/t = ``speed`` without vacuum (Toro 2009, 4)."""

    def outer(state: State, p: float) -> float:
        """Velocity change through the outer wave that connects a state with pressure p."""
        rho, _, p_k = state
        if p > p_k:
            a, b = 2 / ((GAMMA + 1) * rho), (GAMMA - 1) / (GAMMA + 1) * p_k
            return (p - p_k) * math.sqrt(a / (p + b))
        sound = math.sqrt(GAMMA * p_k / rho)
        return 2 * sound / (GAMMA - 1) * ((p / p_k) ** ((GAMMA - 1) / (2 * GAMMA)) - 1)

    gap = right[1] - left[1]
    p_star = brentq(lambda p: outer(left, p) + outer(right, p) + gap, 1e-8, 1e3, xtol=1e-14)
    u_star = 0.5 * (left[1] + right[1] + outer(right, p_star) - outer(left, p_star))
    below = _side(left, p_star, u_star, speed)
    # The right half is the mirror image of a left half.
    above = _side((right[0], -right[1], right[2]), p_star, -u_star, -speed)
    above[1].neg_()
    return torch.where(speed < u_star, below, above)


def _side(state: State, p_star: float, u_star: float, speed: Tensor) -> Tensor:
    """Solution left of the contact."""
    rho, u, p = state
    sound, ratio = math.sqrt(GAMMA * p / rho), p_star / p
    g = (GAMMA - 1) / (GAMMA + 1)
    constant = torch.tensor(state, dtype=speed.dtype)[:, None]
    if ratio > 1:
        shock = u - sound * math.sqrt((ratio + g) / (1 + g))
        star = (rho * (ratio + g) / (g * ratio + 1), u_star, p_star)
        after = torch.tensor(star, dtype=speed.dtype)[:, None]
        return torch.where(speed < shock, constant, after)
    star = (rho * ratio ** (1 / GAMMA), u_star, p_star)
    after = torch.tensor(star, dtype=speed.dtype)[:, None]
    tail = u_star - sound * ratio ** ((GAMMA - 1) / (2 * GAMMA))
    fan_c = (1 - g) * sound + g * (u - speed)
    scale = (fan_c / sound).clamp_min(1e-12) ** (2 / (GAMMA - 1))
    fan = torch.stack([rho * scale, fan_c + speed, p * scale**GAMMA])
    return torch.where(speed < u - sound, constant, torch.where(speed > tail, after, fan))


def sod(cells: int, t: float = 0.2) -> tuple[Tensor, Tensor]:
    """Computed and exact (rho, u, p) of Sod's shock tube along x at time t, (3, X) each."""
    x = centres(cells)
    states = torch.tensor([[rho, u, 0.0, p] for rho, u, p in SOD], dtype=torch.float64)
    # A strip of four cells across is enough: nothing depends on y.
    w_CXY = states[(x >= 0.5).long()].T[..., None].expand(4, cells, 4)
    q_BTCXY = solve(w_CXY[None], (t,), boundary="outflow")
    computed = to_primitive(q_BTCXY[0, 0], GAMMA)[[0, 1, 3], :, 0]
    return computed, exact_riemann(*SOD, (x - 0.5) / t)


def sod_error() -> float:
    """L1 error of the density with 400 cells."""
    computed, exact = sod(400)
    return float((computed[0] - exact[0]).abs().mean())


def conservation(cells: int = 64, dtype: torch.dtype = torch.float64) -> float:
    """Largest drift of mass, momentum and energy over CE-RP trajectories, relative to the sum of moduli."""
    w_BCXY = torch.stack([quadrants(generator(0, "CE-RP", i), cells) for i in range(2)]).to(dtype)
    q_BTCXY = solve(w_BCXY, (0.0, 0.5, 1.0)).double()
    total = q_BTCXY.sum((-1, -2))
    size = q_BTCXY.abs().sum((-1, -2))
    return float(((total - total[:, :1]).abs() / size).max())


def seconds(cells: int = 64, batch: int = 8) -> float:
    """CPU seconds per CE-RP trajectory with 21 snapshots, solved on the stored grid in float32."""
    w_BCXY = torch.stack([quadrants(generator(0, "CE-RP", i), cells) for i in range(batch)]).float()
    start = time.process_time()
    solve(w_BCXY, tuple(0.05 * k for k in range(21)))
    return (time.process_time() - start) / batch
