"""What ``thalweg search`` shows in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from thalweg.diffusion.s3.evolution import Evolution
    from thalweg.diffusion.s3.pool import Pool
    from thalweg.diffusion.s3.search import Progress


def with_progress(evolution: Evolution, pool: Pool, name: str, budget: int, state: Path) -> None:
    """Run a search with a progress bar and a table of the best after each round."""
    from rich.console import Group
    from rich.live import Live
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar
    from rich.table import Table

    from thalweg.diffusion.s3.search import run_search

    bar = Bar(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    job = bar.add_task(name, total=budget)
    rounds: dict[int, Progress] = {}

    def view() -> Group:
        table = Table(box=None, header_style="bold")
        for heading in ("round", "schedules", "network evaluations", "best so far", "predictor's tau"):
            table.add_column(heading, justify="right")
        for number, at in rounds.items():
            tau = "-" if at.tau is None else f"{at.tau:.2f}"
            table.add_row(
                str(number), str(at.evaluated), f"{at.network_evaluations:,}", f"{at.best:.4g}", tau
            )
        return Group(table, bar)

    with Live(view(), refresh_per_second=4) as live:

        def report(progress: Progress) -> None:
            rounds[progress.round] = progress
            bar.update(job, completed=min(progress.evaluated, budget))
            live.update(view())

        run_search(evolution, pool, budget, state, report)


def print_table(rows: list[dict[str, Any]], comparison: dict[str, Any]) -> None:
    """Print one row per number of evaluations."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", title="errors on noises that the search has not seen")
    for heading in ("evaluations", "ours", "known solver", "diffusers", "tried", "network runs", "s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        rivals = comparison.get(str(row["nfe"]), {})
        best = min((rival["error"] for rival in rivals.get("rivals", [])), default=None)
        cost = row["network_evaluations"] + row["refined"].get("network_evaluations", 0)
        table.add_row(
            str(row["nfe"]),
            f"{row['error']:.4g}",
            _against(row["error"], row["best_known_solver_error"]),
            _against(rivals.get("error", row["error"]), best),
            str(row["evaluated"]),
            f"{cost:,}",
            f"{row['seconds']:.0f}",
        )
    Console().print(table)


def _against(ours: float, other: float | None) -> str:
    """Another error, and by how much it is larger."""
    return "-" if other is None else f"{other:.4g} ({other / ours:.1f}x)" if ours > 0 else f"{other:.4g}"
