"""Rayleigh-Taylor instability on a polytrope, GCE-RT: denser gas lies on a lighter core in a central field.

A gamma = 2 polytrope on [-1/2, 1/2]^2 is in equilibrium in its own field with rho_0(r) = rho_c sin(a r) / (a
r), p_0 = K rho_0^2, phi = -2 K rho_0, a = sqrt(2 pi G / K), K = p_c / rho_c^2. Outside a wavy circle the
density is (1 + A) rho_0, inside (1 - A) rho_0. The pressure is (1 + A) p_0 and (1 - A) p_0 + 2 A p_0(1/4),
hydrostatic on either side and continuous at the circle's mean radius, so that only the wave sets the gas in
motion. T = 5 with 11 snapshots.

Shapes: B samples, T snapshots, six channels (rho, u, v, p, tracer, phi), X and Y cells.

References:
    Kaeppeli, Mishra 2014, section 4.3.3; Herde et al. 2024, appendix on PDEgym.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from thalweg.pde.solvers.euler import to_conserved, to_primitive
from thalweg.pde.solvers.finite_volume import block_average
from thalweg.pde.solvers.gravity import GravityEuler, on_square
from thalweg.pde.solvers.marching import march
from thalweg.pde.solvers.recipes import Check, Recipe, SampleRequest
from thalweg.pde.solvers.seeding import draw, uniform

GAMMA = 2.0
CFL = 0.8
GRAVITY = 1.0
"""The constant G."""

RADIUS = 0.25
"""Mean radius of the border."""

AMPLITUDE = 0.25
"""Largest relative amplitude a of the border's wave; not given in the paper. With this value the velocities
have a standard deviation of 0.014, the released ones of 0.0149."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Polytrope:
    """Stars of a batch; every field has shape (B, 1, 1)."""

    density: Tensor
    """rho_c, density at the centre."""
    pressure: Tensor
    """p_c, pressure at the centre."""

    @property
    def stiffness(self) -> Tensor:
        """K in p = K rho^2."""
        return self.pressure / self.density**2

    def rho(self, x: Tensor, y: Tensor) -> Tensor:
        """Density (B, X, Y)."""
        a = (2.0 * math.pi * GRAVITY / self.stiffness).sqrt()
        return self.density * torch.sinc(a * torch.hypot(x, y) / math.pi)

    def rest(self, x: Tensor, y: Tensor) -> Tensor:
        """Equilibrium (rho_0, p_0)."""
        rho = self.rho(x, y)
        return torch.stack([rho, self.stiffness * rho**2])

    def slope(self, x: Tensor, y: Tensor) -> Tensor:
        """Gradient of rho_0: (rho_c cos(a r) - rho_0) (x, y) / r^2."""
        a = (2.0 * math.pi * GRAVITY / self.stiffness).sqrt()
        r = torch.hypot(x, y)
        # Close to the centre the difference cancels and the series takes over.
        exact = (self.density * torch.cos(a * r) - self.rho(x, y)) / r.clamp_min(1e-4) ** 2
        factor = torch.where(r < 1e-3, -self.density * a**2 / 3.0, exact)
        return torch.stack([factor * x, factor * y])

    def pull(self, x: Tensor, y: Tensor) -> Tensor:
        """Gradient of the potential phi = -2 K rho_0."""
        return -2.0 * self.stiffness * self.slope(x, y)

    def scheme(self, cells: int, dtype: torch.dtype) -> GravityEuler:
        """Scheme that keeps these stars at rest."""
        return on_square(cells, GAMMA, self.rest, self.pull, self.slope, dtype)


def draw_numbers(rng: torch.Generator) -> Tensor:
    """Random numbers (rho_c, p_c, A, a, b) of one sample.

    rho_c = 1 + 0.2 c, p_c = 1 + 0.2 d, A = 0.05 (1 + 0.2 e) with c, d, e ~ U[-1, 1]; the border is
    r = 1/4 (1 + a cos(theta + b)) with a ~ U[-AMPLITUDE, AMPLITUDE] and b ~ U[0, 2 pi].
    """
    c, d, e = uniform(rng, -1, 1, 3)
    a = uniform(rng, -AMPLITUDE, AMPLITUDE)
    b = uniform(rng, 0, 2 * math.pi)
    return torch.stack([1 + 0.2 * c, 1 + 0.2 * d, 0.05 * (1 + 0.2 * e), a, b])


