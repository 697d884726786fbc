"""Figures about the wave solver: order of convergence, energy, reflection at the absorbing sides.

The functions are used by the tests and by ``benchmarks/pde_solvers.py``.

Shapes: N points per axis; samples come one at a time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from thalweg.pde.solvers.recipes import Check
from thalweg.pde.solvers.wave_solver import Wave


def checks() -> list[Check]:
    """What the benchmark prints about the wave sets."""
    return [
        Check(name="Wave: slope, travelling pulse", measure=travelling_pulse_order, expected="4"),
        Check(name="Wave: energy lost before the sides are reached", measure=early_loss, expected="< 1e-4"),
        Check(
            name="Wave: reflected amplitude, normal incidence", measure=plane_reflection, expected="< 0.01"
        ),
        Check(name="Wave: reflected amplitude, round pulse", measure=round_reflection, expected="< 0.1"),
    ]


def travelling_pulse(resolution: int, time: float = 0.3) -> float:
    """Largest error of d'Alembert's solution u = f(x - t) for a Gaussian f, along the middle line y = 1/2.

    The sides y = 0 and y = 1 disturb the plane wave but are too far away to be felt there for t < 1/2.
    """
    x = torch.linspace(0, 1, resolution, dtype=torch.float64)
    u_BNN, v_BNN = plane_pulse(x)
    u_BNN, _ = Wave(torch.ones_like(u_BNN)).advance(u_BNN, v_BNN, time)
    return float((u_BNN[0, :, resolution // 2] - _profile(x - time)).abs().max())


def travelling_pulse_order() -> float:
    """Slope of :func:`travelling_pulse` between 65 and 129 points."""
    return math.log2(travelling_pulse(65) / travelling_pulse(129))


def plane_pulse(x: Tensor) -> tuple[Tensor, Tensor]:
    """Field and rate (1, N, N) of a plane pulse that starts at x = 0.3 and runs towards x = 1."""
    f_N = _profile(x)
    # u_t = -f' for u = f(x - t).
    v_N = (x - 0.3) / 0.06**2 * f_N
    return f_N[None, :, None].repeat(1, 1, len(x)), v_N[None, :, None].repeat(1, 1, len(x))


def _profile(x: Tensor) -> Tensor:
    return torch.exp(-((x - 0.3) ** 2) / (2 * 0.06**2))


def early_loss(resolution: int = 128, time: float = 0.2) -> float:
    """Relative energy lost by a round pulse in the middle that has not reached the sides yet."""
    x = torch.linspace(0, 1, resolution, dtype=torch.float64)
    u_BNN = round_pulse(x, 0.0)
    solver = Wave(torch.ones_like(u_BNN))
    start = solver.energy(u_BNN, torch.zeros_like(u_BNN))
    u_BNN, v_BNN = solver.advance(u_BNN, torch.zeros_like(u_BNN), time)
    return float(1 - solver.energy(u_BNN, v_BNN) / start)


def round_pulse(x: Tensor, middle: float) -> Tensor:
    """Gaussian (1, N, N) of width 0.05 around a point of the diagonal, 0.5 + ``middle``."""
    g_N = torch.exp(-((x - 0.5 - middle) ** 2) / (2 * 0.05**2))
    return (g_N[:, None] * g_N)[None]


def plane_reflection(resolution: int = 129) -> float:
    """Largest |u| that a plane pulse of height 1 leaves behind when it has met the side x = 1.

    From x = 0.8 it meets the side at t = 0.2, and its echo would be at x = 0.75 at t = 0.45. The other sides
    disturb a plane wave; on the middle line y = 1/2 they are not felt for t < 1/2.
    """
    x = torch.linspace(0, 1, resolution, dtype=torch.float64)
    u_BNN, v_BNN = plane_pulse(x - 0.5)
    u_BNN, _ = Wave(torch.ones_like(u_BNN)).advance(u_BNN, v_BNN, 0.45)
    return float(u_BNN[0, :, resolution // 2].abs().max())


def round_reflection(resolution: int = 97, time: float = 0.9) -> float:
    """Reflected part of a round pulse from the middle, relative to the wave when it met the sides.

    The reference is the same pulse on a square twice as large, whose echo comes later. Sides met at an angle
    theta reflect (1 - cos theta) / (1 + cos theta), 0.17 in the corners.
    """
    small, big = (torch.linspace(0, k, k * (resolution - 1) + 1, dtype=torch.float64) for k in (1, 2))
    echo, met = _fields(small, 0.0, 1.0, (0.5, time)), _fields(big, 0.5, 2.0, (0.5, time))
    inset = slice((resolution - 1) // 2, (resolution - 1) // 2 + resolution)
    return float((echo[1] - met[1][inset, inset]).abs().max() / met[0][inset, inset].abs().max())


def _fields(x: Tensor, middle: float, width: float, times: tuple[float, ...]) -> Tensor:
    """Snapshots (T, N, N) of a round pulse in a square of unit speed."""
    u_BNN = round_pulse(x, middle)
    return Wave(torch.ones_like(u_BNN), width).snapshots(u_BNN, torch.zeros_like(u_BNN), times)[0]
