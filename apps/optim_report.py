"""What ``thalweg bench optim`` writes: JSON, a table in Markdown and on the console, and plots."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thalweg.apps.optim_problems import PROBLEMS
from thalweg.apps.optim_trial import GIVEN, Outcome
from thalweg.apps.report import show
from thalweg.apps.results import provenance, write_json
from thalweg.checkpoints.atomic import write_text


@dataclass(frozen=True)
class Row:
    """One optimizer on one problem."""

    problem: str
    optimizer: str
    lr: float
    """Chosen learning rate."""
    weight_decay: float
    """Chosen decay."""
    at_edge: bool
    """The chosen rate is the lowest or highest that was tried."""
    diverged: int
    """Tuning runs that diverged."""
    tuning: list[tuple[float, float, float]]
    """Learning rate, decay and score of each tuning run."""
    outcomes: list[Outcome]
    """Runs of the choice."""

    @property
    def mean(self) -> float:
        """Mean score over the seeds, infinite if one diverged."""
        return statistics.fmean(outcome.value for outcome in self.outcomes)

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds."""
        values = [outcome.value for outcome in self.outcomes]
        return statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else 0.0

    @property
    def state(self) -> float:
        """Bytes of state per byte of parameters."""
        return self.outcomes[0].state_bytes / self.outcomes[0].parameter_bytes

    @property
    def cpu_s(self) -> float:
        """Least CPU seconds of a run."""
        return min(outcome.cpu_s for outcome in self.outcomes)

    @property
    def step_ms(self) -> float:
        """Least CPU milliseconds of a step without its gradients."""
        return min(1e3 * outcome.step_cpu_s / outcome.trial.steps for outcome in self.outcomes)


def protocol(budget: int, seeds: int, length: float) -> str:
    """What was tuned and what was not, in words."""
    scaled = "" if length == 1.0 else f", {length:g} times as long as usual"
    given = "; ".join(
        f"{name} " + ", ".join(f"{k} {str(v).lower()}" for k, v in options.items())
        for name, options in GIVEN.items()
    )
    return (
        f"Tuned for each optimizer on each problem, over the same {budget} runs: the learning rate and the"
        " weight decay (0 or 0.1), by the score on validation data with seed 0. Not tuned: everything else,"
        f" at each rule's defaults, but for {given}. Compared at the end of the full schedule{scaled}"
        " (5 % warm-up, then linear to 0; schedule-free stays constant) on test data, mean and standard"
        f" deviation over {seeds} other seeds. Parameters that a rule does not take are stepped by AdamW. A"
        " choice marked ^ is the lowest or highest learning rate that was tried: its optimizer may do better."
    )


def write(folder: Path, rows: Sequence[Row], *, budget: int, seeds: int, length: float, plots: bool) -> None:
    """Write results.json, table.md and the plots, and print the tables."""
    text = protocol(budget, seeds, length)
    write_json(
        {
            "protocol": text,
            **{"budget": budget, "seeds": seeds, "length": length},
            "mean_rank": mean_ranks(rows),
            "rows": [as_json(row) for row in rows],
            "provenance": provenance(),
        },
        folder / "results.json",
    )
    write_text(folder / "table.md", markdown(rows, text))
    print_tables(rows, text)
    if plots:
        from thalweg.apps.optim_plots import draw

        draw(rows, folder)
    print(f"wrote {folder}/results.json, table.md" + (", scores.png and tuning.png" if plots else ""))


def as_json(row: Row) -> dict[str, Any]:
    """A row with all its numbers."""
    return {
        **{"problem": row.problem, "optimizer": row.optimizer, "mean": row.mean, "std": row.spread},
        **{"lr": row.lr, "weight_decay": row.weight_decay, "lr_at_edge": row.at_edge},
        **{"state_per_parameter": row.state, "state_bytes": row.outcomes[0].state_bytes},
        **{"cpu_s": row.cpu_s, "step_ms": row.step_ms, "diverged_while_tuning": row.diverged},
        "scores": [outcome.value for outcome in row.outcomes],
        "curves": [outcome.curve for outcome in row.outcomes],
        "tuning": [{"lr": lr, "weight_decay": decay, "score": score} for lr, decay, score in row.tuning],
    }


def by_problem(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows of each problem, best first."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.problem, []).append(row)
    return {problem: sorted(members, key=lambda row: row.mean) for problem, members in found.items()}


def mean_ranks(rows: Sequence[Row]) -> dict[str, float]:
    """Mean place of each optimizer over the problems, best first; ties share the mean of their places."""
    places: dict[str, list[float]] = {}
    for members in by_problem(rows).values():
        means = [row.mean for row in members]
        for row in members:
            tied = [place for place, mean in enumerate(means, start=1) if mean == row.mean]
            places.setdefault(row.optimizer, []).append(statistics.fmean(tied))
    ranks = {name: statistics.fmean(found) for name, found in places.items()}
    return dict(sorted(ranks.items(), key=lambda pair: pair[1]))


def summary(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table of all optimizers on all problems, best mean rank first."""
    problems = list(by_problem(rows))
    cells = {(row.optimizer, row.problem): row for row in rows}
    best = {problem: members[0].optimizer for problem, members in by_problem(rows).items()}
    lines = []
    for name, rank in mean_ranks(rows).items():
        line = [name, f"{rank:.1f}"]
        for problem in problems:
            row = cells[name, problem]
            text = f"{row.mean:.3g}{'^' if row.at_edge else ''}"
            line.append(f"**{text}**" if best[problem] == name else text)
        lines.append(line)
    return ["optimizer", "mean rank", *problems], lines


def details(members: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table of one problem."""
    header = ["optimizer", "score", "+-", "lr", "decay", "state x", "step ms", "CPU s"]
    lines = [
        [
            row.optimizer,
            show(row.mean),
            f"{row.spread:.1g}",
            f"{row.lr:.2g}{'^' if row.at_edge else ''}",
            f"{row.weight_decay:g}",
            f"{row.state:.2f}",
            f"{row.step_ms:.2f}",
            f"{row.cpu_s:.1f}",
        ]
        for row in members
    ]
    return header, lines


def markdown(rows: Sequence[Row], text: str) -> str:
    """All tables, the one over all problems first."""
    parts = ["# Ladder of optimizers", text, _table(*summary(rows))]
    for name, members in by_problem(rows).items():
        problem = PROBLEMS[name]
        steps = members[0].outcomes[0].trial.steps
        parts += [
            f"## {name}",
            f"{problem.summary}; {problem.score}; {steps} steps.",
            _table(*details(members)),
        ]
    return "\n\n".join(parts) + "\n"


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    marks = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, marks, *lines))


def print_tables(rows: Sequence[Row], text: str) -> None:
    """The same on the console."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 120)
    console.print(f"\n{text}\n", highlight=False)
    for title, (header, lines) in (
        ("all problems", summary(rows)),
        *((name, details(members)) for name, members in by_problem(rows).items()),
    ):
        table = Table(title=title, title_justify="left", box=None, header_style="bold")
        for index, heading in enumerate(header):
            table.add_column(heading, justify="right" if index else "left")
        for line in lines:
            table.add_row(*(cell.replace("**", "") for cell in line))
        console.print(table)
