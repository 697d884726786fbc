"""Efficiency and accuracy gains of a model over a reference, from errors at growing numbers of samples.

A scaling curve says which test error a model reaches when trained on S trajectories (or samples of a steady
problem). With E_S that error,

    AG_S = E_S(reference) / E_S(model)                 accuracy gain: at equal samples, how much smaller
    EG_S = S / s  with  E_s(model) = E_S(reference)    efficiency gain: at equal error, how many fewer

and curves are interpolated linearly in log E over log S (Herde et al. 2024, Section 4, where the reference is
an FNO, AG is quoted at S = 128 and EG at S = 1024; 512 and 4096 for steady problems).
"""

from __future__ import annotations

import csv
import glob
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

ERROR_KEY = "scored_median_relative_l1_error"
"""Metric read from evaluation results unless another is asked for: the paper's number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScalingCurve:
    """Test error of one model over the number of training trajectories, sorted by that number."""

    name: str
    """Name of the model."""
    samples: tuple[int, ...]
    """Numbers of training trajectories, strictly increasing."""
    errors: tuple[float, ...]
    """Test error at each of them, in any unit, the same for all curves."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: For an empty curve, repeated sample numbers, or values that have no logarithm.
        """
        if not self.samples or len(self.samples) != len(self.errors):
            raise ValueError(
                f"curve {self.name!r} has {len(self.samples)} samples, {len(self.errors)} errors"
            )
        for a, b in pairwise(self.samples):
            if not a < b:
                raise ValueError(f"curve {self.name!r}: sample numbers must increase, got {a} before {b}")
        bad = [v for v in (*self.samples, *self.errors) if not (math.isfinite(v) and v > 0)]
        if bad:
            raise ValueError(f"curve {self.name!r} needs positive finite values, got {bad[0]}")

    @classmethod
    def from_points(cls, name: str, points: Iterable[tuple[int, float]]) -> ScalingCurve:
        """Curve from (samples, error) pairs in any order."""
        ordered = sorted(points)
        return cls(name=name, samples=tuple(s for s, _ in ordered), errors=tuple(e for _, e in ordered))

    def error_at(self, samples: float) -> float:
        """Error at a number of samples, interpolated in log-log.

        Raises:
            ValueError: Outside the measured range; nothing is extrapolated.
        """
        if not self.samples[0] <= samples <= self.samples[-1]:
            raise ValueError(
                f"curve {self.name!r} covers {self.samples[0]} to {self.samples[-1]} samples, not {samples:g}"
            )
        for (s0, e0), (s1, e1) in pairwise(zip(self.samples, self.errors, strict=True)):
            if s0 <= samples <= s1:
                return _power_between(samples, (s0, e0), (s1, e1))
        return self.errors[0]

    def samples_for(self, error: float) -> float | None:
        """Fewest samples with which the error is reached, interpolated in log-log; None if it never is.

        A curve that starts below the error gives its first sample number, an upper bound.
        """
        if self.errors[0] <= error:
            return float(self.samples[0])
        for (s0, e0), (s1, e1) in pairwise(zip(self.samples, self.errors, strict=True)):
            if e1 <= error < e0:
                return _power_between(error, (e0, s0), (e1, s1))
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class PowerLaw:
    """Fit E(S) = coefficient * S^-exponent."""

    coefficient: float
    """Error at one sample."""
    exponent: float
    """Rate of decay."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gain:
    """Gains of one model over the reference."""

    model: str
    """Name of the model."""
    accuracy_gain: float
    """AG_S: the reference's error over the model's."""
    efficiency_gain: float
    """EG_S: the reference's samples over the model's; 0 if the model never reaches its error."""
    lower_bound: bool
    """True if the model is better already with its fewest samples, so that EG is at least this."""
    power_law: PowerLaw | None
    """Fit to the model's curve; None for a single point."""

    @property
    def efficiency(self) -> str:
        """The efficiency gain as text, with what its limits mean."""
        if self.efficiency_gain == 0:
            return "0 (error not reached)"
        return f"{'at least ' if self.lower_bound else ''}{self.efficiency_gain:.2f}"


def fit_power_law(curve: ScalingCurve) -> PowerLaw | None:
    """Least squares of log E over log S; None for fewer than two points."""
    if len(curve.samples) < 2:
        return None
    x, y = [math.log(s) for s in curve.samples], [math.log(e) for e in curve.errors]
    x_mean, y_mean = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - x_mean) * (b - y_mean) for a, b in zip(x, y, strict=True)) / sum(
        (a - x_mean) ** 2 for a in x
    )
    return PowerLaw(coefficient=math.exp(y_mean - slope * x_mean), exponent=-slope)


