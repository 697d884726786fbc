"""Every noise schedule: variance preserving ones, exploding ones, EDM and rectified flow.

See :class:`~thalweg.diffusion.noise_schedule.NoiseSchedule` for what they share.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np

from thalweg.diffusion.noise_schedule import Array, NoiseSchedule, Values
from thalweg.diffusion.variance_preserving import VPCosine, VPDiscrete, VPLinear

__all__ = ["EDM", "SCHEDULES", "VE", "Flow", "NoiseSchedule", "VPCosine", "VPDiscrete", "VPLinear", "flow_mu"]


@dataclass(frozen=True, kw_only=True)
class VE(NoiseSchedule):
    """Variance exploding: alpha = 1, sigma = t (Karras et al. 2022); times are noise levels."""

    kind: ClassVar[str] = "ve"
    t_start: float = 80.0
    """Largest noise level."""
    t_end: float = 0.002
    """Smallest noise level."""
    label_kind: Literal["sigma", "edm"] = "sigma"
    """What the network is told: the noise level, or ln(sigma) / 4 as in EDM."""

    def __post_init__(self) -> None:
        """Check the label."""
        super().__post_init__()
        if self.label_kind not in ("sigma", "edm"):
            raise ValueError(f"label_kind is sigma or edm, got {self.label_kind!r}")

    def alpha(self, t: Values) -> Array:
        """Factor of the data, one."""
        return np.ones_like(np.asarray(t, np.float64))[()]

    def sigma(self, t: Values) -> Array:
        """Factor of the noise, the time itself."""
        return np.asarray(t, np.float64)[()]

    def t_of_lam(self, lam: Values) -> Array:
        """Noise level exp(-lambda)."""
        return np.exp(-np.asarray(lam, np.float64))

    def label(self, t: Values) -> Array:
        """The noise level, or ln(sigma) / 4."""
        t = np.asarray(t, np.float64)
        return t[()] if self.label_kind == "sigma" else np.log(t) / 4


@dataclass(frozen=True, kw_only=True)
class EDM(NoiseSchedule):
    """The inputs of networks with the preconditioning of EDM (Karras et al. 2022, arXiv 2206.00364, table 1).

    Such a network F is asked F(c_in x, ln(t) / 4) at x = data + t noise, c_in = 1 / sqrt(t^2 + sigma_data^2).
    Its input is a variance preserving state of data / sigma_data, with alpha = sigma_data c_in and
    sigma = t c_in, and c_skip and c_out say that it predicts v = alpha noise - sigma data, or -v (``edm`` in
    :mod:`thalweg.diffusion.parameterization`). Times are the noise levels t.
    """

    kind: ClassVar[str] = "edm"
    t_start: float = 80.0
    """Largest noise level."""
    t_end: float = 0.002
    """Smallest noise level."""
    sigma_data: float = 0.5
    """Standard deviation of the data."""

    def __post_init__(self) -> None:
        """Check the deviation."""
        super().__post_init__()
        if not self.sigma_data > 0:
            raise ValueError(f"sigma_data must be positive, got {self.sigma_data}")

    @property
    def data_scale(self) -> float:
        """What the data are divided by, sigma_data."""
        return self.sigma_data

    def alpha(self, t: Values) -> Array:
        """Factor of the data over sigma_data."""
        return self.sigma_data / np.hypot(t, self.sigma_data)

    def sigma(self, t: Values) -> Array:
        """Factor of the noise."""
        return np.asarray(t, np.float64)[()] / np.hypot(t, self.sigma_data)

    def t_of_lam(self, lam: Values) -> Array:
        """Noise level sigma_data exp(-lambda)."""
        return self.sigma_data * np.exp(-np.asarray(lam, np.float64))

    def label(self, t: Values) -> Array:
        """ln(t) / 4."""
        with np.errstate(divide="ignore"):
            return np.log(np.asarray(t, np.float64)) / 4


@dataclass(frozen=True, kw_only=True)
class Flow(NoiseSchedule):
    """Rectified flow, alpha = 1 - sigma, with the time shift of Stable Diffusion 3.

    sigma = shift t / (1 + (shift - 1) t), which is sigma = t for shift 1 (Esser et al. 2024). In lambda a
    shift is a translation by -ln(shift). At t = 1 alpha is zero and lambda is minus infinity.
    """

    kind: ClassVar[str] = "flow"
    shift: float = 1.0
    """3 in Stable Diffusion 3; larger pictures need more noise."""
    label_scale: float = 1000.0
    """The label is this times sigma."""

    def __post_init__(self) -> None:
        """Check the shift and that times are at most one."""
        super().__post_init__()
        if not self.shift > 0:
            raise ValueError(f"the shift must be positive, got {self.shift}")
        if self.t_start > 1:
            raise ValueError(f"times of a flow are at most 1, got t_start {self.t_start}")

    def alpha(self, t: Values) -> Array:
        """Factor of the data, 1 - sigma, without cancellation near the noise."""
        t = np.asarray(t, np.float64)
        return (1 - t) / (1 + (self.shift - 1) * t)

    def sigma(self, t: Values) -> Array:
        """Factor of the noise."""
        t = np.asarray(t, np.float64)
        return self.shift * t / (1 + (self.shift - 1) * t)

    def t_of_lam(self, lam: Values) -> Array:
        """Time of a lambda, the logistic function of -(lambda + ln shift)."""
        lam = np.asarray(lam, np.float64) + np.log(self.shift)
        return np.exp(-np.logaddexp(0.0, lam))

    def label(self, t: Values) -> Array:
        """The noise level, scaled."""
        return self.label_scale * self.sigma(t)

    def with_mu(self, mu: float) -> Flow:
        """The flow for one picture size where shifting is dynamic: shift = exp(mu) in place of its own."""
        return replace(self, shift=float(np.exp(mu)))


def flow_mu(
    tokens: int,
    *,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
    base_tokens: int = 256,
    max_tokens: int = 4096,
) -> float:
    """Shift mu of dynamic shifting, linear in the number of tokens of a picture (defaults as in FLUX)."""
    return base_shift + (max_shift - base_shift) * (tokens - base_tokens) / (max_tokens - base_tokens)


SCHEDULES: dict[str, type[NoiseSchedule]] = {
    c.kind: c for c in (VPLinear, VPCosine, VPDiscrete, VE, EDM, Flow)
}
