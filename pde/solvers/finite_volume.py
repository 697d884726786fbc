"""Pieces of second-order finite-volume schemes: ghost cells, limited slopes, HLLC fluxes, cell averages.

Shapes: C channels (rho, u, v, p, then any number of advected scalars), B samples, X and Y cells. The channel
axis comes first, so that each field of a batch is one contiguous block. Arrays with ghosts have two on each
side.

References:
    Toro, Spruce, Speares 1994 (HLLC); Toro 2009, Riemann Solvers and Numerical Methods, chapters 10 and 14;
    van Leer 1977 (MC limiter).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Boundary = Literal["periodic", "outflow", "wall"]

GHOSTS = 2
"""Ghost cells on each side: the stencil of limited slopes in the neighbours of a face."""


def fill_ghosts(w_CBXY: Tensor, boundary: Boundary) -> Tensor:
    """Fill the ghost cells of a padded array in place from its interior, and return it.

    ``wall`` mirrors the interior and turns the normal velocity (channel 1 at x walls, 2 at y walls).
    """
    for axis in (2, 3):
        last = w_CBXY.shape[axis] - GHOSTS
        low, high = w_CBXY.narrow(axis, 0, GHOSTS), w_CBXY.narrow(axis, last, GHOSTS)
        if boundary == "periodic":
            low.copy_(w_CBXY.narrow(axis, last - GHOSTS, GHOSTS))
            high.copy_(w_CBXY.narrow(axis, GHOSTS, GHOSTS))
        elif boundary == "outflow":
            low.copy_(w_CBXY.narrow(axis, GHOSTS, 1).expand_as(low))
            high.copy_(w_CBXY.narrow(axis, last - 1, 1).expand_as(high))
        else:
            low.copy_(w_CBXY.narrow(axis, GHOSTS, GHOSTS).flip(axis))
            high.copy_(w_CBXY.narrow(axis, last - GHOSTS, GHOSTS).flip(axis))
            low[axis - 1].neg_()
            high[axis - 1].neg_()
    return w_CBXY


def half_slopes(w_CBXY: Tensor, axis: int) -> Tensor:
    """Half of the MC-limited undivided slope along an axis, in the cells and one ring of ghosts.

    With one-sided differences a and b the monotonized central slope is minmod((a + b) / 2, 2a, 2b). Half of
    it is (a + b) / 4 clamped to [max(a-, b-), min(a+, b+)], where a+ and a- are the positive and negative
    parts; this needs no signs and no branches. Adding or subtracting it never leaves the range of the
    neighbouring values.
    """
    w = w_CBXY.narrow(5 - axis, 1, w_CBXY.shape[5 - axis] - 2)
    n = w.shape[axis] - 2
    diff = w.narrow(axis, 1, n + 1) - w.narrow(axis, 0, n + 1)
    up, down = diff.clamp_min(0.0), diff.clamp_max(0.0)
    high = torch.minimum(up.narrow(axis, 0, n), up.narrow(axis, 1, n))
    low = torch.maximum(down.narrow(axis, 0, n), down.narrow(axis, 1, n))
    quarter = (w.narrow(axis, 2, n) - w.narrow(axis, 0, n)).mul_(0.25)
    return torch.clamp(quarter, low, high)


def face_states(w_CBXY: Tensor, slopes_CBXY: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """States below and above the faces normal to an axis, from cell states and half slopes with one ring."""
    across = 5 - axis
    w = w_CBXY.narrow(across, 1, w_CBXY.shape[across] - 2)
    slopes = slopes_CBXY.narrow(across, 1, w_CBXY.shape[across] - 2)
    n = w.shape[axis] - 1
    below = w.narrow(axis, 0, n) + slopes.narrow(axis, 0, n)
    above = w.narrow(axis, 1, n) - slopes.narrow(axis, 1, n)
    return below, above


def hllc_flux(left_C: Tensor, right_C: Tensor, axis: int, gamma: float) -> Tensor:
    """HLLC flux of the Euler equations through faces normal to an axis (2 for x, 3 for y).

    With the outer speeds clamped to S_L <= 0 <= S_R the fluxes of all four wave patterns are one expression
    in the state K on the upwind side of the contact S*: with g = S* / (S_K - S*) and m = rho_K (S_K - u_K)
    the mass flux is m g, the pressure p* = p_K + m (S* - u_K), and the energy flux g ((S_K - u_K) E_K - p_K
    u_K + S_K p*).

    Args:
        left_C: Primitive states (rho, u, v, p, scalars...) below the faces; any trailing shape.
        right_C: Primitive states above the faces.
        axis: Axis of the normal in the layout C B X Y.
        gamma: Ratio of specific heats.

    Returns:
        Fluxes of (rho, rho u, rho v, E, rho scalars...).
    """
    normal, tangent = axis - 1, 4 - axis
    rho_l, u_l, p_l = left_C[0], left_C[normal], left_C[3]
    rho_r, u_r, p_r = right_C[0], right_C[normal], right_C[3]
    c_l = (p_l / rho_l).mul_(gamma).sqrt_()
    c_r = (p_r / rho_r).mul_(gamma).sqrt_()
    s_l = torch.minimum(u_l - c_l, u_r - c_r).clamp_max_(0.0)
    s_r = torch.maximum(c_l.add_(u_l), c_r.add_(u_r)).clamp_min_(0.0)
    m_l, m_r = (s_l - u_l).mul_(rho_l), (s_r - u_r).mul_(rho_r)
    s = (m_l * u_l).sub_(m_r * u_r).add_(p_r).sub_(p_l).div_(m_l - m_r)

    from_left = s >= 0.0
    k_C = torch.where(from_left, left_C, right_C)
    s_k, m_k = torch.where(from_left, s_l, s_r), torch.where(from_left, m_l, m_r)
    rho, u, v, p = k_C[0], k_C[normal], k_C[tangent], k_C[3]
    g = s / (s_k - s)
    p_star = (s - u).mul_(m_k).add_(p)
    energy = (u * u).add_(v * v).mul_(rho).mul_(0.5).add_(p, alpha=1.0 / (gamma - 1.0))

    flux_C = torch.empty_like(k_C)
    mass = torch.mul(m_k, g, out=flux_C[0])
    torch.mul(mass, s, out=flux_C[normal]).add_(p_star)
    torch.mul(mass, v, out=flux_C[tangent])
    torch.mul(s_k - u, energy, out=flux_C[3]).sub_(p * u).add_(p_star.mul_(s_k)).mul_(g)
    if k_C.shape[0] > 4:
        torch.mul(mass, k_C[4:], out=flux_C[4:])
    return flux_C


def block_average(w_CBXY: Tensor, factor: int) -> Tensor:
    """Average over blocks of ``factor`` x ``factor`` cells: cell averages on the coarser grid."""
    if factor == 1:
        return w_CBXY
    *lead, x, y = w_CBXY.shape
    blocks = w_CBXY.reshape(*lead, x // factor, factor, y // factor, factor)
    return blocks.mean(dim=(-3, -1))
