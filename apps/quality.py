"""``thalweg evaluate --pipeline``: images of a pipeline against real ones, under a written protocol.

Shapes: N images, C channels, H = W pixels.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from thalweg.diffusion.metrics.quality import Protocol

Metric = Literal["fid", "kid", "accuracy", "clip"]
METRICS: tuple[str, ...] = get_args(Metric)
GRID_ROWS = 8
GRID_COLUMNS = 10


def evaluate_pipeline(
    *,
    pipeline: str,
    scheduler: str | None = None,
    nfe: tuple[int, ...] = (8,),
    metrics: tuple[Metric, ...] = ("fid", "kid"),
    images: str = "mnist5k",
    split: Literal["all", "train", "val"] = "all",
    num_val: int = 500,
    samples: int = 1000,
    prompts: tuple[str, ...] | None = None,
    features: str = "classifier",
    weights: str | None = None,
    clip: str | None = None,
    guidance_scale: float | None = 1.0,
    seed: int = 0,
    seeds: int = 1,
    batch: int = 64,
    device: str = "auto",
    out: str = "runs/evaluate",
) -> None:
    """Draw images with a diffusers pipeline and compare them with real ones.

    Image i starts from the noise of ``torch.Generator().manual_seed(seed + i)`` and shows class or prompt
    number i, in turn, so two schedulers are compared on the same noises. FID and KID depend on the extractor,
    the real images and the number of samples: compare only numbers of one protocol, which is printed and
    written with them. A row for real images, held out as if they had been drawn, shows what is reachable.

    Args:
        pipeline: Folder of a diffusers pipeline, or its name on the Hub.
        scheduler: Folder of a scheduler such as that of `thalweg search`, JSON file of a solver schedule, or
            class of diffusers such as UniPCMultistepScheduler; the pipeline's own by default.
        nfe: Network evaluations per image, one row each.
        metrics: fid, kid, accuracy (part of the images in which the classifier sees the class that was asked
            for), clip (needs prompts and a model).
        images: Real images: a packaged set (mnist5k, digits), or a folder with one sub-folder per class.
        split: Part of them; train and val are those of `thalweg fit` with the same num_val.
        num_val: Images of the validation part.
        samples: Images to draw for each row.
        prompts: Texts, for pipelines that take them.
        features: classifier (our own, trained on the real images), efficientnet, inception, module:function,
            or a TorchScript file.
        weights: File of the extractor's weights; inception needs it.
        clip: Folder of a CLIP model.
        guidance_scale: Of classifier-free guidance; 1 for none.
        seed: Seed of the first image.
        seeds: Repetitions, each on noises of its own.
        batch: Images at once.
        device: cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.
        out: Folder for results.json and a grid of images for each row.

    Raises:
        ValueError: If pipeline, scheduler, metrics and images do not fit together.
    """
    from thalweg.apps.results import provenance, write_json
    from thalweg.diffusion.metrics.judge import Judge, Source

    check(metrics, samples, seeds, nfe, clip)
    pipe, shown = prepare(pipeline, scheduler, nfe, prompts, samples, device)
    options = {"guidance_scale": guidance_scale}
    source = Source(images=images, split=split, num_val=num_val, features=features, weights=weights)
    first, _ = draw(pipe, shown[:1], nfe[0], seed, 1, options)
    judge = Judge(source, metrics, as_bytes(first), samples, clip, class_names(pipe), str(pipe.device))
    rows: list[dict[str, Any]] = [{"nfe": None, **row} for row in judge.of_real()]
    for count in nfe:
        for k in range(seeds):
            start, begin = seed + k * samples, time.perf_counter()
            found, calls = draw(pipe, shown, count, start, batch, options)
            seconds = round(time.perf_counter() - begin, 3)
            row = {"nfe": count, "seed": start, **judge(as_bytes(found), shown)}
            rows.append({**row, "evaluations": calls, "seconds": seconds})
            if k == 0:
                save_grid(found, Path(out) / f"grid_{count}.png", class_names(pipe))
    report = {
        "pipeline": pipeline,
        "pipeline_class": type(pipe).__name__,
        "scheduler": scheduler,
        "scheduler_class": type(pipe.scheduler).__name__,
        "protocol": judge.protocol.to_dict(),
        "settings": {**options, "seed": seed, "seeds": seeds, "batch": batch, "device": str(pipe.device)},
        "rows": rows,
        "provenance": provenance(),
    }
    write_json(report, Path(out) / "results.json")
    print_table(rows, metrics, judge.protocol)
    print(f"written to {out}")


def check(
    metrics: Sequence[str], samples: int, seeds: int, nfe: Sequence[int], clip: str | None = None
) -> None:
    """Refuse what is wrong before anything is loaded.

    Raises:
        ValueError: For unknown metrics, and numbers out of range.
    """
    unknown = [name for name in metrics if name not in METRICS]
    if unknown or not metrics:
        raise ValueError(f"metrics are {list(metrics)}, allowed: {', '.join(METRICS)}")
    if "clip" in metrics and clip is None:
        raise ValueError("the metric clip needs the folder of a CLIP model: --clip FOLDER")
    if samples < 2:
        raise ValueError(f"samples is {samples}, allowed: 2 and more")
    if seeds < 1:
        raise ValueError(f"seeds is {seeds}, allowed: 1 and more")
    if not nfe or len(set(nfe)) < len(nfe) or min(nfe) < 1:
        raise ValueError(f"nfe is {list(nfe)}, allowed: different numbers from 1 on")


def prepare(
    pipeline: str,
    scheduler: str | None,
    nfe: Sequence[int],
    prompts: Sequence[str] | None,
    samples: int,
    device: str,
) -> tuple[Any, list[int | str | None]]:
    """The pipeline with its scheduler on its device, and what each image is to show."""
    import torch

    from thalweg.diffusion.draw import choose_scheduler, contents, open_pipeline, set_scheduler
    from thalweg.diffusion.library import steps_for

    pipe: Any = open_pipeline(pipeline)
    if scheduler is not None:
        set_scheduler(pipe, choose_scheduler(pipe, scheduler))
    each = contents(pipe, prompts=prompts)
    for count in nfe:
        steps_for(pipe.scheduler, count)
    where = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    return pipe.to(where), [each[i % len(each)] for i in range(samples)]


def draw(
    pipe: Any, shown: Sequence[Any], nfe: int, seed: int, batch: int, options: Mapping[str, Any]
) -> tuple[list[Image], float]:
    """Images, and the network's evaluations for each."""
    import inspect

    from thalweg.apps.sample import with_progress

    known = inspect.signature(pipe.__call__).parameters
    given = {name: value for name, value in options.items() if name in known}
    for name, value in options.items():
        if name not in known and value not in (None, 1.0):
            raise ValueError(f"{type(pipe).__name__} has no option {name}, which is {value}")
    return with_progress(pipe, shown, nfe, seed, batch, given)


