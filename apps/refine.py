"""``thalweg refine``: a searched scheduler, refined for the distribution of its images."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from thalweg.diffusion.s3.examples import Examples
    from thalweg.diffusion.s3.goals import Distribution
    from thalweg.diffusion.s3.refine import Refined

LEARN, FRESH = 4_000_037, 5_000_011
"""What is added to the seed for the noises to learn from and those to report on."""


def refine(
    *,
    model: str,
    scheduler: str = "runs/search",
    nfe: tuple[int, ...] | None = None,
    out: str = "runs/refine",
    images: str = "mnist5k",
    features: str = "classifier",
    weights: str | None = None,
    weight: float = 0.15,
    iterations: int = 30,
    learning_rate: float = 0.02,
    examples: int = 600,
    batch: int = 200,
    fresh: int = 300,
    offsets: bool = True,
    guidance_scale: float = 1.0,
    device: str = "cpu",
    seed: int = 0,
) -> None:
    """Descend the Frechet distance of a scheduler's images to real ones, plus some distance to a fine solver.

    A search for the least distance to a fine solver ends at what the network makes of its noises, which other
    samplers may beat in distribution. This moves times, labels and weights of a scheduler's schedules along
    the gradient of both, through the network, for pipelines of pixels. Stopped, it continues when it is given
    again. The result, OUT/scheduler, is used as that of ``thalweg search``.

    Args:
        model: Folder of a pipeline.
        scheduler: Folder of the scheduler of ``thalweg search``.
        nfe: Its numbers of evaluations; all by default.
        out: Folder for the scheduler and results.json.
        images: Real images: a packaged set, or a folder.
        features: Extractor whose features are compared; it has to be differentiable.
        weights: File of its weights.
        weight: Of the distance to the fine solver beside the Frechet distance.
        iterations: Steps of Adam.
        learning_rate: Of Adam, falling to nought.
        examples: Noises to learn from, of which a quarter judge.
        batch: Noises of a step; several times the number of features is best.
        fresh: Other noises, of the numbers that are reported.
        offsets: Let the labels that the network is told differ from its noise levels.
        guidance_scale: Of classifier-free guidance.
        device: Where the networks run.
        seed: Of the noises.

    Raises:
        ValueError: If the folder holds no pipeline of pixels, OUT another refinement, or a number is not
            allowed.
    """
    from thalweg.apps.results import provenance, write_json
    from thalweg.apps.search_task import keep_settings
    from thalweg.diffusion.draw import choose_scheduler, scheduler_of
    from thalweg.diffusion.s3.descent import Settings
    from thalweg.diffusion.s3.image_model import image_examples, load_pipeline

    settings = {name: value for name, value in locals().items() if name in refine.__annotations__}
    settings = {name: value for name, value in settings.items() if name not in ("out", "nfe", "return")}
    for name in ("examples", "batch", "fresh"):
        if settings[name] < 8:
            raise ValueError(f"{name} is {settings[name]}, allowed: 8 and more")
    if weight < 0:
        raise ValueError(f"weight is {weight}, allowed: 0 and more")
    how = Settings(
        iterations=iterations,
        learning_rates=(learning_rate,),
        batch_size=batch,
        evaluate_every=max(1, iterations // 3),
        offsets=offsets,
        seed=seed,
    )
    pipe: Any = load_pipeline(model)
    known = getattr(choose_scheduler(pipe, scheduler), "schedules", {})
    counts = tuple(known) if nfe is None else nfe
    if missing := [count for count in counts if count not in known]:
        raise ValueError(f"nfe {missing} are not in {scheduler}, allowed: {sorted(known)}")
    folder = Path(out)
    keep_settings(settings, folder / "settings.json")
    goal = goal_for(pipe, images, features, weights, weight, device)
    given: dict[str, Any] = {"guidance_scale": guidance_scale, "batch": batch}
    denoiser, learn = image_examples(device, model, examples, seed + LEARN, **given)
    found, rows = [], []
    for count in counts:
        path = folder / f"refined_{count}.json"
        print(f"{count} evaluations: {iterations} iterations", flush=True)
        found.append(refined_one(path, known[count], denoiser, learn, pipe, how, goal))
    _, test = image_examples(device, model, fresh, seed + FRESH, **given)
    for count, schedule in zip(counts, found, strict=True):
        rows.append({"nfe": count, **compare(known[count], schedule, denoiser, test, batch, goal)})
        print(describe(rows[-1]), flush=True)
    scheduler_of(pipe.scheduler.config, found).save_pretrained(folder / "scheduler")
    report = {"settings": settings, "schedules": rows, "provenance": provenance()}
    write_json(report, folder / "results.json")
    print(f"scheduler {folder / 'scheduler'}")


def goal_for(
    pipe: Any, images: str, features: str, weights: str | None, weight: float, device: str
) -> Distribution:
    """What is descended."""
    from thalweg.diffusion.metrics.distance import gaussian
    from thalweg.diffusion.metrics.features import embed, extractor
    from thalweg.diffusion.metrics.quality import real_images
    from thalweg.diffusion.s3.goals import Distribution

    like = {"size": pipe.unet.config.sample_size, "channels": pipe.unet.config.in_channels}
    network = extractor(features, images=images, weights=weights, device=device, **like)
    mean, covariance = gaussian(embed(network, real_images(images, **like)[0]))

    def of(end_BCHW: Tensor) -> Tensor:
        return network((end_BCHW / 2 + 0.5).clamp(0, 1)).flatten(1)

    return Distribution(of, (mean.to(device), covariance.to(device)), weight)


def refined_one(
    path: Path, start: Any, denoiser: Any, learn: Examples, pipe: Any, how: Any, goal: Distribution
) -> Any:
    """The refined schedule of one number of evaluations; read again if it has been found before."""
    from thalweg.diffusion.from_diffusers import network_of
    from thalweg.diffusion.s3.refine import refine as descend
    from thalweg.diffusion.solvers.linear import LinearSchedule

    begun = json.loads(json.dumps(start.to_dict()))
    if path.is_file() and (known := LinearSchedule.load(path)).info["refined"]["start"] == begun:
        return known
    cut = len(learn) * 3 // 4
    noise, _ = network_of(pipe.scheduler.config)
    train, validation = learn.pick(slice(0, cut)), learn.pick(slice(cut, None))
    result: Refined = descend(
        start, denoiser, train, validation, noise_schedule=noise, settings=how, goal=goal
    )
    print(f"  {result.start_error:.4g} -> {result.error:.4g}, {result.seconds:.0f} s", flush=True)
    result.schedule.save(path)
    return result.schedule


def compare(
    before: Any, after: Any, denoiser: Callable[..., Tensor], test: Examples, batch: int, goal: Distribution
) -> dict[str, list[float]]:
    """Error and Frechet distance on noises that nothing has learnt from, before and after."""
    from thalweg.diffusion.s3.examples import evaluate

    def frechet(end: Tensor, _: Tensor) -> float:
        return float(goal.frechet(end))

    judges: dict[str, Callable[[Tensor, Tensor], float] | None] = {"error": None, "frechet": frechet}
    return {
        name: [evaluate(one, denoiser, test, None, None, judge) for one in (before, after)]
        for name, judge in judges.items()
    }


def describe(row: dict[str, Any]) -> str:
    """One line of the result."""
    names: Sequence[tuple[str, str]] = (("error", "error"), ("frechet", "Frechet distance"))
    changes = [f"{name} {row[key][0]:.4g} -> {row[key][1]:.4g}" for key, name in names]
    return f"{row['nfe']} evaluations, other noises: " + ", ".join(changes)
