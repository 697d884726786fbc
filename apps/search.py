"""``thalweg search``: the best solver schedules of a model, as a scheduler for diffusers pipelines."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from thalweg.apps.search_task import Pools, Task
    from thalweg.diffusion.s3.evolution import Evolution
    from thalweg.diffusion.s3.fit import Path as TeacherPath
    from thalweg.diffusion.s3.genes import Genes
    from thalweg.diffusion.s3.pool import Pool
    from thalweg.diffusion.s3.space import SearchSpace
    from thalweg.diffusion.s3.start import Starts
    from thalweg.diffusion.schedules import NoiseSchedule
    from thalweg.diffusion.solvers.linear import LinearSchedule
    from thalweg.diffusion.solvers.schedule import SolverSchedule

    Schedule = SolverSchedule | LinearSchedule

FINALISTS = 8
"""Candidates of a search that are judged again on other noises."""
SEEDS = 16
"""Candidates with fitted weights from which the search of weights and decisions starts."""
REFINED = 3
"""Candidates from which a refinement starts."""


def search(
    *,
    model: str,
    nfe: tuple[int, ...] = (5, 8),
    out: str = "runs/search",
    objective: str = "teacher",
    options: dict[str, Any] | None = None,
    budget: int = 100,
    fit: int = 72,
    gits: bool = False,
    samples: tuple[int, ...] = (16, 64),
    fresh: int = 128,
    predictor: bool = True,
    refine: int = 0,
    examples: int = 96,
    max_order: int = 3,
    guidance_scale: float | None = 1.0,
    pool: Literal["auto", "inline", "process", "ray", "submitit"] = "auto",
    workers: int = 1,
    devices: tuple[str, ...] = ("cpu",),
    pool_options: dict[str, Any] | None = None,
    compare: bool = True,
    variants: int | None = None,
    seed: int = 0,
) -> None:
    """Search the solver schedules of a diffusers pipeline and write them as a scheduler folder.

    A stopped search continues when it is given again. The result, OUT/scheduler, is used as
    ``pipe.scheduler = SearchedScheduler.from_pretrained("OUT/scheduler")``; OUT/report.html compares it.

    Args:
        model: Folder of a pipeline, as ``thalweg export`` or diffusers writes it, or its name on the Hub.
        nfe: Network evaluations per sample, one search each.
        out: Folder for the searches' states, the scheduler, results.json and report.html.
        objective: What is minimised: teacher (median distance to a fine solver), multiscale, features, fid,
            kid, or reward.
        options: More arguments of the objective, such as prompts, reference or teacher_steps.
        budget: Schedules to evaluate for each number of evaluations.
        fit: How many of them, at most three quarters, are times alone, with weights that least squares fit to
            the fine solver's path; the others start from these. 0 for known and random solvers alone.
        gits: Begin with grids as well that dynamic programming finds on the fine solver's path (GITS); takes
            a model in this process beside those of the workers.
        samples: Samples on which a schedule is judged; with several numbers all candidates are judged on the
            fewest, and the better half of them on the next.
        fresh: Samples from other noises on which the finalists are judged, and again those of the comparison.
        predictor: Breed on the guesses of a predictor that learns from all evaluations so far.
        refine: Iterations of gradient refinement of the best; 0 treats the model as a black box.
        examples: Noises that the refinement learns from, of which a quarter judge.
        max_order: Highest order of a step.
        guidance_scale: Classifier-free guidance of the searched sampler; null for the pipeline's default.
        pool: Where candidates run; auto is this process for one worker and processes for more.
        workers: Workers that evaluate, each with a copy of the model.
        devices: Device of each worker, in turn.
        pool_options: More arguments of the pool, such as address (ray) or cluster (submitit).
        compare: Judge the schedulers of diffusers on the same noises.
        variants: Variants (order, grid, end) of each scheduler of diffusers to try; all if left out, four
            where the pipeline makes latents.
        seed: Seed of the search and of the noises.

    Raises:
        ValueError: If the folder holds no pipeline that is understood, OUT holds another search, or a name or
            number is not allowed.
    """
    from thalweg.apps.results import provenance, write_json
    from thalweg.apps.search_report import write_report
    from thalweg.apps.search_task import Pools, Task, check, keep_settings
    from thalweg.apps.search_view import print_table

    settings: dict[str, Any] = {
        **{"model": model, "objective": objective, "options": options, "budget": budget, "fit": fit},
        "gits": gits,
        **{"samples": samples, "fresh": fresh, "predictor": predictor, "refine": refine},
        **{"examples": examples, "max_order": max_order, "guidance_scale": guidance_scale, "seed": seed},
    }
    task = Task(
        model=model,
        out=Path(out),
        objective=objective,
        options={**(options or {}), "folder": model, "guidance_scale": guidance_scale},
        budget=budget,
        fit=min(fit, budget * 3 // 4),
        gits=gits,
        samples=tuple(sorted(set(samples))),
        fresh=fresh,
        predictor=predictor,
        refine=refine,
        examples=examples,
        max_order=max_order,
        seed=seed,
    )
    check(task, nfe)
    config, noise = network_for(model)
    keep_settings(settings, task.out / "settings.json")
    pools = Pools(task, pool, workers, devices, pool_options or {})
    rows, found = [], []
    try:
        for count in nfe:
            row, schedule = search_one(task, noise, pools, count, devices[0])
            rows.append(row)
            found.append(schedule)
    finally:
        pools.close()
    from thalweg.diffusion.draw import scheduler_of

    scheduler_of(config, found).save_pretrained(task.out / "scheduler")
    report: dict[str, Any] = {
        "model": model,
        "settings": settings,
        "schedules": rows,
        "provenance": provenance(),
    }
    if compare:
        from thalweg.apps.search_compare import compare_all

        report["comparison"] = compare_all(task, found, devices[0], variants)
    write_json(report, task.out / "results.json")
    page = write_report(task.out, report)
    print_table(rows, report.get("comparison", {}))
    print(f"scheduler {task.out / 'scheduler'}, report {page}")


def network_for(model: str) -> tuple[dict[str, Any], NoiseSchedule]:
    """What a pipeline's scheduler says about its network, and the noise schedule."""
    from thalweg.diffusion.draw import open_pipeline
    from thalweg.diffusion.from_diffusers import network_of

    pipe: Any = open_pipeline(model)
    config = dict(pipe.scheduler.config)
    return config, network_of(config)[0]


