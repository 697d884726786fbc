"""Figures about the spectral solvers: orders of convergence, conservation, distance from exact solutions.

The functions are used by the tests and by ``benchmarks/pde_solvers.py``. All compute in float64.

Shapes: B samples, N points per axis, K columns of a spectrum.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from thalweg.pde.solvers import flow_initial, poisson
from thalweg.pde.solvers.allen_cahn import AllenCahn, AllenCahnConfig
from thalweg.pde.solvers.navier_stokes import NavierStokes, NavierStokesConfig
from thalweg.pde.solvers.recipes import Check
from thalweg.pde.solvers.seeding import generator


def checks() -> list[Check]:
    """What the benchmark prints about the spectral families."""
    table: tuple[tuple[str, Callable[[], float], str], ...] = (
        ("Navier-Stokes: slope in time (SSP-RK3)", navier_stokes_order, "3"),
        ("Navier-Stokes: Taylor-Green vortex, relative L2 at t = 0.5", taylor_green, "< 1e-8"),
        ("Navier-Stokes: inviscid energy drift, cfl 0.1", energy_drift, "< 1e-7"),
        ("Navier-Stokes: inviscid enstrophy drift, cfl 0.1", enstrophy_drift, "< 1e-6"),
        ("Navier-Stokes: slope of the energy drift", energy_order, "3"),
        ("Navier-Stokes: largest divergence / gradient", divergence, "round-off"),
        ("Navier-Stokes: drift of the mean tracer", tracer_drift, "round-off"),
        ("Allen-Cahn: slope in time (ETDRK4)", allen_cahn_order, "4"),
        ("Allen-Cahn: distance from the exact constant state", allen_cahn_constant, "< 1e-5"),
        ("Poisson: error for a sine source", poisson_sine, "round-off"),
        ("Poisson: slope in space, Gaussian cut by the wall", poisson_order, "2"),
    )
    return [Check(name=name, measure=measure, expected=expected) for name, measure, expected in table]


def relative_l2(x: Tensor, exact: Tensor) -> float:
    """||x - exact|| / ||exact|| over all entries."""
    return float((x - exact).norm() / exact.norm())


def slope(coarse: float, fine: float, ratio: float) -> float:
    """Order of convergence from two errors whose steps differ by a ratio."""
    return math.log(coarse / fine) / math.log(ratio)


def taylor_green(resolution: int = 32, viscosity: float = 0.02, cfl: float = 0.05) -> float:
    """Error of the drifting Taylor-Green vortex, an exact solution, at t = 0.5.

    u = U + cos a sin b, v = V - sin a cos b times exp(-8 pi^2 nu t), a = 2 pi (x - U t), b = 2 pi (y - V t).
    """
    drift = (0.3, -0.2)

    def exact(t: float) -> Tensor:
        x_N = 2 * math.pi * flow_initial.points(resolution)
        a, b = x_N[:, None] - 2 * math.pi * drift[0] * t, x_N - 2 * math.pi * drift[1] * t
        decay = math.exp(-8 * math.pi**2 * viscosity * t)
        u = drift[0] + decay * a.cos() * b.sin()
        return torch.stack([u, drift[1] - decay * a.sin() * b.cos()])[None]

    config = NavierStokesConfig(resolution=resolution, hyperviscosity=0, viscosity=viscosity, cfl=cfl)
    *_, last = NavierStokes(config).snapshots(exact(0.0), (0.0, 0.5))
    return relative_l2(last, exact(0.5))


def navier_stokes_order() -> float:
    """Slope of the error in the number of steps, viscous flow with tracer and forcing."""

    def run(cfl: float) -> tuple[Tensor, int]:
        solver = CountingNavierStokes(NavierStokesConfig(resolution=32, viscosity=2e-3, cfl=cfl))
        velocity = _smooth_flow(32)
        forcing = flow_initial.kolmogorov_forcing(32)
        *_, last = solver.snapshots(velocity, (0.0, 0.5), velocity[:, 0], forcing)
        return last, solver.steps

    exact, _ = run(0.02)
    (coarse, few), (fine, many) = run(0.4), run(0.2)
    return slope(relative_l2(coarse, exact), relative_l2(fine, exact), many / few)


def invariants(cfl: float, time: float = 0.5) -> tuple[float, float, int]:
    """Relative drift of energy and enstrophy of the inviscid truncated equations, and the number of steps.

    Without viscosity the Galerkin truncation conserves both; only the time stepping changes them.
    """
    solver = CountingNavierStokes(NavierStokesConfig(resolution=32, hyperviscosity=0, cfl=cfl))
    first, last = solver.snapshots(_smooth_flow(32), (0.0, time))

    def measure(velocity_B2NN: Tensor) -> tuple[float, float]:
        grid = solver.grid
        vorticity = grid.backward(grid.curl(grid.forward(velocity_B2NN)))
        return float(velocity_B2NN.square().mean()), float(vorticity.square().mean())

    before, after = measure(first), measure(last)
    return abs(after[0] / before[0] - 1), abs(after[1] / before[1] - 1), solver.steps


def energy_drift() -> float:
    """Relative change of the energy up to t = 0.5 without viscosity."""
    return invariants(0.1)[0]


def enstrophy_drift() -> float:
    """Relative change of the enstrophy up to t = 0.5 without viscosity."""
    return invariants(0.1)[1]


def energy_order() -> float:
    """Slope of the energy drift in the number of steps: all of it is error of the time stepping."""
    (coarse, _, few), (fine, _, many) = invariants(0.4), invariants(0.2)
    return slope(coarse, fine, many / few)


def divergence(resolution: int = 64) -> float:
    """Largest divergence over all snapshots and samples, relative to the largest velocity gradient."""
    solver = NavierStokes(NavierStokesConfig(resolution=resolution))
    grid = solver.grid
    draws = [flow_initial.piecewise_constant(generator(0, "check", i), resolution) for i in range(2)]
    ratio = 0.0
    for snapshot in solver.snapshots(torch.stack(draws), (0.0, 0.1, 0.2)):
        spectrum = grid.forward(snapshot)
        u_x = grid.backward(1j * grid.kx * spectrum[:, 0])
        v_y = grid.backward(1j * grid.ky * spectrum[:, 1])
        ratio = max(ratio, float((u_x + v_y).abs().max() / u_x.abs().max()))
    return ratio


def tracer_drift(resolution: int = 64) -> float:
    """Relative change of the mean tracer up to t = 0.5."""
    solver = NavierStokes(NavierStokesConfig(resolution=resolution))
    tracer = flow_initial.disk(resolution)[None]
    first, last = solver.snapshots(_smooth_flow(resolution), (0.0, 0.5), tracer)
    return abs(float(last[:, 2].mean() / first[:, 2].mean()) - 1)


def allen_cahn_order() -> float:
    """Slope of the error of phase formation in the number of steps."""
    x_N = 2 * math.pi * flow_initial.points(32)
    u_BNN = (0.5 * x_N.sin()[:, None] * x_N.cos() + 0.2)[None]

    def run(steps: int) -> Tensor:
        # max_step is chosen so that the interval takes exactly this many steps.
        span, epsilon = 1e-3, 60.0
        config = AllenCahnConfig(
            resolution=32, epsilon=epsilon, max_step=2 * epsilon**2 * span / (steps - 0.5)
        )
        *_, last = AllenCahn(config).snapshots(u_BNN, (0.0, span))
        return last

    exact = run(256)
    return slope(relative_l2(run(16), exact), relative_l2(run(32), exact), 2)


def allen_cahn_constant() -> float:
    """Error of a spatially constant state with the recipe's step, u' = eps^2 u (1 - u^2)."""
    epsilon, u0, time = 220.0, 0.05, 5e-5
    *_, last = AllenCahn(AllenCahnConfig(resolution=16)).snapshots(torch.full((1, 16, 16), u0), (0.0, time))
    exact = u0 / math.sqrt(u0**2 + (1 - u0**2) * math.exp(-2 * epsilon**2 * time))
    return float((last - exact).abs().max())


def poisson_sine() -> float:
    """Error for -Laplace u = f with u = sin(3 pi x) sin(5 pi y)."""
    x_N = math.pi * torch.linspace(0, 1, 33, dtype=torch.float64)
    u_NN = (3 * x_N).sin()[:, None] * (5 * x_N).sin()
    return relative_l2(poisson.solve(34 * math.pi**2 * u_NN[None])[0], u_NN)


def poisson_order() -> float:
    """Slope in the grid spacing for a Gaussian cut by the boundary, against the integrated sine series."""
    centre_2G = torch.tensor([[0.5], [0.02]], dtype=torch.float64)
    width_G = torch.tensor([0.05], dtype=torch.float64)

    def error(resolution: int) -> float:
        x_N = torch.linspace(0, 1, resolution, dtype=torch.float64)
        bumps = torch.exp(-((x_N - centre_2G[..., None]) ** 2) / (2 * width_G[:, None] ** 2))
        exact = poisson.solve_gaussians(centre_2G, width_G, resolution)
        return relative_l2(poisson.solve((bumps[0].T @ bumps[1])[None])[0], exact)

    return slope(error(65), error(129), 2)


class CountingNavierStokes(NavierStokes):
    """Counts time steps, so that slopes can be taken in the number of steps."""

    steps = 0

    def _step(
        self, state_BCNK: Tensor, mean_B2: Tensor, force_NK: Tensor | None, left_B: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        self.steps += 1
        return super()._step(state_BCNK, mean_B2, force_NK, left_B)


def _smooth_flow(resolution: int) -> Tensor:
    """A few large vortices of unit speed, (1, 2, N, N)."""
    x_N = 2 * math.pi * flow_initial.points(resolution)
    x, y = x_N[:, None], x_N
    vorticity = (x + 0.4).sin() * (2 * y).cos() + 0.5 * (2 * x - y).sin() + 0.3 * (x + 3 * y).cos()
    velocity = flow_initial.velocity_from_vorticity(vorticity)
    return (velocity / velocity.abs().max())[None]
