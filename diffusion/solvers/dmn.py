"""Nodes that minimise an a-priori bound on a multistep solver's error (Xue et al. 2024, arXiv 2402.17376).

In data prediction step i adds sum_j w_ij x0(lambda_j) to x / sigma, with w_ij the integral of e^lambda
l_ij(lambda) from lambda_i to lambda_{i+1} and l_ij the Lagrange polynomials over the last few nodes. If the
prediction at node j is off by about e(lambda_j), the result is off by at most sum_j |sum_i w_ij| e(lambda_j).
No network is called: e is sigma^2 / alpha for latents or sigma / alpha for pixels, at the variance preserving
alpha and sigma of lambda.

Taken literally, that bound is made small by steps whose weights cancel: a first step of half the range, and
the rest crowded at the end. Hence the steps below full order, at both ends, count by themselves, as in the
authors' code.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

Array = NDArray[np.float64]
ErrorModel = Literal["latent", "pixel"]

_POINTS, _WEIGHTS = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(12))


def step_weights(lam: Tensor, order: int = 3) -> Tensor:
    """Weights of the data predictions in the steps of a multistep solver: (i, k) is w_ij for j = i - k.

    Step i has order min(order, i + 1, N - i), so that it starts and ends with first order. The integrals are
    taken by Gauss's rule with twelve points, since closed forms cancel for short steps.

    Args:
        lam: N + 1 rising values of lambda in float64.
        order: Largest order.

    Returns:
        N rows of ``order`` numbers; row i sums to e^lambda_{i+1} - e^lambda_i.
    """
    orders = _orders(len(lam) - 1, order)
    w = lam.new_zeros(len(orders), order)
    for m in sorted(set(orders.tolist())):
        steps = (orders == m).nonzero()[:, 0]
        half = (lam[steps + 1] - lam[steps])[:, None] / 2
        y = lam[steps, None] + half * (1 + _POINTS)
        for k in range(m):
            integrand = half * _WEIGHTS * y.exp()
            for other in set(range(m)) - {k}:
                away = (lam[steps - k] - lam[steps - other])[:, None]
                integrand = integrand * (y - lam[steps - other, None]) / away
            w[steps, k] = integrand.sum(-1)
    return w


def error_bound(lam: Tensor, order: int = 3, error: ErrorModel = "latent") -> Tensor:
    """Bound on the error of the result for N + 1 rising nodes, one number.

    Args:
        lam: N + 1 rising values of lambda in float64.
        order: Order of the solver.
        error: How the network's error depends on the noise.

    Raises:
        ValueError: For an unknown error model or an order below one.
    """
    if error not in get_args(ErrorModel):
        raise ValueError(f"error model {error!r} is not known; known: {', '.join(get_args(ErrorModel))}")
    if order < 1:
        raise ValueError(f"the order of a solver is at least 1, got {order}")
    start = lam[:-1]
    log_error = -start if error == "pixel" else -start - 0.5 * torch.nn.functional.softplus(2 * start)
    w = step_weights(lam, order)
    orders = _orders(len(start), order)
    together, apart = torch.zeros_like(start), torch.zeros_like(start)
    for k in range(order):
        full, low = (orders == order).nonzero()[:, 0], ((orders < order) & (orders > k)).nonzero()[:, 0]
        together = together.index_add(0, full - k, w[full, k])
        apart = apart.index_add(0, low - k, w[low, k].abs())
    return torch.sum((together.abs() + apart) * log_error.exp())


def _orders(count: int, order: int) -> Tensor:
    i = torch.arange(count)
    return torch.minimum(i + 1, count - i).clamp(max=order)


def minimise_bound(
    starts: list[Array], *, order: int = 3, error: ErrorModel = "latent", min_gap: float = 0.02
) -> Array:
    """Rising nodes with the ends of the given ones and a small bound.

    The gaps are min_gap plus the softmax of free numbers, so nodes keep their order whatever the optimiser
    does. The bound has kinks, hence several starts, of which the best end is taken. Nothing is drawn at
    random: the same input gives the same nodes.

    Args:
        starts: Grids of N + 1 rising lambdas with common ends.
        order: Order of the solver.
        error: As in :func:`error_bound`.
        min_gap: Least step in lambda; cut to half an even step where there are too many nodes for it.

    Raises:
        ValueError: As :func:`error_bound`.
    """
    first, last, count = float(starts[0][0]), float(starts[0][-1]), len(starts[0]) - 1
    floor = min(min_gap, (last - first) / count / 2)
    spare = last - first - count * floor

    def grid(z: Tensor) -> Tensor:
        gaps = floor + spare * torch.softmax(z, 0)
        return first + torch.cat([gaps.new_zeros(1), gaps.cumsum(0)])

    def objective(values: Array) -> tuple[float, Array]:
        """Logarithm of the bound and its gradient."""
        z = torch.tensor(values, requires_grad=True)
        f = error_bound(grid(z), order, error).log()
        (slope,) = torch.autograd.grad(f, z)
        return f.item(), slope.numpy()

    best, least = starts[0], np.inf
    for start in starts:
        share = np.maximum(np.diff(start) - floor, 1e-3 * spare)
        z = np.log(share / share.sum())
        found = minimize(objective, z, jac=True, method="L-BFGS-B", options={"maxiter": 200})
        if found.fun < least:
            best, least = grid(torch.from_numpy(found.x)).numpy(), found.fun
    return best
