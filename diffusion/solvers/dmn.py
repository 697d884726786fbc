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
from numpy.typing import NDArray
from scipy.optimize import minimize

Array = NDArray[np.float64]
ErrorModel = Literal["latent", "pixel"]

_POINTS, _WEIGHTS = np.polynomial.legendre.leggauss(12)


def step_weights(lam: Array, order: int = 3) -> Array:
    """Weights w_ij of the data prediction at node j in step i of a multistep solver.

    Step i has order min(order, i + 1, N - i), so that it starts and ends with first order. The integrals are
    taken by Gauss's rule with twelve points, since closed forms cancel for short steps.

    Args:
        lam: N + 1 rising values of lambda, after any other axes.
        order: Largest order.

    Returns:
        N N in place of N + 1; row i sums to e^lambda_{i+1} - e^lambda_i.
    """
    count = lam.shape[-1] - 1
    w = np.zeros((*lam.shape[:-1], count, count))
    orders = _orders(count, order)
    for m in sorted(set(orders.tolist())):
        (steps,) = np.nonzero(orders == m)
        half = (lam[..., steps + 1] - lam[..., steps])[..., None] / 2
        y = lam[..., steps, None] + half * (1 + _POINTS)
        for j in range(m):
            integrand = half * _WEIGHTS * np.exp(y)
            for other in set(range(m)) - {j}:
                away = (lam[..., steps - j] - lam[..., steps - other])[..., None]
                integrand = integrand * (y - lam[..., steps - other, None]) / away
            w[..., steps, steps - j] = integrand.sum(-1)
    return w


def error_bound(lam: Array, order: int = 3, error: ErrorModel = "latent") -> Array:
    """Bound on the error of the result for N + 1 rising nodes, one number for each set of nodes.

    Args:
        lam: N + 1 rising values of lambda, after any other axes.
        order: Order of the solver.
        error: How the network's error depends on the noise.

    Raises:
        ValueError: For an unknown error model or an order below one.
    """
    if error not in get_args(ErrorModel):
        raise ValueError(f"error model {error!r} is not known; known: {', '.join(get_args(ErrorModel))}")
    if order < 1:
        raise ValueError(f"the order of a solver is at least 1, got {order}")
    start = lam[..., :-1]
    log_error = -start if error == "pixel" else -start - 0.5 * np.logaddexp(0.0, 2 * start)
    w = step_weights(lam, order)
    full = _orders(w.shape[-1], order) == order
    size = np.abs(w[..., full, :].sum(-2)) + np.abs(w[..., ~full, :]).sum(-2)
    return np.sum(size * np.exp(log_error), axis=-1)


def _orders(count: int, order: int) -> NDArray[np.int64]:
    i = np.arange(count)
    return np.minimum(order, np.minimum(i + 1, count - i))


def minimise_bound(
    starts: list[Array],
    *,
    order: int = 3,
    error: ErrorModel = "latent",
    min_gap: float = 0.02,
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
    first, last, count = starts[0][0], starts[0][-1], len(starts[0]) - 1
    floor = min(min_gap, (last - first) / count / 2)
    spare = last - first - count * floor
    probes = 1e-6 * np.concatenate([np.zeros((1, count)), np.eye(count), -np.eye(count)])

    def grid(z: Array) -> Array:
        e = np.exp(z - z.max(axis=-1, keepdims=True))
        gaps = floor + spare * e / e.sum(axis=-1, keepdims=True)
        return first + np.concatenate([np.zeros_like(gaps[..., :1]), np.cumsum(gaps, axis=-1)], axis=-1)

    def objective(z: Array) -> tuple[float, Array]:
        """Logarithm of the bound and its gradient by central differences."""
        f = np.log(error_bound(grid(z + probes), order, error))
        return f[0], (f[1 : count + 1] - f[count + 1 :]) / 2e-6

    best, least = starts[0], np.inf
    for start in starts:
        share = np.maximum(np.diff(start) - floor, 1e-3 * spare)
        z = np.log(share / share.sum())
        found = minimize(objective, z, jac=True, method="L-BFGS-B", options={"maxiter": 200})
        if found.fun < least:
            best, least = grid(found.x), found.fun
    return best
