"""``thalweg search``: the best solver schedules of a model, as a scheduler for diffusers pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thalweg.diffusion.s3.evolution import Evolution
    from thalweg.diffusion.s3.pool import InlinePool, ProcessPool
    from thalweg.diffusion.s3.search import Progress
    from thalweg.diffusion.solvers.schedule import SolverSchedule

OBJECTIVE = "thalweg.diffusion.s3.image_model:image_objective"
FINALISTS = 8


def search(
    *,
    model: str,
    nfe: tuple[int, ...] = (5, 8),
    out: str = "runs/search",
    budget: int = 400,
    samples: int = 64,
    max_order: int = 3,
    guidance_scale: float = 1.0,
    workers: int = 1,
    devices: tuple[str, ...] = ("cpu",),
    seed: int = 0,
) -> None:
    """Search the solver schedules of an image pipeline and write them as a scheduler folder.

    A stopped search continues when it is given again. The result, OUT/scheduler, is used as
    ``pipe.scheduler = SearchedScheduler.from_pretrained("OUT/scheduler")``.

    Args:
        model: Folder of a pipeline, as ``thalweg export`` or diffusers writes it.
        nfe: Network evaluations per sample, one search each.
        out: Folder for the searches' states, the scheduler and results.json.
        budget: Schedules to evaluate for each number of evaluations.
        samples: Starting noises on which a schedule is judged; the finalists get as many others.
        max_order: Highest order of a step.
        guidance_scale: Classifier-free guidance of the searched sampler.
        workers: Processes that evaluate, each with a copy of the model; 1 for none but this one.
        devices: Device of each worker, in turn.
        seed: Seed of the search and of the noises.

    Raises:
        ValueError: If the folder holds no pipeline that is understood.
    """
    from thalweg.apps.results import provenance, write_json
    from thalweg.diffusion.from_diffusers import network_of
    from thalweg.diffusion.s3.image_model import scheduler_config
    from thalweg.diffusion.s3.pool import ObjectiveRef

    config = scheduler_config(model)
    noise, _ = network_of(config)
    folder = Path(out)
    options = {"folder": model, "count": samples, "guidance_scale": guidance_scale}
    judge = ObjectiveRef(function=OBJECTIVE, options={**options, "seed": 2 * seed})
    unseen = ObjectiveRef(function=OBJECTIVE, options={**options, "seed": 2 * seed + 1})
    pool = make_pool(judge, workers, devices)
    fresh = make_pool(unseen, workers, devices)
    rows, found = [], []
    try:
        for count in nfe:
            evolution = evolution_for(noise, count, max_order, seed)
            with_progress(evolution, pool, budget, folder / f"search_{count}.json", count)
            row, schedule = finals(evolution, fresh, count)
            rows.append(row)
            found.append(schedule)
    finally:
        pool.close()
        fresh.close()
    scheduler_of(config, noise.to_dict(), found).save_pretrained(folder / "scheduler")
    settings = {"budget": budget, "samples": samples, "seed": seed, "guidance_scale": guidance_scale}
    report = {"model": model, "settings": settings, "schedules": rows, "provenance": provenance()}
    write_json(report, folder / "results.json")
    print_table(rows)
    print(f"written to {folder / 'scheduler'}")


def make_pool(objective: Any, workers: int, devices: tuple[str, ...]) -> InlinePool | ProcessPool:
    """One process, this one, or several."""
    from thalweg.diffusion.s3.pool import InlinePool, ProcessPool

    if workers == 1:
        return InlinePool(objective.make(devices[0]))
    return ProcessPool(objective, workers, devices)


def evolution_for(noise: Any, nfe: int, max_order: int, seed: int) -> Evolution:
    """The search for a number of evaluations."""
    from thalweg.diffusion.s3.evolution import Evolution, EvolutionConfig
    from thalweg.diffusion.s3.space import SearchSpace

    space = SearchSpace(noise=noise, nfe=nfe, max_order=max_order)
    return Evolution(space, EvolutionConfig(seed=seed, num_seeds=96, num_random=32, batch=32))


def with_progress(evolution: Evolution, pool: Any, budget: int, state: Path, nfe: int) -> None:
    """Run a search with a progress bar."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    from thalweg.diffusion.s3.search import run_search

    text = TextColumn("{task.description}"), TextColumn("best {task.fields[best]}")
    with Bar(text[0], BarColumn(), MofNCompleteColumn(), text[1], TimeRemainingColumn()) as bar:
        task = bar.add_task(f"{nfe} evaluations", total=budget, best="-")

        def report(progress: Progress) -> None:
            bar.update(task, completed=min(progress.evaluated, budget), best=f"{progress.best:.4f}")

        run_search(evolution, pool, budget, state, report)


def finals(evolution: Evolution, fresh: Any, nfe: int) -> tuple[dict[str, Any], SolverSchedule]:
    """Judge the best, and the best known solver on a plain grid, on noises that the search has not seen."""
    space = evolution.space
    finalists = [space.schedule(genes) for genes, _ in evolution.best(FINALISTS)]
    seeds = set(space.seeds())
    ranked = sorted(evolution.scores, key=lambda n: (evolution.scores[n].value, n))
    known = next((n for n in ranked if evolution.archive[n] in seeds), None)
    if known is not None:
        finalists.append(space.schedule(evolution.archive[known]))
    scores = dict(fresh.scores(list(enumerate(finalists))))
    best = min(range(len(finalists)), key=lambda i: scores[i].value)
    row = {
        "nfe": nfe,
        "evaluated": len(evolution.scores),
        "error": scores[best].value,
        "best_known_solver_error": None if known is None else scores[len(finalists) - 1].value,
    }
    return row, finalists[best]


def scheduler_of(config: Any, noise: dict[str, Any], schedules: list[SolverSchedule]) -> Any:
    """The schedules behind the scheduler interface of diffusers, for the same network."""
    from thalweg.diffusion.solvers.scheduler import SearchedScheduler

    flow = noise["kind"] == "flow"
    return SearchedScheduler.from_schedules(
        schedules,
        prediction_type="flow_prediction" if flow else config.get("prediction_type", "epsilon"),
        num_train_timesteps=config.get("num_train_timesteps", 1000),
        noise_schedule=noise,
    )


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print one row per number of evaluations."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", title="median distance to the teacher, unseen noises")
    for heading in ("evaluations", "searched", "best known solver", "ratio", "schedules tried"):
        table.add_column(heading, justify="right")
    for row in rows:
        known = row["best_known_solver_error"]
        text = ("-", "-") if known is None else (f"{known:.4f}", f"{row['error'] / known:.2f}")
        table.add_row(str(row["nfe"]), f"{row['error']:.4f}", *text, str(row["evaluated"]))
    Console().print(table)
