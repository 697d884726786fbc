"""The report of a search: what was found, what it cost, and what it draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from thalweg.apps.report import Report

SHOWN = 6
"""Schedulers of diffusers in the plot, the best ones."""
IMAGES = 10
"""Images in a row of the grids."""


def write_report(folder: Path, report: dict[str, Any]) -> Path:
    """Write ``report.html`` beside a search's results, with ``quality.png`` and ``samples_N.png``."""
    about, rows = report["provenance"], report["schedules"]
    comparison = report.get("comparison", {})
    page = Report(
        title="Solver schedules found by search",
        subtitle=f"{Path(report['model']).name}; thalweg {about['thalweg']}, torch {about['torch']}, "
        f"{about['machine']}",
    )
    settings = report["settings"]
    page.add_text(
        f"Objective: {settings['objective']}. For each number of network evaluations "
        f"{settings['budget']} schedules were judged on the same {max(settings['samples'])} noises"
        + (", part of them with weights fitted to a fine solver's path" if settings["fit"] else "")
        + (", bred on the guesses of a predictor" if settings["predictor"] else "")
        + (f", and the best refined by {settings['refine']} gradient steps" if settings["refine"] else "")
        + f". The finalists were judged again on {settings['fresh']} other noises: the numbers below."
    )
    add_found(page, rows)
    if comparison:
        add_comparison(page, comparison)
    if (picture := plot(folder, rows, comparison)) is not None:
        page.add_image(picture, "Error against the number of network evaluations")
    for picture in grids(folder, report):
        page.add_image(
            picture,
            f"{picture.stem.removeprefix('samples_')} evaluations. Rows: fine solver, ours"
            + (", best of diffusers" if comparison else ""),
        )
    page.add_heading("Use")
    page.add_commands(
        [
            "from thalweg.diffusion.solvers.scheduler import SearchedScheduler",
            f'pipe.scheduler = SearchedScheduler.from_pretrained("{folder / "scheduler"}")',
            f"images = pipe(..., num_inference_steps={rows[0]['nfe']}).images",
        ]
    )
    return page.write(folder / "report.html")


def add_found(page: Report, rows: list[dict[str, Any]]) -> None:
    """What each search found and what it cost."""
    page.add_heading("Found")
    header = ["evaluations", "error", "how", "known solver on a plain grid", "schedules tried",
              "network evaluations", "seconds"]  # fmt: skip
    table = [
        [
            row["nfe"],
            row["error"],
            row["winner"],
            row["best_known_solver_error"],
            row["evaluated"],
            f"{row['network_evaluations'] + row['refined'].get('network_evaluations', 0):,}",
            row["seconds"],
        ]
        for row in rows
    ]
    page.add_table(header, table)
    taus = [(row["nfe"], row["predictor_tau"]) for row in rows if row["predictor_tau"]]
    if taus:
        words = "; ".join(f"{nfe}: {', '.join(f'{tau:.2f}' for tau in values)}" for nfe, values in taus)
        page.add_text(
            f"Kendall's tau of the predictor with each new round, before it learnt from it: {words}.",
            note=True,
        )


def add_comparison(page: Report, comparison: dict[str, Any]) -> None:
    """The best variant of every scheduler of diffusers."""
    page.add_heading("Against the schedulers of diffusers")
    families = dict.fromkeys(r["family"] for at in comparison.values() for r in at["rivals"])
    errors = {
        family: [
            next((r["error"] for r in at["rivals"] if r["family"] == family), None)
            for at in comparison.values()
        ]
        for family in families
    }
    order = sorted(families, key=lambda f: next((e for e in errors[f] if e is not None), float("inf")))
    rows: list[list[object]] = [["ours", *(at["error"] for at in comparison.values())]]
    rows += [[family, *errors[family]] for family in order]
    page.add_table(["scheduler", *(f"{n} evaluations" for n in comparison)], rows, best=0)
    page.add_text(
        "Median distance to the end of a fine solver from the same noises, other ones than the search and "
        "its finals saw. Each class is represented by its best variant of order, grid and end.",
        note=True,
    )


def plot(folder: Path, rows: list[dict[str, Any]], comparison: dict[str, Any]) -> Path | None:
    """Draw error against evaluations; None without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    nfes = [row["nfe"] for row in rows]
    ours = [comparison.get(str(row["nfe"]), row)["error"] for row in rows]
    if comparison:
        curves: dict[str, dict[int, float]] = {}
        for nfe, at in comparison.items():
            for rival in at["rivals"]:
                curves.setdefault(rival["family"], {})[int(nfe)] = rival["error"]
        for family in sorted(curves, key=lambda f: min(curves[f].values()))[:SHOWN]:
            axes.plot(list(curves[family]), list(curves[family].values()), "o-", lw=1, ms=3, label=family)
    elif all(row["best_known_solver_error"] is not None for row in rows):
        axes.plot(
            nfes, [row["best_known_solver_error"] for row in rows], "o-", lw=1, ms=3, label="known solver"
        )
    axes.plot(nfes, ours, "s-", color="black", lw=2, label="ours")
    if min(ours) > 0:
        axes.set_yscale("log")
    axes.set(xlabel="network evaluations", ylabel="error")
    axes.set_xticks(nfes)
    axes.legend(fontsize=8)
    path = folder / "quality.png"
    figure.savefig(path, dpi=120)
    return path


def grids(folder: Path, report: dict[str, Any]) -> list[Path]:
    """Draw rows of images from the same noises: a fine solver, ours, the best of diffusers."""
    import torch
    from diffusers.utils.pil_utils import numpy_to_pil

    from thalweg.diffusion.s3.samplers import open_sampler
    from thalweg.diffusion.sheet import grid
    from thalweg.diffusion.solvers.scheduler import SearchedScheduler

    settings, comparison = report["settings"], report.get("comparison", {})
    options = settings.get("options") or {}
    sampler: Any = open_sampler(
        "cpu" if not torch.cuda.is_available() else "cuda",
        report["model"],
        IMAGES,
        settings["seed"] + 4_000_037,
        settings["guidance_scale"],
        IMAGES,
        options.get("prompts"),
        options.get("classes"),
        output="image",
    )
    schedules = SearchedScheduler.from_pretrained(folder / "scheduler").schedules
    teacher = sampler.images(sampler.draw(sampler.teacher()))
    paths = []
    for row in report["schedules"]:
        lines = [teacher, sampler.images(sampler.draw(schedules[row["nfe"]]))]
        rivals = comparison.get(str(row["nfe"]), {}).get("rivals", [])
        if rivals and hasattr(sampler, "x_T"):
            from thalweg.diffusion.library import run_library

            scale = 1.0 if settings["guidance_scale"] is None else settings["guidance_scale"]
            end = run_library(
                rivals[0]["name"],
                sampler.denoiser.pipeline,
                sampler.x_T,
                sampler.labels,
                nfe=row["nfe"],
                guidance_scale=scale,
            )
            lines.append(sampler.images(end))
        path = folder / f"samples_{row['nfe']}.png"
        grid(numpy_to_pil(torch.cat(lines).cpu().permute(0, 2, 3, 1).numpy()), IMAGES).save(path)
        paths.append(path)
    return paths
