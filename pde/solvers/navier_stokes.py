"""Incompressible Navier-Stokes on the periodic unit square, Fourier-Galerkin in vorticity form.

    w_t + div(u w) = curl f + D w,    c_t + div(u c) = D c,    u = (d/dy, -d/dx) (-Laplace)^-1 w + mean

D is diagonal in Fourier space: ordinary viscosity -nu |k|^2 plus the spectral viscosity of Tadmor (1989),
-eps_N max(0, |n|^2 - N) with eps_N = 0.05/N and integer wave numbers n, the dissipation of the published
sets. The vorticity form is the curl of the Leray-projected momentum equation: both have the same solutions,
and the velocity is free of divergence by construction. The mean velocity is constant.

The nonlinear term needs only two products besides those of the tracer (Basdevant 1983):
    curl div(u u) = (d_xx - d_yy)(u v) + d_xy (v^2 - u^2).

Shapes: B samples, T snapshots, C = 1 or 2 evolved fields (vorticity, tracer), N points per axis, M = 3N/2,
K = N/2 columns of a spectrum (see ``fourier``).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thalweg.pde.solvers.fourier import SpectralGrid

# Explicit steps stay well inside SSP-RK3's stability interval on the negative real axis, (-2.51, 0).
_DIFFUSION_LIMIT = 1.5


@dataclass(frozen=True, kw_only=True, slots=True)
class NavierStokesConfig:
    """Numbers of the equation and of the scheme."""

    resolution: int
    """Even number N of grid points per axis."""
    hyperviscosity: float = 0.05
    """eps_N N, strength of the spectral hyperviscosity; 0 switches it off."""
    viscosity: float = 0.0
    """Ordinary kinematic viscosity nu."""
    cfl: float = 0.5
    """Time step is cfl / (N max|u|)."""


class NavierStokes:
    """Solver for a batch of initial data; each sample has its own time step.

    Args:
        config: Equation and scheme.
        device: Where to compute.
        dtype: Precision of the time stepping.
    """

    def __init__(
        self,
        config: NavierStokesConfig,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.config = config
        self.grid = grid = SpectralGrid(config.resolution, device, dtype)
        n = config.resolution
        hyper = config.hyperviscosity / n * (grid.n2 - n).clamp(min=0)
        self.damping_NK = -(hyper + config.viscosity * (grid.kx**2 + grid.ky**2))
        # Multipliers are complex because torch would otherwise convert them in every product.
        complex_dtype = torch.complex64 if dtype == torch.float32 else torch.complex128
        self._u_from_w = (1j * grid.ky * grid.inverse_k2).to(complex_dtype)
        self._v_from_w = (-1j * grid.kx * grid.inverse_k2).to(complex_dtype)
        self._dxx_dyy = ((grid.kx**2 - grid.ky**2) * grid.keep).to(complex_dtype)
        self._dxy = (grid.kx * grid.ky * grid.keep).to(complex_dtype)
        self._dx = (-1j * grid.kx).to(complex_dtype)
        self._dy = (-1j * grid.ky * grid.keep).to(complex_dtype)
        self._damping = self.damping_NK.to(complex_dtype)
        self._max_dt = _DIFFUSION_LIMIT / max(float(-self.damping_NK.min()), 1e-30)

    def snapshots(
        self,
        velocity_B2NN: Tensor,
        times: Sequence[float],
        tracer_BNN: Tensor | None = None,
        forcing_2NN: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """Solve from t = times[0] and yield (B, 2 or 3, N, N) at each of the times, in order.

        The velocity is projected onto divergence-free fields first; the first snapshot is the projection.

        Args:
            velocity_B2NN: Velocity at times[0].
            times: Increasing times of the snapshots.
            tracer_BNN: Passive scalar at times[0]; third channel of the result.
            forcing_2NN: Steady body force f(x, y).

        Raises:
            FloatingPointError: If a sample blows up.
        """
        grid = self.grid
        spectrum_B2NK = grid.forward(velocity_B2NN.to(grid.kx))
        mean_B2 = spectrum_B2NK[..., 0, 0].real
        fields = [grid.curl(spectrum_B2NK)]
        if tracer_BNN is not None:
            fields.append(grid.forward(tracer_BNN.to(grid.kx)))
        state_BCNK = torch.stack(fields, dim=1)
        force_NK = None if forcing_2NN is None else grid.curl(grid.forward(forcing_2NN.to(grid.kx)))
        yield self._physical(state_BCNK, mean_B2)
        for start, stop in itertools.pairwise(times):
            state_BCNK = self._integrate(state_BCNK, mean_B2, force_NK, stop - start)
            yield self._physical(state_BCNK, mean_B2)

    def _physical(self, state_BCNK: Tensor, mean_B2: Tensor) -> Tensor:
        """Velocity and tracer on the grid."""
        velocity = self.grid.velocity(state_BCNK[:, 0], mean_B2)
        return self.grid.backward(torch.cat([velocity, state_BCNK[:, 1:]], dim=1))

    def _integrate(self, state_BCNK: Tensor, mean_B2: Tensor, force_NK: Tensor | None, span: float) -> Tensor:
        """Advance every sample by ``span`` in as many steps as it needs; finished ones leave the batch."""
        result_BCNK = torch.empty_like(state_BCNK)
        index_B = torch.arange(len(state_BCNK), device=state_BCNK.device)
        left_B = torch.full((len(state_BCNK),), span, dtype=torch.float64, device=state_BCNK.device)
        burst = 1
        while len(index_B):
            for _ in range(burst):
                state_BCNK, left_B, steps_B = self._step(state_BCNK, mean_B2, force_NK, left_B)
            open_B = steps_B > 0
            pending = _count(steps_B)
            if not bool(open_B.all()):
                result_BCNK[index_B[~open_B]] = state_BCNK[~open_B]
                index_B, state_BCNK = index_B[open_B], state_BCNK[open_B]
                mean_B2, left_B = mean_B2[open_B], left_B[open_B]
            # Asking a GPU for the number of open steps stalls its queue, so all predicted steps are queued.
            burst = pending if state_BCNK.is_cuda else 1
        return result_BCNK

    def _step(
        self, state_BCNK: Tensor, mean_B2: Tensor, force_NK: Tensor | None, left_B: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One step of SSP-RK3 (Shu and Osher 1988) for the samples that have time left.

        Returns the new state, the time left and the number of steps that each sample still needs. The time
        left is cut into equal steps, so the last one is not a splinter.
        """
        slope, speed_B = self._slope(state_BCNK, mean_B2, force_NK)
        limit_B = (self.config.cfl / (self.config.resolution * speed_B.double())).clamp(max=self._max_dt)
        steps_B = torch.ceil(left_B / limit_B * (1 - 1e-12)).clamp(min=1)
        dt_B = left_B / steps_B
        dt = dt_B.to(self.grid.dtype)[:, None, None, None]
        first = state_BCNK + dt * slope
        second = 0.75 * state_BCNK + 0.25 * (first + dt * self._slope(first, mean_B2, force_NK)[0])
        third = (state_BCNK + 2 * (second + dt * self._slope(second, mean_B2, force_NK)[0])) / 3
        active_B = left_B > 0
        state_BCNK = torch.where(active_B[:, None, None, None], third, state_BCNK)
        return state_BCNK, left_B - dt_B, torch.where(active_B, steps_B - 1, 0)

    def _slope(self, state_BCNK: Tensor, mean_B2: Tensor, force_NK: Tensor | None) -> tuple[Tensor, Tensor]:
        """Time derivative of the state, and the largest speed of each sample."""
        vorticity = state_BCNK[:, 0]
        velocity = [vorticity * self._u_from_w, vorticity * self._v_from_w]
        spectra = torch.stack([*velocity, *state_BCNK[:, 1:].unbind(1)], dim=1)
        spectra[:, :2, 0, 0] = mean_B2.to(spectra.dtype)
        physical = self.grid.to_padded(spectra)
        u, v = physical[:, 0], physical[:, 1]
        u2, v2 = u * u, v * v
        products = [u * v, v2 - u2]
        if len(spectra[0]) > 2:
            products += [u * physical[:, 2], v * physical[:, 2]]
        fluxes = self.grid.from_padded(torch.stack(products, dim=1))
        slope = state_BCNK * self._damping
        slope[:, 0] += fluxes[:, 0] * self._dxx_dyy + fluxes[:, 1] * self._dxy
        if force_NK is not None:
            slope[:, 0] += force_NK
        if len(spectra[0]) > 2:
            slope[:, 1] += fluxes[:, 2] * self._dx + fluxes[:, 3] * self._dy
        return slope, (u2 + v2).amax(dim=(-2, -1)).sqrt()


def _count(steps_B: Tensor) -> int:
    """Largest number of open steps; raises if a sample has become NaN or infinite."""
    steps = float(steps_B.max())
    if not math.isfinite(steps):
        bad = torch.nonzero(~torch.isfinite(steps_B)).flatten().tolist()
        raise FloatingPointError(f"Navier-Stokes: samples {bad} of the batch blew up")
    return int(steps)