def search_one(
    task: Task, noise: NoiseSchedule, pools: Pools, nfe: int, device: str
) -> tuple[dict[str, Any], Schedule]:
    """Search, refine and choose for one number of evaluations; its row of the results, and the schedule."""
    from thalweg.apps.search_task import FRESH
    from thalweg.apps.search_view import with_progress
    from thalweg.diffusion.s3.judge import rerank
    from thalweg.diffusion.s3.seeds import gits_seeds

    begun = time.perf_counter()
    pool = pools.get(0, task.samples[-1])
    space, starts = space_for(task, noise, nfe, pool)
    path = pools.path(device) if task.gits else None
    fitted = fit_times(task, space, pool, path) if task.fit else None
    given = [] if path is None else gits_seeds(space, path)
    evolution = evolution_for(task, space, given if fitted is None else fitted.fitted(SEEDS))
    budget, state = task.budget - task.fit, task.out / f"search_{nfe}.json"
    with_progress(evolution, pool, f"{nfe} evaluations", budget, state)
    fresh = pools.get(FRESH, task.fresh)
    winner, table = rerank(evolution, fresh, FINALISTS)
    schedule, score, how = winner.schedule, winner.fresh, "searched"
    known = min((judged.fresh.value for judged in table if judged.known), default=None)
    refined: dict[str, Any] = {}
    if task.refine:
        best = [evolution.space.schedule(genes) for genes, _ in evolution.best(REFINED)]
        other, refined = refined_of(task, noise, best, nfe, pools, device)
        ((_, judged),) = fresh.scores([(0, other)])
        if judged.value < score.value:
            schedule, score, how = other, judged, "refined"
    parts = [evolution] if fitted is None else [fitted, evolution]
    row = {
        "nfe": nfe,
        "winner": how,
        "error": score.value,
        "noise": score.noise,
        "searched_error": winner.fresh.value,
        "fitted_error": None if fitted is None else fitted.best()[0][1].value,
        "best_known_solver_error": known,
        "evaluated": sum(len(part.scores) for part in parts),
        "network_evaluations": sum(part.network_evaluations for part in parts) + starts.network_evaluations,
        "starts": starts.errors,
        "predictor_tau": [tau for tau in evolution.taus if tau is not None],
        "refined": refined,
        "seconds": round(time.perf_counter() - begun, 1),
    }
    return row, schedule


