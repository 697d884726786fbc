"""The prediction v3 of DPM-Solver-v3 (Zheng et al. 2023, arXiv 2310.13268): coefficients l, s, b of lambda.

With y = x / alpha, rho = sigma / alpha and the noise prediction e, the ODE is dy/dlambda = -rho e. Take

    f = rho e - l y,    g = exp(S_s - S) f - beta,    beta(lambda) = int_s^lambda exp(S_s - S) b,

where L and S are the integrals of l and s, and s is the start of the step. The exact solution is then

    y_t = exp(L_s - L_t) (y_s - int_s^t exp(L + S - L_s - S_s) (g + beta) dlambda),

whatever l, s and b are; a good choice makes g nearly constant. (l, s, b) = (1, 0, 0) extrapolates the data,
(0, -1, 0) the noise.

Shapes: M entries of a table, K channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from thalweg.diffusion.solvers.phi import phi

Array = NDArray[np.float64]
Entries = tuple[float, ...] | tuple[tuple[float, ...], ...]

COVER = 1e-9
"""How far a node may lie outside the tables, for rounding."""
_PIECE = 0.25
_POINTS, _WEIGHTS = np.polynomial.legendre.leggauss(8)


@dataclass(frozen=True, kw_only=True, slots=True)
class V3:
    """Constants of the prediction v3, with b = 0: (1, 0) is data, (0, -1) is noise."""

    l: float  # noqa: E741 - the paper's letter
    """Linear coefficient."""
    s: float
    """Scaling coefficient."""

    @property
    def closed(self) -> Literal["data", "noise"] | None:
        """The prediction that it is, if it is one."""
        return {(1.0, 0.0): "data", (0.0, -1.0): "noise"}.get((self.l, self.s))  # type: ignore[return-value]

    def linear(self, lam: float) -> float:
        """Coefficient l."""
        return self.l

    def exponents(self, lam_s: float, lam: float) -> tuple[float, float]:
        """Integrals L and S from one lambda to another."""
        return self.l * (lam - lam_s), self.s * (lam - lam_s)

    def bias(self, lam_s: float, lam: float) -> float:
        """Beta, which is zero."""
        return 0.0

    def integrals(self, lam_s: float, lam_t: float, order: int) -> tuple[list[float], float]:
        """As of tables, in closed form: int_0^h e^{cy} y^k / k! dy = e^{ch} h^{k+1} phi_{k+1}(-ch)."""
        h, rate = lam_t - lam_s, self.l + self.s
        return [math.exp(rate * h) * h ** (k + 1) * phi(k + 1, -rate * h) for k in range(order)], 0.0


@dataclass(frozen=True, kw_only=True)
class V3Tables:
    """Tables of l, s and b over lambda, from :func:`thalweg.diffusion.solvers.ems.estimate_ems`.

    Between the entries runs a cubic spline, and its integrals are exact to rounding, so that the order of a
    method is kept between the entries as well (the paper takes the trapezoid rule on a fine table).

    Raises:
        ValueError: For tables of different lengths, that do not rise in lambda, or that are not finite.
    """

    lam: tuple[float, ...]
    """M values of lambda = ln(alpha / sigma), rising; ``lambda`` in JSON."""
    l: Entries  # noqa: E741 - the paper's letter
    """M linear coefficients, or K rows of them, one for each channel."""
    s: Entries
    """M scaling coefficients, or K rows."""
    b: Entries
    """M biases of the prediction, or K rows."""

    def __post_init__(self) -> None:
        """Check the tables."""
        lam = np.asarray(self.lam, np.float64)
        if lam.ndim != 1 or len(lam) < 2:
            raise ValueError(f"v3: a table needs two values of lambda or more, found {len(self.lam)}")
        if not np.isfinite(lam).all():
            raise ValueError(f"v3: lambda {_first(lam, np.isfinite(lam))} is not finite")
        if not (np.diff(lam) > 0).all():
            i = int(np.argmin(np.diff(lam) > 0))
            raise ValueError(f"v3: lambda must rise, entry {i + 1} is {lam[i + 1]:.6g} after {lam[i]:.6g}")
        widths = set()
        for name in ("l", "s", "b"):
            rows = self._rows(name)
            widths.add(len(rows) if self._by_channel(name) else None)
            for row in rows:
                if len(row) != len(lam):
                    raise ValueError(f"v3: {name} has {len(row)} entries, lambda {len(lam)}")
                if not np.isfinite(row).all():
                    raise ValueError(f"v3: {name} has an entry {_first(row, np.isfinite(row))}, not finite")
        if len(widths) > 1:
            found = ", ".join("none" if n is None else str(n) for n in widths)
            raise ValueError(f"v3: l, s and b have different numbers of channels: {found}")

    def _by_channel(self, name: str) -> bool:
        entries = getattr(self, name)
        return len(entries) > 0 and isinstance(entries[0], Sequence)

    def _rows(self, name: str) -> list[Array]:
        entries = getattr(self, name)
        return [np.asarray(row, np.float64) for row in (entries if self._by_channel(name) else [entries])]

    @property
    def channels(self) -> int | None:
        """Number K of channels; None if one table is for all."""
        return len(self.l) if self._by_channel("l") else None

    def channel(self, k: int) -> V3Tables:
        """The tables of a channel."""
        if self.channels is None:
            return self
        return replace(self, **{name: getattr(self, name)[k] for name in ("l", "s", "b")})

    def simplified(self) -> V3 | V3Tables:
        """Constants, if the entries are all equal and there is no bias."""
        if self.channels is None and not any(self.b) and len(set(self.l)) == len(set(self.s)) == 1:
            return V3(l=self.l[0], s=self.s[0])  # type: ignore[arg-type]
        return self

    def covers(self, lam: float) -> bool:
        """Whether a lambda lies within the table."""
        return self.lam[0] - COVER <= lam <= self.lam[-1] + COVER

    def linear(self, lam: float) -> float:
        """Coefficient l."""
        return float(self._curves["l"](lam))

    def exponents(self, lam_s: float, lam: float) -> tuple[float, float]:
        """Integrals L and S from one lambda to another."""
        return tuple(float(self._curves[name](lam) - self._curves[name](lam_s)) for name in ("L", "S"))  # type: ignore[return-value]

    def bias(self, lam_s: float, lam: float) -> float:
        """Beta at a lambda, relative to the start of a step."""
        return float(self._beta(lam_s, np.array([lam]))[0])

    def integrals(self, lam_s: float, lam_t: float, order: int) -> tuple[list[float], float]:
        """Integrals over a step of e^{L + S} y^k / k!, k = 0 .. order - 1, and of e^{L + S} beta.

        y is lambda - lambda_s, and L and S are relative to the start. They are E_k and the constant of the
        paper's equation 8.
        """
        knots = np.asarray(self.lam)
        inside = knots[(knots > lam_s) & (knots < lam_t)]
        at, weights = _quadrature(_split(np.array([lam_s, *inside, lam_t])))
        both = self._curves["L"](at) + self._curves["S"](at)
        both -= self._curves["L"](lam_s) + self._curves["S"](lam_s)
        factor = weights * np.exp(both)
        terms = [float(factor @ (at - lam_s) ** k) / math.factorial(k) for k in range(order)]
        return terms, float(factor @ self._beta(lam_s, at)) if any(self.b) else 0.0

    @cached_property
    def _curves(self) -> dict[str, Any]:
        """Curves l, s, b and the integrals L and S."""
        from scipy.interpolate import CubicSpline

        assert self.channels is None
        curves = {name: CubicSpline(self.lam, getattr(self, name)) for name in ("l", "s", "b")}
        return curves | {"L": curves["l"].antiderivative(), "S": curves["s"].antiderivative()}

    @cached_property
    def _sums(self) -> tuple[Array, Array]:
        """Bounds of the pieces, and the integral of e^-S b up to each of them."""
        bounds = _split(np.asarray(self.lam))
        at, weights = _quadrature(bounds)
        pieces = (weights * self._density(at)).reshape(len(bounds) - 1, -1).sum(1)
        return bounds, np.concatenate([[0.0], np.cumsum(pieces)])

    def _density(self, lam: Array) -> Array:
        return np.asarray(np.exp(-self._curves["S"](lam)) * self._curves["b"](lam))

    def _beta(self, lam_s: float, lam: Array) -> Array:
        if not any(self.b):
            return np.zeros(len(lam))
        bounds, sums = self._sums
        ends = np.append(lam, lam_s)
        piece = np.clip(np.searchsorted(bounds, ends) - 1, 0, len(bounds) - 2)
        half = (ends - bounds[piece]) / 2
        inner = self._density(bounds[piece][:, None] + half[:, None] * (_POINTS + 1)) @ _WEIGHTS * half
        total = sums[piece] + inner
        return np.asarray(np.exp(self._curves["S"](lam_s)) * (total[:-1] - total[-1]))


def _first(values: Array, good: NDArray[np.bool_]) -> float:
    return float(values[~good][0])


def _split(bounds: Array) -> Array:
    """Bounds of pieces short enough for the quadrature."""
    counts = np.ceil(np.diff(bounds) / _PIECE).astype(int).clip(1)
    pieces = [np.linspace(a, b, n, endpoint=False) for a, b, n in zip(bounds[:-1], bounds[1:], counts)]
    return np.append(np.concatenate(pieces), bounds[-1])


def _quadrature(bounds: Array) -> tuple[Array, Array]:
    """Points and weights of Gauss and Legendre in every piece."""
    half = np.diff(bounds)[:, None] / 2
    return (bounds[:-1, None] + half * (_POINTS + 1)).ravel(), (half * _WEIGHTS).ravel()
