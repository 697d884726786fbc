"""Compressible Euler equations in a fixed field of gravity, well balanced for a given equilibrium.

    rho_t + div(rho u) = 0,  (rho u)_t + div(rho u u + p I) = -rho grad phi,
    E_t + div((E + p) u) = -rho u . grad phi.

The scheme is that of ``euler`` applied to deviations from an equilibrium grad p_0 = -rho_0 grad phi that is
known in closed form: slopes are limited on (rho - rho_0, u, v, p - p_0), faces add the exact rho_0 and p_0 of
their centres, and the momentum equation keeps only the difference of what cancels at rest, p - p_0 in the
flux and rho - rho_0 in the source. A state at rest therefore stays at rest to round-off, on any grid.

Shapes: C channels (rho, u, v, p, scalars...), B samples, X and Y cells; axis 2 in front stands for (rho_0,
p_0) or for the components of a vector.

References:
    Kaeppeli, Mishra 2014, J. Comput. Phys. 259; Berberich, Chandrashekar, Klingenberg 2021, Comput. Fluids
    219.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from thalweg.pde.solvers.euler import predict, to_primitive
from thalweg.pde.solvers.finite_volume import GHOSTS as G
from thalweg.pde.solvers.finite_volume import face_states, fill_ghosts, half_slopes, hllc_flux

Field = Callable[[Tensor, Tensor], Tensor]
"""Maps coordinates x (X, 1) and y (1, Y) to a vector field (2, B, X, Y)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GravityEuler:
    """The scheme that :func:`thalweg.pde.solvers.marching.march` drives. Made by :func:`on_square`."""

    gamma: float
    """Ratio of specific heats."""
    rest_2BXY: Tensor
    """Equilibrium (rho_0, p_0) in cells and two rings of ghosts."""
    rest_x_2BXY: Tensor
    """Equilibrium on the X + 1 faces normal to x."""
    rest_y_2BXY: Tensor
    """Equilibrium on the Y + 1 faces normal to y."""
    pull_2BXY: Tensor
    """grad phi in cells and one ring of ghosts."""
    slope_2BXY: Tensor
    """grad rho_0 in cells and one ring of ghosts."""

    def select(self, keep_B: Tensor) -> GravityEuler:
        """Scheme for a subset of the samples."""
        return self._map(lambda field_2BXY, rings: field_2BXY[:, keep_B])

    def tile(self, samples: slice, rows: slice) -> GravityEuler:
        """Scheme for a block of samples and rows of cells along x."""
        return self._map(lambda f_2BXY, extra: f_2BXY[:, samples, rows.start : rows.stop + extra])

    def to(self, device: str) -> GravityEuler:
        """Scheme on a device."""
        return self._map(lambda field_2BXY, rings: field_2BXY.to(device))

    def _map(self, function: Callable[[Tensor, int], Tensor]) -> GravityEuler:
        """Apply a function of (field, rows that the field has beyond the cells) to all fields."""
        return replace(
            self,
            rest_2BXY=function(self.rest_2BXY, 2 * G),
            rest_x_2BXY=function(self.rest_x_2BXY, 1),
            rest_y_2BXY=function(self.rest_y_2BXY, 0),
            pull_2BXY=function(self.pull_2BXY, 2),
            slope_2BXY=function(self.slope_2BXY, 2),
        )

    def prepare(self, q_CBXY: Tensor) -> Tensor:
        """Primitive variables; ghosts continue density and pressure in proportion to the equilibrium.

        A state that is a multiple of the equilibrium is at rest as well, and its continuation is exact.
        """
        c, b, x, y = q_CBXY.shape
        w_CBXY = q_CBXY.new_empty(c, b, x + 2 * G, y + 2 * G)
        inside_CBXY = w_CBXY[..., G:-G, G:-G]
        to_primitive(q_CBXY, self.gamma, out=inside_CBXY)
        ratio_2BXY = torch.empty_like(self.rest_2BXY)
        ratio_2BXY[..., G:-G, G:-G] = inside_CBXY[0:4:3] / self.rest_2BXY[..., G:-G, G:-G]
        fill_ghosts(w_CBXY, "outflow")
        ghosts_2BXY = fill_ghosts(ratio_2BXY, "outflow") * self.rest_2BXY
        ghosts_2BXY[..., G:-G, G:-G] = inside_CBXY[0:4:3]
        w_CBXY[0:4:3] = ghosts_2BXY
        return w_CBXY

    def speed(self, w_CBXY: Tensor) -> Tensor:
        """Largest |u| + |v| + 2c per sample."""
        rho, u, v, p = w_CBXY[:4, :, G:-G, G:-G]
        return (u.abs() + v.abs() + 2.0 * (self.gamma * p / rho).sqrt()).amax(dim=(1, 2))

    def advance(
        self, q_CBXY: Tensor, w_CBXY: Tensor, step_B: Tensor, spacing: float, slope_1BXY: Tensor | None
    ) -> Tensor:
        """Conserved variables after one step; see :class:`thalweg.pde.solvers.marching.Scheme`."""
        step_B11 = step_B.to(q_CBXY.dtype)[:, None, None]
        deviation_CBXY = w_CBXY.clone()
        deviation_CBXY[0:4:3] -= self.rest_2BXY
        hx_CBXY, hy_CBXY = half_slopes(deviation_CBXY, 2), half_slopes(deviation_CBXY, 3)
        if slope_1BXY is not None:
            hx_CBXY, hy_CBXY = hx_CBXY * slope_1BXY, hy_CBXY * slope_1BXY
        half_CBXY = self._half_step(w_CBXY[..., 1:-1, 1:-1], hx_CBXY, hy_CBXY, step_B11, spacing)

        pull_3BXY = self._pull(half_CBXY[..., 1:-1, 1:-1])
        half_CBXY[0:4:3] -= self.rest_2BXY[..., 1:-1, 1:-1]
        change_CBXY = torch.zeros_like(q_CBXY)
        faces = ((2, hx_CBXY, self.rest_x_2BXY), (3, hy_CBXY, self.rest_y_2BXY))
        for axis, slopes_CBXY, rest_2BXY in faces:
            below_CBXY, above_CBXY = face_states(half_CBXY, slopes_CBXY, axis)
            below_CBXY[0:4:3] += rest_2BXY
            above_CBXY[0:4:3] += rest_2BXY
            flux_CBXY = hllc_flux(below_CBXY, above_CBXY, axis, self.gamma)
            flux_CBXY[axis - 1] -= rest_2BXY[1]
            change_CBXY += flux_CBXY.diff(dim=axis)
        change_CBXY[1:4] += pull_3BXY.mul_(spacing)
        return torch.sub(q_CBXY, change_CBXY.mul_(step_B11 / spacing), out=change_CBXY)

    def _half_step(
        self, w_CBXY: Tensor, hx_CBXY: Tensor, hy_CBXY: Tensor, step_B11: Tensor, spacing: float
    ) -> Tensor:
        """Half a step of the primitive equations; slopes are those of the deviation, the rest is exact."""
        half_CBXY = predict(w_CBXY, hx_CBXY, hy_CBXY, step_B11 / spacing, self.gamma)
        rho, u, v = w_CBXY[:3]
        rho_0 = self.rest_2BXY[0, :, 1:-1, 1:-1]
        h = 0.5 * step_B11
        half_CBXY[0] -= (u * self.slope_2BXY[0]).add_(v * self.slope_2BXY[1]).mul_(h)
        half_CBXY[1:3] -= (1.0 - rho_0 / rho).mul_(h) * self.pull_2BXY
        half_CBXY[3] += (u * self.pull_2BXY[0]).add_(v * self.pull_2BXY[1]).mul_(rho_0).mul_(h)
        return half_CBXY

    def _pull(self, w_CBXY: Tensor) -> Tensor:
        """What gravity takes per time: (rho - rho_0) grad phi of momentum and rho u . grad phi of energy."""
        pull_2BXY = self.pull_2BXY[..., 1:-1, 1:-1]
        rate_3BXY = w_CBXY.new_empty(3, *w_CBXY.shape[1:])
        torch.mul(w_CBXY[0] - self.rest_2BXY[0, :, G:-G, G:-G], pull_2BXY, out=rate_3BXY[:2])
        work = (w_CBXY[1] * pull_2BXY[0]).add_(w_CBXY[2] * pull_2BXY[1])
        torch.mul(w_CBXY[0], work, out=rate_3BXY[2])
        return rate_3BXY