def space_for(task: Task, noise: NoiseSchedule, nfe: int, pool: Pool) -> tuple[SearchSpace, Starts]:
    """Where to search: from the first time at which known solvers do best, found anew or read again."""
    from dataclasses import asdict, replace

    from thalweg.apps.results import write_json
    from thalweg.diffusion.s3.space import SearchSpace
    from thalweg.diffusion.s3.start import Starts, choose_start

    predictions = ("noise", "data", "velocity") if noise.kind == "flow" else ("noise", "data")
    space = SearchSpace(
        noise=noise, nfe=nfe, max_order=task.max_order, predictions=predictions, free_weights=0.5
    )
    path = task.out / f"start_{nfe}.json"
    if path.is_file():
        found = Starts(**json.loads(path.read_text(encoding="utf-8")))
        return found.apply(space), found
    tried = replace(space, only_times=task.fit > 0)
    _, found = choose_start(tried, pool, count=task.samples[0], seed=task.seed)
    write_json(asdict(found), path)
    return found.apply(space), found


def fit_times(task: Task, space: SearchSpace, pool: Pool, path: TeacherPath | None) -> Evolution:
    """The search of times whose weights are fitted."""
    from dataclasses import replace

    from thalweg.apps.search_view import with_progress
    from thalweg.diffusion.s3.evolution import Evolution, EvolutionConfig
    from thalweg.diffusion.s3.seeds import gits_seeds, grid_seeds

    times = replace(space, only_times=True)
    config = EvolutionConfig(
        seed=task.seed,
        num_seeds=max(4, task.fit // 4),
        num_random=max(2, task.fit // 8),
        batch=max(4, min(16, task.fit // 8)),
        parents=8,
        counts=task.samples if len(task.samples) > 1 else (),
    )
    known = grid_seeds(times) + ([] if path is None else gits_seeds(times, path))
    evolution = Evolution(times, config, seeds=known)
    state = task.out / f"times_{space.nfe}.json"
    with_progress(evolution, pool, f"{space.nfe} evaluations, fitted weights", task.fit, state)
    return evolution


def evolution_for(task: Task, space: SearchSpace, seeds: Sequence[Genes] = ()) -> Evolution:
    """The search for a number of evaluations, from known solvers and the best with fitted weights."""
    from thalweg.diffusion.s3.evolution import Evolution, EvolutionConfig
    from thalweg.diffusion.s3.process import process_train

    left = task.budget - task.fit
    first = max(8, left // 3)
    near = task.fit > 0  # fitted weights are good for times near theirs
    config = EvolutionConfig(
        seed=task.seed,
        num_seeds=first * 3 // 4,
        num_random=first // 4,
        batch=max(8, min(32, left // 6)),
        width=0.1 if near else 0.4,
        min_width=0.005 if near else 0.03,
        parents=16,
        guided_generations=1,  # more generations chase the predictor's errors
        guided_pool=64,
        counts=task.samples if len(task.samples) > 1 else (),
    )
    return Evolution(space, config, process_train() if task.predictor else None, seeds=seeds)


def refined_of(
    task: Task, noise: NoiseSchedule, starts: Sequence[Schedule], nfe: int, pools: Pools, device: str
) -> tuple[Schedule, dict[str, Any]]:
    """Times and weights after gradient descent from the best; read again if it has been done before."""
    from thalweg.diffusion.s3.descent import Settings
    from thalweg.diffusion.s3.refine import refine
    from thalweg.diffusion.solvers.linear import LinearSchedule

    path = task.out / f"refined_{nfe}.json"
    if path.is_file():
        schedule = LinearSchedule.load(path)
        return schedule, dict(schedule.info["refined"]["cost"])
    print(f"{nfe} evaluations: refining by gradients, {task.refine} iterations", flush=True)
    denoiser, examples = pools.learning(device)
    cut = len(examples) * 3 // 4
    found = refine(
        list(starts),
        denoiser,
        examples.pick(slice(0, cut)),
        examples.pick(slice(cut, None)),
        noise_schedule=noise,
        settings=Settings(
            iterations=task.refine,
            learning_rates=(0.03,),
            scout=max(1, task.refine // 6),
            keep=1,
            seed=task.seed,
        ),
    )
    cost = {"network_evaluations": found.evaluations, "seconds": round(found.seconds, 1)}
    info = {"refined": {**found.schedule.info["refined"], "cost": cost}}
    schedule = LinearSchedule(
        nodes=found.schedule.nodes, weights=found.schedule.weights, first=found.schedule.first, info=info
    )
    schedule.save(path)
    return schedule, cost