def class_names(pipe: Any) -> list[str]:
    """Names of the classes of our pipeline; none for others."""
    return list(pipe.config.get("class_names") or ())


def as_bytes(images: Sequence[Image]) -> Tensor:
    """Images as bytes (N, C, H, W)."""
    import numpy as np
    import torch

    stacked = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return stacked[:, None] if stacked.ndim == 3 else stacked.permute(0, 3, 1, 2).contiguous()


def save_grid(images: Sequence[Image], path: Path, names: Sequence[str]) -> None:
    """The first images on one sheet, a column for each class where there are few."""
    from thalweg.checkpoints.atomic import replacing
    from thalweg.diffusion.sheet import grid

    columns = min(len(names) if 1 < len(names) <= 2 * GRID_COLUMNS else GRID_COLUMNS, len(images))
    sheet = grid(images[: columns * GRID_ROWS], columns)
    with replacing(path) as temporary:
        sheet.save(temporary, format="PNG")


def print_table(rows: Sequence[Mapping[str, Any]], metrics: Sequence[str], protocol: Protocol) -> None:
    """Print one row per number of evaluations, with the spread over seeds where there are several."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", title=f"{protocol.samples} images")
    for heading in ("evaluations", *metrics, "seconds"):
        table.add_column(heading, justify="right")
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["nfe"], []).append(row)
    for count, group in groups.items():
        name = f"{group[0]['samples']} real ones" if count is None else str(count)
        table.add_row(name, *(spread(group, metric) for metric in (*metrics, "seconds")))
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    for key, value in protocol.to_dict().items():
        console.print(f"  {key}: {value}", markup=False)


def spread(rows: Sequence[Mapping[str, Any]], metric: str) -> str:
    """Mean, and standard deviation over seeds where there are several."""
    import statistics

    values = [row[metric] for row in rows if metric in row]
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):.4g}"
    return mean if len(values) == 1 else f"{mean} +- {statistics.stdev(values):.2g}"
