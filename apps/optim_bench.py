"""``thalweg bench optim``: an honest ladder of optimizers on small problems that need no download."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from thalweg.apps.optim_report import Row
    from thalweg.apps.optim_trial import Archive, Trial


def optim(
    *,
    optimizers: str = "all",
    problems: str = "all",
    budget: int = 8,
    seeds: int = 3,
    length: float = 1.0,
    out: str = "runs/optim_bench",
    plots: bool = True,
) -> None:
    """Tune each optimizer over the same budget and compare them at the end of the full schedule.

    Tuned are the learning rate and the weight decay, by BUDGET full runs on one seed, scored on validation
    data. Everything else stays at each rule's defaults. Reported are the scores on test data of SEEDS other
    seeds. A stopped ladder continues when it is given again.

    Args:
        optimizers: Names, comma-separated, as in ``thalweg optim list``, and sam (around AdamW); or all.
        problems: Names, comma-separated; or all.
        budget: Runs to choose learning rate and weight decay, for each optimizer and problem.
        seeds: Runs of the chosen ones, from other initial weights and in another order of batches.
        length: Factor on the number of steps of every problem.
        out: Folder for results.json, table.md, the plots and trials/, one line per run.
        plots: Draw the plots.

    Raises:
        ValueError: If a name is unknown or a number is not allowed.
    """
    import torch

    from thalweg.apps import optim_report
    from thalweg.apps.optim_problems import PROBLEMS
    from thalweg.apps.optim_trial import Archive, names

    for option, value in (("budget", budget), ("seeds", seeds)):
        if value < 1:
            raise ValueError(f"{option} is {value}, allowed: an integer >= 1")
    if not length > 0:
        raise ValueError(f"length is {length}, allowed: a number > 0")
    chosen = pick(optimizers, names(), "optimizer")
    tasks = pick(problems, list(PROBLEMS), "problem")
    folder = Path(out)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = climb(Archive(folder / "trials"), chosen, tasks, budget, seeds, length)
    finally:
        torch.set_num_threads(threads)
    optim_report.write(folder, rows, budget=budget, seeds=seeds, length=length, plots=plots)


def pick(words: str, known: Iterable[str], what: str) -> list[str]:
    """The named ones, in the order of the known.

    Raises:
        ValueError: Naming the unknown one and the known.
    """
    from thalweg.apps.errors import near

    known = list(known)
    if words == "all":
        return known
    wanted = [word.strip() for word in words.split(",") if word.strip()]
    for word in wanted:
        if word not in known:
            allowed = f"all, {', '.join(known)}"
            raise ValueError(f"{what} {word!r} is unknown.{near(word, known)} Allowed: {allowed}")
    if not wanted:
        raise ValueError(f"no {what} is given, allowed: all, {', '.join(known)}")
    return [name for name in known if name in wanted]


def climb(
    archive: Archive, optimizers: list[str], problems: list[str], budget: int, seeds: int, length: float
) -> list[Row]:
    """Run what is missing, with a progress bar."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from thalweg.apps.optim_problems import PROBLEMS

    bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    rows: list[Row] = []
    with bar:
        job = bar.add_task("ladder", total=len(optimizers) * len(problems) * (budget + seeds))
        for problem in problems:
            steps = max(1, round(PROBLEMS[problem].steps * length))
            for optimizer in optimizers:
                bar.update(job, description=f"{problem} {optimizer}")
                row = tune_and_run(archive, problem, optimizer, steps, budget, seeds)
                choice = f"{row.mean:.4g} with lr {row.lr:.2g}, decay {row.weight_decay:g}"
                bar.console.print(f"{problem:<14}{optimizer:<20}{choice}", highlight=False)
                rows.append(row)
                bar.advance(job, budget + seeds)
    return rows


def tune_and_run(archive: Archive, problem: str, optimizer: str, steps: int, budget: int, seeds: int) -> Row:
    """Choose learning rate and decay on seed 0, then run the choice on the others."""
    from thalweg.apps.optim_problems import PROBLEMS
    from thalweg.apps.optim_report import Row
    from thalweg.apps.optim_trial import Trial, decays, default_rate
    from thalweg.apps.optim_tuning import Point, at_edge, best, next_point

    def trial(point: Point, seed: int) -> Trial:
        split = "test" if seed else "valid"
        return Trial(problem, optimizer, *point, seed=seed, steps=steps, split=split)  # type: ignore[arg-type]

    scores: dict[Point, float] = {}
    while (point := next_point(scores, decays(optimizer), budget)) is not None:
        scores[point] = archive.get(PROBLEMS[problem], trial(point, 0)).value
    chosen = best(scores)
    outcomes = [archive.get(PROBLEMS[problem], trial(chosen, seed)) for seed in range(1, seeds + 1)]
    return Row(
        problem=problem,
        optimizer=optimizer,
        lr=default_rate(optimizer) * 10.0 ** (chosen[0] / 4),
        weight_decay=chosen[1],
        at_edge=at_edge(scores, chosen),
        diverged=sum(score == float("inf") for score in scores.values()),
        tuning=[(default_rate(optimizer) * 10.0 ** (k / 4), d, score) for (k, d), score in scores.items()],
        outcomes=outcomes,
    )
