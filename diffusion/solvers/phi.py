"""phi functions of exponential integrators: phi_0 = e^z, phi_{k+1}(z) = (phi_k(z) - 1/k!) / z."""

from __future__ import annotations

import math

_SERIES_BELOW = 1.0


def phi(k: int, z: float) -> float:
    """phi_k(z) for k >= 0, to round-off; the recurrence cancels for small z, where the series serves."""
    if abs(z) < _SERIES_BELOW or k == 0:
        return math.exp(z) if k == 0 else math.fsum(z**j / math.factorial(j + k) for j in range(24))
    value = math.expm1(z) / z
    for j in range(1, k):
        value = (value - 1 / math.factorial(j)) / z
    return value


def bh_scale(kind: str, z: float) -> float:
    """Scaling of the first derivative by UniPC (arXiv 2302.04867): bh1 has B = z, bh2 has B = e^z - 1.

    R = z B / (2 (e^z - 1 - z)), which is B / (2 z phi_2(z)).
    """
    if z == 0:
        return 1.0
    return (z if kind == "bh1" else math.expm1(z)) / (2 * z * phi(2, z))
