"""Pictures: panels of truth, prediction and error, spectra, errors over time, scaling curves.

Every function draws into a new matplotlib ``Figure`` without pyplot, so no window system and no global state
is touched, and returns the figure; :func:`save` writes it. Fields have axes (x, y): x runs to the right.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from thalweg.checkpoints.atomic import replacing
from thalweg.pde.gains import ScalingCurve, fit_power_law

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#1f4e79", "#c8553d", "#4c956c", "#8e6c8a", "#d9a441", "#4f5d75", "#7b9e87", "#b56576")
"""Line colours, distinguishable in print."""


def new_figure(width: float, height: float) -> Figure:
    """Empty figure of a size in inches.

    Raises:
        ImportError: If matplotlib is missing; the message names the extra that brings it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("pictures need matplotlib: pip install 'thalweg[plots]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: str | os.PathLike[str], dpi: int = 130) -> Path:
    """Write a figure as PNG (or what the suffix says), replacing the file only once it is complete."""
    path = Path(path)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=dpi, format=path.suffix.lstrip(".") or "png")
    return path


def field_panels(
    truth_CXY: NDArray[Any],
    prediction_CXY: NDArray[Any],
    names: Sequence[str],
    units: Sequence[str] | None = None,
    title: str = "",
) -> Figure:
    """One row per channel: truth and prediction on a shared colour scale, and their difference on its own."""
    truth, prediction = np.asarray(truth_CXY), np.asarray(prediction_CXY)
    units = ["1"] * len(names) if units is None else units
    figure = new_figure(9.6, 0.4 + 2.75 * len(names))
    axes = figure.subplots(len(names), 3, squeeze=False)
    for row, name in enumerate(names):
        label = name if units[row] in ("", "1") else f"{name} [{units[row]}]"
        both = np.stack([truth[row], prediction[row]])
        scale = _limits(both)
        for axis, values, heading in zip(axes[row][:2], both, ("truth", "prediction"), strict=True):
            image = _show(axis, values, f"{label}, {heading}", "viridis", scale)
        figure.colorbar(image, ax=list(axes[row][:2]), shrink=0.9, pad=0.02)
        error = prediction[row] - truth[row]
        bound = _largest(error)
        image = _show(axes[row][2], error, f"{label}, prediction - truth", "RdBu_r", (-bound, bound))
        figure.colorbar(image, ax=axes[row][2], shrink=0.9, pad=0.02)
        axes[row][0].set_ylabel("y", fontsize=9)
    for axis in axes[-1]:
        axis.set_xlabel("x", fontsize=9)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def rollout_panels(
    truth_FXY: NDArray[Any], prediction_FXY: NDArray[Any], times: Sequence[float], name: str, title: str = ""
) -> Figure:
    """One column per frame: truth, prediction and their difference below each other, on common scales."""
    truth, prediction = np.asarray(truth_FXY), np.asarray(prediction_FXY)
    figure = new_figure(1.2 + 1.9 * len(times), 6.1)
    axes = figure.subplots(3, len(times), squeeze=False)
    scale = _limits(np.concatenate([truth, prediction]))
    error = prediction - truth
    bound = _largest(error)
    rows = ((truth, "viridis", scale), (prediction, "viridis", scale), (error, "RdBu_r", (-bound, bound)))
    for row, (values, colours, limits) in enumerate(rows):
        for column, time in enumerate(times):
            heading = f"t = {time:.3g}" if row == 0 else ""
            image = _show(axes[row][column], values[column], heading, colours, limits)
        figure.colorbar(image, ax=list(axes[row]), shrink=0.9, pad=0.01)
        label = ("truth", "prediction", "difference")[row]
        axes[row][0].set_ylabel(f"{name}, {label}", fontsize=9)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def spectra(
    truth_CK: NDArray[Any],
    prediction_CK: NDArray[Any],
    error_CK: NDArray[Any],
    names: Sequence[str],
    title: str = "",
) -> Figure:
    """Power over wave number of truth, prediction and error, one panel per channel, log-log."""
    columns = min(4, len(names))
    rows = math.ceil(len(names) / columns)
    figure = new_figure(0.4 + 3.3 * columns, 0.3 + 2.9 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    lines = ((truth_CK, "truth", "-"), (prediction_CK, "prediction", "--"), (error_CK, "error", ":"))
    for channel, (axis, name) in enumerate(zip(axes, names, strict=False)):
        for (values, label, style), colour in zip(lines, COLOURS, strict=False):
            power = np.asarray(values)[channel, 1:]
            power = np.where(power > 0, power, np.nan)
            axis.plot(np.arange(1, len(power) + 1), power, style, color=colour, label=label, linewidth=1.6)
        if np.max(np.asarray(truth_CK)[channel, 1:], initial=0) > 0:
            axis.set_xscale("log")
            axis.set_yscale("log")
        _dress(axis, title=name, x="wave number", y="power")
    axes[0].legend(frameon=False, fontsize=8)
    for axis in axes[len(names) :]:
        axis.set_visible(False)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def error_over_time(times: Sequence[float], curves: Mapping[str, Sequence[float]], title: str = "") -> Figure:
    """Relative error over time, one line per quantity."""
    figure = new_figure(5.4, 3.6)
    axis = figure.subplots()
    for (label, values), colour in zip(curves.items(), _cycle(len(curves)), strict=True):
        axis.plot(times, values, "o-", color=colour, label=label, linewidth=1.6, markersize=4)
    _dress(axis, title=title, x="time", y="median relative L1 error [%]")
    axis.set_ylim(0, 1.08 * _largest([*curves.values()]))
    axis.legend(frameon=False, fontsize=8)
    return figure


def scaling_curves(
    curves: Sequence[ScalingCurve], title: str = "", ylabel: str = "median relative L1 error [%]"
) -> Figure:
    """Error over training trajectories in log-log, with the fitted power laws as thin lines."""
    figure = new_figure(5.8, 4.2)
    axis = figure.subplots()
    for curve, colour in zip(curves, _cycle(len(curves)), strict=True):
        label = curve.name
        if law := fit_power_law(curve):
            label += rf" ($\alpha$ = {law.exponent:.2f})"
            fit = [law.coefficient * s**-law.exponent for s in curve.samples]
            axis.plot(curve.samples, fit, "-", color=colour, linewidth=0.8, alpha=0.6)
        axis.plot(curve.samples, curve.errors, "o", color=colour, label=label, markersize=5)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    for formatted in (axis.xaxis, axis.yaxis):
        formatted.set_major_formatter(lambda value, _: f"{value:g}")
    axis.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
    _dress(axis, title=title, x="training trajectories", y=ylabel)
    axis.legend(frameon=False, fontsize=8)
    return figure


def _show(axis: Axes, field_XY: NDArray[Any], title: str, colours: str, limits: tuple[float, float]) -> Any:
    """Draw one field without ticks."""
    image = axis.imshow(
        field_XY.T, origin="lower", cmap=colours, vmin=limits[0], vmax=limits[1], interpolation="nearest"
    )
    axis.set_title(title, fontsize=9)
    axis.set_xticks([])
    axis.set_yticks([])
    return image


def _largest(values: ArrayLike) -> float:
    """Largest finite magnitude, or 1 where all are zero or none is finite: a diverged run is drawn, too."""
    magnitudes = np.abs(np.asarray(values, dtype=float))
    return float(np.max(magnitudes, initial=0.0, where=np.isfinite(magnitudes))) or 1.0


def _limits(values: NDArray[Any]) -> tuple[float, float]:
    """Colour limits; a constant field gets a small interval round its value."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    if high - low < 1e-12 * max(abs(low), abs(high), 1e-300):
        margin = 0.5 * abs(low) or 0.5
        return low - margin, high + margin
    return low, high


def _dress(axis: Axes, *, title: str, x: str, y: str) -> None:
    """Labels, light grid, no box."""
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(x, fontsize=9)
    axis.set_ylabel(y, fontsize=9)
    axis.tick_params(labelsize=8, which="both")
    axis.grid(True, which="major", linewidth=0.4, alpha=0.5)
    axis.spines[["top", "right"]].set_visible(False)


def _cycle(count: int) -> list[str]:
    """As many line colours as needed."""
    return [COLOURS[index % len(COLOURS)] for index in range(count)]
