"""Acoustic wave equation u_tt = c(x)^2 Lap u on a square with absorbing sides.

Space: fourth-order summation-by-parts operators on the closed grid. The second derivative is D = H^-1 (-M +
boundary derivative) with a diagonal norm H and M symmetric and positive semidefinite; the boundary derivative
is replaced weakly by the first-order absorbing condition du/dn = -u_t / c (Engquist and Majda 1977), which
leaves

    u_tt = c^2 (-H^-1 M u  in x and in y) - c H^-1 u_t  on the sides.

The energy sum H H (u_t / c)^2 / 2 + u M u / 2 therefore never grows, for any c > 0, discontinuous ones
included. Time: the Taylor series of the linear system up to the fourth order.

Shapes: B samples, T snapshots, N grid points per axis.

References:
    Mattsson, Nordstroem 2004, J. Comput. Phys. 199 (operators); Mattsson, Ham, Iaccarino 2009 (weak sides).
"""

from __future__ import annotations

import torch
from torch import Tensor

CFL = 0.5
"""Default c dt / h; the scheme is stable up to about 0.6, where the damping in the corners becomes stiff."""

# Norm and second derivative next to a boundary, for grid width one.
_NORM = (17 / 48, 59 / 48, 43 / 48, 49 / 48)
_CLOSURE = (
    (2.0, -5.0, 4.0, -1.0, 0.0, 0.0),
    (1.0, -2.0, 1.0, 0.0, 0.0, 0.0),
    (-4 / 43, 59 / 43, -110 / 43, 59 / 43, -4 / 43, 0.0),
    (-1 / 49, 0.0, 59 / 49, -118 / 49, 64 / 49, -4 / 49),
)
_SLOPE = (-11 / 6, 3.0, -3 / 2, 1 / 3)


def norm(points: int, width: float = 1.0) -> Tensor:
    """Diagonal of H (N,): the weights of a quadrature that is exact for cubics."""
    weights = torch.ones(points, dtype=torch.float64)
    weights[:4] = torch.tensor(_NORM, dtype=torch.float64)
    weights[-4:] = weights[:4].flip(0)
    return weights * (width / (points - 1))


def stiffness(points: int, width: float = 1.0) -> Tensor:
    """Matrix M (N, N): u M u approximates the integral of (du/dx)^2."""
    second = torch.zeros(points, points, dtype=torch.float64)
    for offset, weight in ((-2, -1 / 12), (-1, 4 / 3), (0, -5 / 2), (1, 4 / 3), (2, -1 / 12)):
        second += torch.diag(torch.full((points - abs(offset),), weight, dtype=torch.float64), offset)
    second[:4] = 0.0
    second[:4, :6] = torch.tensor(_CLOSURE, dtype=torch.float64)
    second[-4:] = second[:4].flip(0, 1)
    outward = torch.zeros_like(second)
    outward[0, :4] = -torch.tensor(_SLOPE, dtype=torch.float64)
    outward[-1] = outward[0].flip(0)
    unit = norm(points, points - 1.0)
    return (outward - unit[:, None] * second) * ((points - 1) / width)


class Wave:
    """Solver for a batch of media.

    Args:
        c_BNN: Wave speeds on the closed grid, positive.
        width: Length of the sides.
        dtype: Precision of the time stepping.
        cfl: c dt over the grid width, with the largest c of each sample.

    Raises:
        ValueError: If a speed is not positive or the grid has fewer than 12 points per axis.
    """

    def __init__(
        self, c_BNN: Tensor, width: float = 1.0, dtype: torch.dtype = torch.float64, cfl: float = CFL
    ) -> None:
        points = c_BNN.shape[-1]
        if points < 12:
            raise ValueError(f"the wave solver needs at least 12 points per axis, got {points}")
        if not bool((c_BNN > 0).all()):
            raise ValueError(f"wave speeds must be positive, got a minimum of {float(c_BNN.min()):g}")
        h_N = norm(points, width)
        self.weights_NN = (h_N[:, None] * h_N).to(c_BNN.device)
        self.stiffness_NN = stiffness(points, width).to(c_BNN.device)
        self.c_BNN = c_BNN.double()
        self.step_B = cfl * width / (points - 1) / self.c_BNN.amax((1, 2))
        side_N = torch.zeros(points, dtype=torch.float64)
        side_N[[0, -1]] = 1.0 / h_N[[0, -1]]
        self._speed2_BNN = (self.c_BNN**2).to(dtype)
        self._damping_BNN = (self.c_BNN * (side_N[:, None] + side_N).to(c_BNN.device)).to(dtype)
        second_NN = -self.stiffness_NN / h_N.to(c_BNN.device)[:, None]
        self._second_BNN = second_NN.to(dtype).expand(len(c_BNN), points, points)

    def snapshots(self, u_BNN: Tensor, v_BNN: Tensor, times: tuple[float, ...]) -> Tensor:
        """Fields (B, T, N, N) at increasing times from u and its rate v at t = 0.

        Every sample takes equal steps of its own between two snapshots; one that needs fewer than the others
        waits with steps of zero, which leave it exactly as it is.
        """
        u_BNN, v_BNN = u_BNN.to(self._speed2_BNN.dtype), v_BNN.to(self._speed2_BNN.dtype)
        frames, now = [], 0.0
        for t in times:
            if t > now:
                u_BNN, v_BNN = self.advance(u_BNN, v_BNN, t - now)
                now = t
            frames.append(u_BNN)
        return torch.stack(frames, dim=1)

    def advance(self, u_BNN: Tensor, v_BNN: Tensor, duration: float) -> tuple[Tensor, Tensor]:
        """Field and rate after a duration."""
        steps_B = torch.ceil(duration / self.step_B)
        for number in range(int(steps_B.max())):
            step_B = torch.where(number < steps_B, duration / steps_B, 0.0)
            u_BNN, v_BNN = self._taylor_step(u_BNN, v_BNN, step_B.to(u_BNN.dtype)[:, None, None])
        return u_BNN, v_BNN

    def _taylor_step(self, u_BNN: Tensor, v_BNN: Tensor, step_B11: Tensor) -> tuple[Tensor, Tensor]:
        """Terms (dt A)^k / k! of the exponential for k = 1..4, with A (u, v) = (v, L u - d v)."""
        du_BNN, dv_BNN = u_BNN, v_BNN
        for k in range(1, 5):
            rate_BNN = torch.bmm(self._second_BNN, du_BNN)
            rate_BNN = torch.baddbmm(rate_BNN, du_BNN, self._second_BNN.mT).mul_(self._speed2_BNN)
            rate_BNN -= self._damping_BNN * dv_BNN
            du_BNN, dv_BNN = dv_BNN * (step_B11 / k), rate_BNN.mul_(step_B11 / k)
            u_BNN, v_BNN = u_BNN + du_BNN, v_BNN + dv_BNN
        return u_BNN, v_BNN

    def energy(self, u_BNN: Tensor, v_BNN: Tensor) -> Tensor:
        """Discrete energy (B,), which sides only take from."""
        u_BNN, v_BNN = u_BNN.double(), v_BNN.double()
        h_N = self.weights_NN.diagonal().sqrt()
        kinetic_B = (self.weights_NN * (v_BNN / self.c_BNN) ** 2).sum((1, 2))
        along_x = (u_BNN * (self.stiffness_NN @ u_BNN) * h_N).sum((1, 2))
        along_y = (u_BNN * (u_BNN @ self.stiffness_NN) * h_N[:, None]).sum((1, 2))
        return 0.5 * (kinetic_B + along_x + along_y)
