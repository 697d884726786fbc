"""Compressible Euler equations in two dimensions by second-order finite volumes.

    rho_t + div(rho u) = 0,  (rho u)_t + div(rho u u + p I) = 0,  E_t + div((E + p) u) = 0,
    E = p / (gamma - 1) + rho |u|^2 / 2,  and (rho s)_t + div(rho s u) = 0 for advected scalars s.

MUSCL-Hancock: limited slopes of the primitive variables, half a time step of the primitive equations inside
each cell, one HLLC flux per face and step, no splitting of directions. Against a two-stage Runge-Kutta method
this halves the work at the same order. Slopes are limited to the range of the neighbours, so that
reconstruction keeps density and pressure positive; :func:`thalweg.pde.solvers.marching.march` repeats a step
whose result is not positive with flat states around the offending cells.

Shapes: C channels, B samples, X and Y cells; w holds primitive variables (rho, u, v, p, s...), q conserved
ones (rho, rho u, rho v, E, rho s...).

References:
    van Leer 1984; Toro 2009, chapters 14 and 16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from thalweg.pde.solvers.finite_volume import GHOSTS as G
from thalweg.pde.solvers.finite_volume import (
    Boundary,
    block_average,
    face_states,
    fill_ghosts,
    half_slopes,
    hllc_flux,
)
from thalweg.pde.solvers.marching import march


def to_conserved(w_CBXY: Tensor, gamma: float) -> Tensor:
    """Primitive to conserved variables."""
    rho, u, v, p = w_CBXY[:4]
    q_CBXY = rho * w_CBXY
    q_CBXY[0] = rho
    q_CBXY[3] = p / (gamma - 1.0) + 0.5 * rho * (u * u + v * v)
    return q_CBXY


def to_primitive(q_CBXY: Tensor, gamma: float, out: Tensor | None = None) -> Tensor:
    """Conserved to primitive variables, into ``out`` if given."""
    w_CBXY = torch.empty_like(q_CBXY) if out is None else out
    w_CBXY[0] = q_CBXY[0]
    torch.div(q_CBXY[1:], q_CBXY[0], out=w_CBXY[1:])
    kinetic = (q_CBXY[1] * w_CBXY[1]).add_(q_CBXY[2] * w_CBXY[2])
    torch.sub(q_CBXY[3], kinetic, alpha=0.5, out=w_CBXY[3]).mul_(gamma - 1.0)
    return w_CBXY


def predict(w_CBXY: Tensor, hx_CBXY: Tensor, hy_CBXY: Tensor, ratio_B11: Tensor, gamma: float) -> Tensor:
    """Advance cell states by half a step with the primitive equations, w_t = -A(w) w_x - B(w) w_y.

    Args:
        w_CBXY: Cell states.
        hx_CBXY: Half of the undivided x slopes; half the step times the slope is ``ratio`` times this.
        hy_CBXY: Half of the undivided y slopes.
        ratio_B11: Time step over cell width, per sample.
        gamma: Ratio of specific heats.
    """
    rho, u, v, p = w_CBXY[:4]
    change_CBXY = (u * hx_CBXY).add_(v * hy_CBXY)
    divergence = hx_CBXY[1] + hy_CBXY[2]
    change_CBXY[0] += rho * divergence
    change_CBXY[1] += hx_CBXY[3] / rho
    change_CBXY[2] += hy_CBXY[3] / rho
    change_CBXY[3] += divergence.mul_(p).mul_(gamma)
    return torch.sub(w_CBXY, change_CBXY.mul_(ratio_B11), out=change_CBXY)


@dataclass(frozen=True, kw_only=True, slots=True)
class Euler:
    """The scheme that :func:`march` drives."""

    gamma: float = 1.4
    """Ratio of specific heats."""
    boundary: Boundary = "periodic"
    """What lies outside the domain, the same on all sides."""

    def select(self, keep_B: Tensor) -> Euler:
        """Scheme for a subset of the samples: the same."""
        return self

    def tile(self, samples: slice, rows: slice) -> Euler:
        """Scheme for a block of cells: the same."""
        return self

    def prepare(self, q_CBXY: Tensor) -> Tensor:
        """Primitive variables with filled ghost cells."""
        c, b, x, y = q_CBXY.shape
        w_CBXY = q_CBXY.new_empty(c, b, x + 2 * G, y + 2 * G)
        to_primitive(q_CBXY, self.gamma, out=w_CBXY[..., G:-G, G:-G])
        return fill_ghosts(w_CBXY, self.boundary)

    def speed(self, w_CBXY: Tensor) -> Tensor:
        """Largest |u| + |v| + 2c per sample; the CFL number refers to the sum over directions."""
        rho, u, v, p = w_CBXY[:4, :, G:-G, G:-G]
        sound = (p / rho).mul_(self.gamma).sqrt_()
        # |u| + |v| first: a transposed field then has exactly the same time step.
        return u.abs().add_(v.abs()).add_(sound.mul_(2.0)).amax(dim=(1, 2))

    def advance(
        self, q_CBXY: Tensor, w_CBXY: Tensor, step_B: Tensor, spacing: float, slope_1BXY: Tensor | None
    ) -> Tensor:
        """Conserved variables after one step; see :class:`thalweg.pde.solvers.marching.Scheme`."""
        ratio_B11 = (step_B / spacing).to(q_CBXY.dtype)[:, None, None]
        hx_CBXY, hy_CBXY = half_slopes(w_CBXY, 2), half_slopes(w_CBXY, 3)
        if slope_1BXY is not None:
            hx_CBXY, hy_CBXY = hx_CBXY * slope_1BXY, hy_CBXY * slope_1BXY
        half_CBXY = predict(w_CBXY[..., 1:-1, 1:-1], hx_CBXY, hy_CBXY, ratio_B11, self.gamma)
        change_CBXY = torch.zeros_like(q_CBXY)
        for axis, slopes_CBXY in ((2, hx_CBXY), (3, hy_CBXY)):
            below_CBXY, above_CBXY = face_states(half_CBXY, slopes_CBXY, axis)
            flux_CBXY = hllc_flux(below_CBXY, above_CBXY, axis, self.gamma)
            change_CBXY += flux_CBXY.diff(dim=axis)
        return torch.sub(q_CBXY, change_CBXY.mul_(ratio_B11), out=change_CBXY)


def solve(
    w_BCXY: Tensor,
    times: tuple[float, ...],
    *,
    gamma: float = 1.4,
    boundary: Boundary = "periodic",
    width: float = 1.0,
    cfl: float = 0.8,
    downsample: int = 1,
) -> Tensor:
    """Evolve primitive states and return conserved variables at given times.

    Args:
        w_BCXY: Initial primitive variables (rho, u, v, p, scalars...), values at cell centres.
        times: Times of the snapshots, increasing; the initial state belongs to t = 0.
        gamma: Ratio of specific heats.
        boundary: ``periodic``, ``outflow`` or ``wall``.
        width: Length of the domain along x; cells are square.
        cfl: Time step times (|u| + |v| + 2c) over the cell width.
        downsample: Snapshots are averages over blocks of this many cells per axis.

    Returns:
        Conserved variables (B, T, C, X / downsample, Y / downsample).

    Raises:
        ValueError: If the initial density or pressure is not positive.
    """
    return march(
        Euler(gamma=gamma, boundary=boundary),
        to_conserved(w_BCXY.transpose(0, 1).contiguous(), gamma),
        times,
        spacing=width / w_BCXY.shape[2],
        cfl=cfl,
        store=lambda q_CBXY: block_average(q_CBXY, downsample),
    )