def initial_state(numbers_B5: Tensor, cells: int) -> Tensor:
    """Primitive states (rho, u, v, p, tracer) at t = 0, (5, B, X, Y); the tracer is 1 in the denser gas."""
    rho_c, p_c, atwood, a, b = numbers_B5.T[..., None, None]
    star = Polytrope(density=rho_c, pressure=p_c)
    x = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells - 0.5
    x, y = x[:, None], x[None]
    rho, p = star.rest(x, y)
    dense = torch.hypot(x, y) >= RADIUS * (1.0 + a * torch.cos(torch.atan2(y, x) + b))
    _, p_border = star.rest(torch.tensor(RADIUS), torch.tensor(0.0))
    p = torch.where(dense, (1.0 + atwood) * p, (1.0 - atwood) * p + 2.0 * atwood * p_border)
    rho = torch.where(dense, 1.0 + atwood, 1.0 - atwood) * rho
    return torch.stack([rho, torch.zeros_like(rho), torch.zeros_like(rho), p, dense.double()])


def recipe(name: str, supersample: int = 2) -> Recipe:
    """Recipe of GCE-RT.

    Args:
        name: The set.
        supersample: Cells per axis of the solver for each stored cell; the published data used 2 as well.
    """
    return Recipe(
        name=name,
        sample=partial(sample, supersample),
        parameters={
            "initial": "gamma = 2 polytrope, rho_c, p_c ~ U[0.8, 1.2], Atwood number ~ U[0.04, 0.06]",
            "border": "r = 0.25 (1 + a cos(theta + b))",
            "amplitude": AMPLITUDE,
            "gravitational_constant": GRAVITY,
            "gamma": GAMMA,
            "cfl": CFL,
            "supersample": supersample,
            "scheme": "unsplit MUSCL-Hancock on deviations from equilibrium, MC limiter, HLLC",
            "channels": ["rho", "u", "v", "p", "tracer", "phi"],
        },
        times=tuple(0.5 * k for k in range(11)),
    )


def sample(supersample: int, request: SampleRequest) -> dict[str, Tensor]:
    """Trajectories (B, T, 6, X, Y) of the requested samples, float32 on the request's device."""
    cells = request.resolution * supersample
    numbers_B5 = draw(request, draw_numbers).cpu()
    star = Polytrope(density=numbers_B5[:, :1, None], pressure=numbers_B5[:, 1:2, None])
    scheme = star.scheme(cells, request.torch_dtype).to(request.device)
    w_CBXY = initial_state(numbers_B5, cells).to(request.device, request.torch_dtype)
    q_BTCXY = march(
        scheme,
        to_conserved(w_CBXY, GAMMA),
        request.times,
        spacing=1.0 / cells,
        cfl=CFL,
        store=lambda q_CBXY: block_average(q_CBXY, supersample),
    )
    w_BTCXY = to_primitive(q_BTCXY.movedim(2, 0), GAMMA).movedim(0, 2)
    x = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells - 0.5
    phi_BXY = block_average(-2.0 * star.stiffness * star.rho(x[:, None], x[None]), supersample)
    phi_BT1XY = phi_BXY.to(w_BTCXY)[:, None, None].expand(-1, w_BTCXY.shape[1], 1, -1, -1)
    return {"solution": torch.cat([w_BTCXY, phi_BT1XY], dim=2).float()}


def checks() -> list[Check]:
    """Figures about the scheme."""
    return [
        Check(
            name="largest speed in a polytrope at rest after t = 1, float32, 64^2",
            measure=speed_at_rest,
            expected="0, to round-off",
        )
    ]


def speed_at_rest(cells: int = 64, time: float = 1.0, dtype: torch.dtype = torch.float32) -> float:
    """Largest |u| that a polytrope in equilibrium has picked up."""
    star = Polytrope(density=torch.full((1, 1, 1), 1.1), pressure=torch.full((1, 1, 1), 0.9))
    scheme = star.scheme(cells, dtype)
    rho, p = scheme.rest_2BXY[..., 2:-2, 2:-2]
    w_CBXY = torch.stack([rho, torch.zeros_like(rho), torch.zeros_like(rho), p])
    q_BTCXY = march(
        scheme,
        to_conserved(w_CBXY, GAMMA),
        (time,),
        spacing=1.0 / cells,
        cfl=CFL,
        store=lambda q_CBXY: q_CBXY,
    )
    return float((q_BTCXY[:, :, 1:3] / q_BTCXY[:, :, :1]).abs().max())
