"""Plots of ``thalweg bench optim``: final scores, and how they depend on the learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thalweg.apps.optim_problems import PROBLEMS
from thalweg.apps.optim_report import Row, by_problem

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(rows: Sequence[Row], folder: Path) -> None:
    """Write scores.png and tuning.png.

    Raises:
        ValueError: If matplotlib is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise ValueError("plots need matplotlib: pip install 'thalweg[plots]', or --no-plots") from None
    matplotlib.use("Agg")
    for name, figure in (("scores", scores(rows)), ("tuning", tuning(rows))):
        figure.savefig(folder / f"{name}.png", dpi=110)


def scores(rows: Sequence[Row]) -> Figure:
    """Score of every seed at the end, one panel per problem, best optimizer on top."""
    groups = by_problem(rows)
    figure, panels = _panels(len(groups), height=1.0 + 0.19 * max(map(len, groups.values())))
    for panel, (problem, members) in zip(panels, groups.items(), strict=False):
        for place, row in enumerate(reversed(members)):
            values = [o.value for o in row.outcomes if math.isfinite(o.value)]
            colour = "#b23a2e" if row.optimizer == "adamw" else "#0b6e8a"
            panel.plot(values, [place] * len(values), "o", ms=4, alpha=0.6, color=colour)
        panel.set_yticks(range(len(members)), [row.optimizer for row in reversed(members)])
        panel.set_xscale("log")
        _mark(panel, [o.value for row in members for o in row.outcomes if 0.0 < o.value < math.inf])
        panel.set_title(problem, fontsize=9)
        panel.set_xlabel(PROBLEMS[problem].score, fontsize=8)
        panel.grid(axis="x", alpha=0.3)
    return figure


def tuning(rows: Sequence[Row]) -> Figure:
    """Best validation score at every learning rate that was tried, in units of the rule's default."""
    groups = by_problem(rows)
    figure, panels = _panels(len(groups), height=3.0)
    for panel, (problem, members) in zip(panels, groups.items(), strict=False):
        for index, row in enumerate(members):
            best: dict[float, float] = {}
            for lr, _, score in row.tuning:
                factor = lr / row.tuning[0][0]
                best[factor] = min(score, best.get(factor, math.inf))
            points = sorted((k, v) for k, v in best.items() if math.isfinite(v))
            style = {"lw": 1.4, "alpha": 1.0} if index < 5 else {"lw": 0.7, "alpha": 0.35}
            label = row.optimizer if index < 5 else None
            panel.plot(*zip(*points, strict=True), ".-", label=label, **style) if points else None
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.yaxis.set_minor_formatter("")
        panel.set_title(f"{problem} (the best five named)", fontsize=9)
        panel.set_xlabel("learning rate / default", fontsize=8)
        panel.legend(fontsize=6)
        panel.grid(alpha=0.3)
    return figure


def _mark(panel: Any, values: Sequence[float]) -> None:
    """Three ticks on a logarithmic axis, at the ends of the data and between."""
    if values:
        low, high = min(values), max(values)
        ticks = sorted({low, math.sqrt(low * high), high})
        panel.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks])
    panel.xaxis.set_minor_formatter("")


def _panels(count: int, height: float) -> tuple[Figure, list[Any]]:
    from matplotlib import pyplot

    columns = min(count, 4)
    lines = math.ceil(count / columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(3.4 * columns, height * lines), layout="constrained", squeeze=False
    )
    panels = list(axes.flat)
    for panel in panels:
        panel.tick_params(labelsize=7)
    for panel in panels[count:]:
        panel.set_visible(False)
    return figure, panels
