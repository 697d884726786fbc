"""What noise schedules share: how much of the data and how much of the noise a time stands for.

A state is x_t = alpha(t) x_0 + sigma(t) e with e ~ N(0, I), and lambda(t) = ln(alpha / sigma) rises while
sampling. A schedule maps time to (alpha, sigma) and lambda back to time, and says what a network is told (the
label). Everything is numpy in float64 and takes numbers or arrays. Time falls from ``t_start`` to ``t_end``;
t = 0 is data. The schedules are in :mod:`thalweg.diffusion.schedules`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Values = float | Array


@dataclass(frozen=True, kw_only=True)
class NoiseSchedule:
    """What all schedules share.

    Raises:
        ValueError: Unless t_start > t_end >= 0.
    """

    kind: ClassVar[str]
    """Name in files."""
    t_start: float = 1.0
    """Time at which sampling starts."""
    t_end: float = 1e-3
    """Smallest time at which a network is evaluated by default."""

    def __post_init__(self) -> None:
        """Check the interval of times."""
        if not self.t_start > self.t_end >= 0:
            raise ValueError(f"times run from t_start to t_end >= 0, got {self.t_start} and {self.t_end}")

    @abstractmethod
    def alpha(self, t: Values) -> Array:
        """Factor of the data."""

    @abstractmethod
    def sigma(self, t: Values) -> Array:
        """Factor of the noise."""

    @abstractmethod
    def t_of_lam(self, lam: Values) -> Array:
        """Time at which ln(alpha / sigma) takes a value."""

    def lam(self, t: Values) -> Array:
        """Half the log signal-to-noise ratio, ln(alpha / sigma); infinite where alpha or sigma is zero."""
        with np.errstate(divide="ignore"):
            return np.log(self.alpha(t)) - np.log(self.sigma(t))

    @abstractmethod
    def label(self, t: Values) -> Array:
        """What the network is told."""

    @property
    def data_scale(self) -> float:
        """What the data are divided by before noise is added; 1 but for EDM."""
        return 1.0

    def to_dict(self) -> dict[str, Any]:
        """The schedule as plain JSON values."""
        return {"kind": self.kind, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> NoiseSchedule:
        """Make a schedule from the values that :meth:`to_dict` gives.

        Raises:
            ValueError: For an unknown kind or an unknown entry.
        """
        from thalweg.diffusion.schedules import SCHEDULES

        rest = dict(values)
        name = rest.pop("kind", None)
        if not isinstance(name, str) or name not in SCHEDULES:
            raise ValueError(f"noise schedule {name!r} is not known; kinds: {', '.join(SCHEDULES)}")
        chosen: Any = SCHEDULES[name]
        known = [field.name for field in fields(chosen)]
        if unknown := sorted(set(rest) - set(known)):
            raise ValueError(
                f"noise schedule {name!r} has no {', '.join(unknown)}; entries: {', '.join(known)}"
            )
        return chosen(**{key: tuple(v) if isinstance(v, list) else v for key, v in rest.items()})
