"""Noise schedules with alpha^2 + sigma^2 = 1: linear, cosine, and a table of betas."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import numpy as np

from thalweg.diffusion.noise_schedule import Array, NoiseSchedule, Values

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


@dataclass(frozen=True, kw_only=True)
class VariancePreserving(NoiseSchedule):
    """Schedules with alpha^2 + sigma^2 = 1, given by ln alpha."""

    @abstractmethod
    def log_alpha(self, t: Values) -> Array:
        """Natural logarithm of alpha."""

    @abstractmethod
    def t_of_log_alpha(self, log_alpha: Values) -> Array:
        """Time at which ln alpha takes a value."""

    def alpha(self, t: Values) -> Array:
        """Factor of the data."""
        return np.exp(self.log_alpha(t))

    def sigma(self, t: Values) -> Array:
        """Factor of the noise, sqrt(1 - alpha^2), without cancellation near the data."""
        return np.sqrt(-np.expm1(2 * self.log_alpha(t)))

    def lam(self, t: Values) -> Array:
        """Half the log signal-to-noise ratio; infinite where sigma is zero."""
        log_alpha = self.log_alpha(t)
        with np.errstate(divide="ignore"):
            return log_alpha - 0.5 * np.log(-np.expm1(2 * log_alpha))

    def t_of_lam(self, lam: Values) -> Array:
        """Time of a lambda, through ln alpha = -ln(1 + exp(-2 lambda)) / 2."""
        return self.t_of_log_alpha(-0.5 * np.logaddexp(0.0, -2 * np.asarray(lam, np.float64)))


@dataclass(frozen=True, kw_only=True)
class ContinuousVP(VariancePreserving):
    """Variance preserving schedules whose networks are told the time."""

    label_scale: float = 1.0
    """The label is this times t; 999 for networks trained on a thousand steps."""

    def label(self, t: Values) -> Array:
        """The time, scaled."""
        return self.label_scale * np.asarray(t, np.float64)


@dataclass(frozen=True, kw_only=True)
class VPLinear(ContinuousVP):
    """Linear beta(t) on [0, 1]: ln alpha = -t^2 (beta_1 - beta_0) / 4 - t beta_0 / 2 (Song et al. 2021)."""

    kind: ClassVar[str] = "vp_linear"
    beta_0: float = 0.1
    """beta at t = 0."""
    beta_1: float = 20.0
    """beta at t = 1."""

    def __post_init__(self) -> None:
        """Check the betas."""
        super().__post_init__()
        if not self.beta_1 >= self.beta_0 > 0:
            raise ValueError(f"beta_1 >= beta_0 > 0 is needed, got {self.beta_0} and {self.beta_1}")

    def log_alpha(self, t: Values) -> Array:
        """Natural logarithm of alpha."""
        t = np.asarray(t, np.float64)
        return -(t**2) * (self.beta_1 - self.beta_0) / 4 - t * self.beta_0 / 2

    def t_of_log_alpha(self, log_alpha: Values) -> Array:
        """Positive root of the quadratic, in the form that does not cancel."""
        c = -np.asarray(log_alpha, np.float64)
        b = self.beta_0 / 2
        return 2 * c / (b + np.sqrt(b * b + (self.beta_1 - self.beta_0) * c))


@dataclass(frozen=True, kw_only=True)
class VPCosine(ContinuousVP):
    """Cosine: alpha = cos((t + s) / (1 + s) pi / 2) / cos(s / (1 + s) pi / 2) (Nichol and Dhariwal 2021).

    At t = 1 alpha vanishes, so sampling starts a little before (0.9946, as DPM-Solver does).
    """

    kind: ClassVar[str] = "vp_cosine"
    t_start: float = 0.9946
    """Time at which sampling starts."""
    s: float = 0.008
    """Offset that keeps the noise of small times from vanishing too fast."""

    def __post_init__(self) -> None:
        """Check the offset."""
        super().__post_init__()
        if not self.s > 0:
            raise ValueError(f"the offset s must be positive, got {self.s}")

    @property
    def _tan(self) -> float:
        return float(np.tan(self.s / (1 + self.s) * np.pi / 2))

    def log_alpha(self, t: Values) -> Array:
        """Natural logarithm of alpha, as ln(cos d - sin d tan b), d the angle that t adds to b."""
        d = np.asarray(t, np.float64) * (np.pi / 2 / (1 + self.s))
        return np.log1p(-2 * np.sin(d / 2) ** 2 - np.sin(d) * self._tan)

    def t_of_log_alpha(self, log_alpha: Values) -> Array:
        """Inverse by the tangent of half the angle, a quadratic."""
        e = np.expm1(np.asarray(log_alpha, np.float64))
        half = -e / (self._tan + np.sqrt(self._tan**2 - e * (2 + e)))
        return 2 * np.arctan(half) / (np.pi / 2 / (1 + self.s))


@dataclass(frozen=True, kw_only=True)
class VPDiscrete(VariancePreserving):
    """A table of n betas: ln alpha_i = sum_{j <= i} ln(1 - beta_j) / 2 at t_i = i / n, i = 1 .. n.

    Between the entries ln alpha is linear in t; the first and the last segment go on beyond them (but ln
    alpha stays below zero). The label is n t - 1, so that 0 .. n - 1 are the steps of training. Defaults are
    those of Stable Diffusion 1.5.

    With ``rescale_zero_snr`` the table of alpha is shifted to end at zero and stretched to keep its first
    entry (Lin et al. 2024, arXiv 2305.08891, algorithm 1); in the last segment alpha itself is linear in t.
    """

    kind: ClassVar[str] = "vp_discrete"
    t_end: float = None  # type: ignore[assignment]
    """Smallest time at which a network is evaluated; None is 1 / n, the first entry."""
    beta_start: float = 0.00085
    """First beta."""
    beta_end: float = 0.012
    """Last beta."""
    n: int = 1000
    """Number of training steps."""
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "scaled_linear"
    """linear in beta, linear in sqrt(beta), or the cosine of Nichol and Dhariwal cut at 0.999."""
    betas: tuple[float, ...] | None = None
    """The table itself, in place of the four entries above."""
    rescale_zero_snr: bool = False
    """Whether the last entry is pure noise; its network cannot predict noise."""

    def __post_init__(self) -> None:
        """Check the table."""
        least = 3 if self.rescale_zero_snr else 2
        if self.n < least:
            raise ValueError(f"a table needs n >= {least} entries, got {self.n}")
        if self.t_end is None:
            object.__setattr__(self, "t_end", 1 / self.n)
        super().__post_init__()
        if self.beta_schedule not in BETA_SCHEDULES:
            known = ", ".join(BETA_SCHEDULES)
            raise ValueError(f"beta_schedule {self.beta_schedule!r} is not known; known: {known}")
        if self.betas is not None and self.n != len(self.betas):
            raise ValueError(f"n is {self.n}, but there are {len(self.betas)} betas")
        if not np.all((self.beta_table > 0) & (self.beta_table < 1)):
            found = f"{self.beta_table.min()} to {self.beta_table.max()}"
            raise ValueError(f"betas must lie between 0 and 1, got {found}")

    @cached_property
    def beta_table(self) -> Array:
        """The betas, n of them."""
        if self.betas is not None:
            return np.asarray(self.betas, np.float64)
        if self.beta_schedule == "linear":
            return np.linspace(self.beta_start, self.beta_end, self.n)
        if self.beta_schedule == "scaled_linear":
            return np.linspace(self.beta_start**0.5, self.beta_end**0.5, self.n) ** 2
        bar = np.cos((np.linspace(0, 1, self.n + 1) + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.minimum(1 - bar[1:] / bar[:-1], 0.999)

    @cached_property
    def _table(self) -> tuple[Array, Array]:
        """Times and ln alpha."""
        times, log_alpha = np.arange(1, self.n + 1) / self.n, 0.5 * np.cumsum(np.log1p(-self.beta_table))
        if not self.rescale_zero_snr:
            return times, log_alpha
        # alpha_i - alpha_n, without cancellation at the end; the last one is zero.
        difference = -np.exp(log_alpha) * np.expm1(log_alpha[-1] - log_alpha)
        with np.errstate(divide="ignore"):
            return times, np.log(difference) + log_alpha[0] - np.log(difference[0])

    def log_alpha(self, t: Values) -> Array:
        """Natural logarithm of alpha."""
        times, table = self._table
        t = np.asarray(t, np.float64)
        if not self.rescale_zero_snr:
            return np.minimum(_piecewise(t, times, table), 0.0)
        with np.errstate(divide="ignore"):
            last = table[-2] + np.log(np.maximum(self.n * (1 - t), 0.0))
        before = _piecewise(np.minimum(t, times[-2]), times[:-1], table[:-1])
        return np.minimum(np.where(t > times[-2], last, before), 0.0)[()]

    def t_of_log_alpha(self, log_alpha: Values) -> Array:
        """Inverse of the piecewise linear table."""
        times, table = self._table
        log_alpha = np.asarray(log_alpha, np.float64)
        if not self.rescale_zero_snr:
            return _piecewise(log_alpha, table[::-1], times[::-1])
        last = 1 - np.exp(np.minimum(log_alpha, table[-2]) - table[-2]) / self.n
        before = _piecewise(np.maximum(log_alpha, table[-2]), table[-2::-1], times[-2::-1])
        return np.where(log_alpha < table[-2], last, before)[()]

    def label(self, t: Values) -> Array:
        """Step of training, n t - 1; exactly a whole number at the entries of the table."""
        label = self.n * np.asarray(t, np.float64) - 1
        return np.where(np.abs(label - np.rint(label)) < 1e-6, np.rint(label) + 0.0, label)[()]

    def t_of_label(self, label: Values) -> Array:
        """Time of a step of training."""
        return (np.asarray(label, np.float64) + 1) / self.n


def _piecewise(x: Array, xs: Array, ys: Array) -> Array:
    """Piecewise linear function through (xs, ys), xs rising; its outer segments go on for ever."""
    k = np.clip(np.searchsorted(xs, x) - 1, 0, len(xs) - 2)
    return ys[k] + (x - xs[k]) * (ys[k + 1] - ys[k]) / (xs[k + 1] - xs[k])
