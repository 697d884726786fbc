"""``thalweg gains``: efficiency and accuracy gains from scaling curves, as table, JSON and picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from thalweg.pde.gains import Gain, ScalingCurve


def gains(
    *,
    curve: dict[str, str],
    reference: str = "fno",
    ag_at: int | None = None,
    eg_at: int | None = None,
    metric: str = "scored_median_relative_l1_error",
    out: str = "runs/gains",
    plots: bool = True,
) -> None:
    """Compare scaling curves: AG_S and EG_S over a reference, power-law fits, and the log-log plot.

    Give one curve per model, e.g. ``--curve.poseidon runs/eval_p --curve.fno fno.csv``. A curve is a
    comma-separated list of files, folders or quoted patterns: results of ``thalweg evaluate``, or CSV/JSON
    tables with ``trajectories`` and ``error``.

    Args:
        curve: Sources of each model's curve.
        reference: Model to compare with.
        ag_at: Number of trajectories at which AG is taken; by default 128, or the largest that every curve
            covers if 128 is not among them.
        eg_at: Number of trajectories of the reference at which EG is taken; by default 1024, or the largest
            that the reference covers.
        metric: Metric read from evaluation results.
        out: Folder for gains.json and scaling.png.
        plots: Draw the plot.

    Raises:
        ValueError: If the reference has no curve, or a number lies outside the measured range.
    """
    from dataclasses import asdict

    from thalweg.apps.errors import near
    from thalweg.apps.results import write_json
    from thalweg.pde import gains as library

    if reference not in curve:
        hint = near(reference, curve)
        raise ValueError(f"the reference {reference!r} has no curve.{hint} Curves: {', '.join(curve)}")
    curves = {name: library.read_curve(name, source, metric) for name, source in curve.items()}
    base = curves[reference]
    ag_samples = ag_at or _default(128, list(curves.values()))
    eg_samples = eg_at or _default(1024, [base])
    result = library.compare(curves.values(), base, ag_samples, eg_samples)
    report = {
        "reference": reference,
        "metric": metric,
        "ag_samples": ag_samples,
        "eg_samples": eg_samples,
        "curves": {c.name: {"trajectories": c.samples, "error": c.errors} for c in curves.values()},
        "gains": [{**asdict(gain), "efficiency": gain.efficiency} for gain in result],
    }
    write_json(report, Path(out) / "gains.json")
    if plots:
        from thalweg.pde.plots import save, scaling_curves

        save(scaling_curves(list(curves.values())), Path(out) / "scaling.png")
    print_table(result, ag_samples, eg_samples)
    print(f"written to {out}")


def _default(wanted: int, curves: list[ScalingCurve]) -> int:
    """The paper's number if all curves cover it, else the largest that they share."""
    low, high = max(c.samples[0] for c in curves), min(c.samples[-1] for c in curves)
    if low > high:
        raise ValueError("the curves share no number of trajectories; choose --ag_at and --eg_at")
    return max(low, min(wanted, high))


def print_table(gains: list[Gain], ag_samples: int, eg_samples: int) -> None:
    """Print one row per model."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for heading in ("model", f"AG at {ag_samples}", f"EG at {eg_samples}", "fit: error = C S^-alpha"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for gain in gains:
        law = gain.power_law
        fit = f"{law.coefficient:.3g} S^-{law.exponent:.3f}" if law else "-"
        table.add_row(gain.model, f"{gain.accuracy_gain:.2f}", gain.efficiency, fit)
    Console().print(table)