def accuracy_gain(curve: ScalingCurve, reference: ScalingCurve, samples: float) -> float:
    """AG_S = E_S(reference) / E_S(model)."""
    return reference.error_at(samples) / curve.error_at(samples)


def efficiency_gain(curve: ScalingCurve, reference: ScalingCurve, samples: float) -> float:
    """EG_S = S / s with E_s(model) = E_S(reference); 0 if the model never reaches that error."""
    needed = curve.samples_for(reference.error_at(samples))
    return 0.0 if needed is None else samples / needed


def compare(
    curves: Iterable[ScalingCurve], reference: ScalingCurve, ag_samples: float, eg_samples: float
) -> list[Gain]:
    """Gains of every curve over the reference, in the order given."""
    target = reference.error_at(eg_samples)
    return [
        Gain(
            model=curve.name,
            accuracy_gain=accuracy_gain(curve, reference, ag_samples),
            efficiency_gain=efficiency_gain(curve, reference, eg_samples),
            lower_bound=curve.name != reference.name and curve.errors[0] <= target,
            power_law=fit_power_law(curve),
        )
        for curve in curves
    ]


def read_curve(name: str, source: str, key: str = ERROR_KEY) -> ScalingCurve:
    """Read a curve from files.

    Args:
        name: Name of the model.
        source: Comma-separated files, folders or patterns. A CSV has columns ``trajectories`` and ``error``;
            a JSON is such a table (``{"trajectories": [...], "error": [...]}``), a list of such rows, or a
            result of ``thalweg evaluate``; in folders every ``metrics.json`` below is read.
        key: Metric taken from evaluation results, in normalised units.

    Raises:
        ValueError: If nothing is found or a file has another form.
    """
    points: dict[int, float] = {}
    for path in _files(source):
        for samples, error in _read_points(path, key):
            if points.setdefault(samples, error) != error:
                raise ValueError(
                    f"curve {name!r}: {samples} trajectories occur twice with different errors ({path})"
                )
    return ScalingCurve.from_points(name, points.items())


def _files(source: str) -> list[Path]:
    """Files meant by a comma-separated list of files, folders and patterns."""
    found: list[Path] = []
    for part in filter(None, (p.strip() for p in source.split(","))):
        path = Path(part)
        matches = sorted(path.rglob("metrics.json")) if path.is_dir() else sorted(map(Path, glob.glob(part)))
        if not matches:
            raise ValueError(f"no curve file {part!r}")
        found += matches
    if not found:
        raise ValueError("a curve needs at least one file")
    return found


def _read_points(path: Path, key: str) -> list[tuple[int, float]]:
    """(samples, error) pairs in one file."""
    try:
        if path.suffix == ".csv":
            with path.open(newline="") as file:
                return [(int(row["trajectories"]), float(row["error"])) for row in csv.DictReader(file)]
        content = json.loads(path.read_text())
        if isinstance(content, list):
            return [(int(row["trajectories"]), float(row["error"])) for row in content]
        if "metrics" in content:
            return [_evaluation_point(path, content, key)]
        pairs = zip(content["trajectories"], content["error"], strict=True)
        return [(int(samples), float(error)) for samples, error in pairs]
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a curve with columns trajectories and error ({error})") from None


def _evaluation_point(path: Path, content: dict[str, Any], key: str) -> tuple[int, float]:
    """The point that one evaluation contributes."""
    samples = content.get("training", {}).get("num_trajectories")
    if samples is None or samples < 1:
        raise ValueError(f"{path} does not say on how many trajectories its model was trained")
    metrics = content["metrics"]["normalised"]
    if key not in metrics:
        raise ValueError(f"{path} has no metric {key!r}; known: {', '.join(sorted(metrics))}")
    return int(samples), float(metrics[key])


def _power_between(x: float, start: tuple[float, float], end: tuple[float, float]) -> float:
    """Value at x of the power law through two points; exact at the points, so that a curve meets itself."""
    (x0, y0), (x1, y1) = start, end
    if x in (x0, x1):
        return y0 if x == x0 else y1
    share = (math.log(x) - math.log(x0)) / (math.log(x1) - math.log(x0))
    return math.exp(math.log(y0) + share * (math.log(y1) - math.log(y0)))