def on_square(
    cells: int,
    gamma: float,
    rest: Field,
    pull: Field,
    slope: Field,
    dtype: torch.dtype,
    low: float = -0.5,
    high: float = 0.5,
) -> GravityEuler:
    """Scheme on a square of ``cells`` x ``cells`` cells.

    Args:
        cells: Cells per axis.
        gamma: Ratio of specific heats.
        rest: Equilibrium (rho_0, p_0) by coordinates, with grad p_0 = -rho_0 grad phi.
        pull: grad phi by coordinates.
        slope: grad rho_0 by coordinates.
        dtype: Precision of the time stepping; the fields are evaluated in float64.
        low: Lower end of both axes.
        high: Upper end of both axes.
    """
    width = (high - low) / cells

    def centres(rings: int) -> Tensor:
        return low + width * (torch.arange(-rings, cells + rings, dtype=torch.float64) + 0.5)

    def at(field: Field, x: Tensor, y: Tensor) -> Tensor:
        return field(x[:, None], y[None]).to(dtype)

    faces = low + width * torch.arange(cells + 1, dtype=torch.float64)
    return GravityEuler(
        gamma=gamma,
        rest_2BXY=at(rest, centres(G), centres(G)),
        rest_x_2BXY=at(rest, faces, centres(0)),
        rest_y_2BXY=at(rest, centres(0), faces),
        pull_2BXY=at(pull, centres(1), centres(1)),
        slope_2BXY=at(slope, centres(1), centres(1)),
    )
