"""``thalweg sample``: images from any diffusers pipeline, with any of its schedulers or a searched one."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from thalweg.diffusion.sheet import grid

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image


def sample(
    *,
    pipeline: str,
    scheduler: str | None = None,
    nfe: int = 8,
    classes: tuple[int | str, ...] | None = None,
    prompts: tuple[str, ...] | None = None,
    negative_prompt: str | None = None,
    count: int = 1,
    guidance_scale: float | None = None,
    seed: int = 0,
    batch: int = 16,
    device: str = "auto",
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    size: tuple[int, int] | None = None,
    lora: str | None = None,
    out: str = "runs/sample",
) -> None:
    """Draw images with a pipeline and write them, a grid of them, and what they are.

    Image i depends on the seed and on i alone, however many are drawn at once; it starts from the noise of
    ``torch.Generator().manual_seed(seed + i)``.

    Args:
        pipeline: Folder of a diffusers pipeline, or its name on the Hub.
        scheduler: Folder of a scheduler such as that of ``thalweg search``, JSON file of a solver schedule,
            or class of diffusers such as UniPCMultistepScheduler; the pipeline's own by default.
        nfe: Network evaluations per image; guidance takes two in each.
        classes: Labels or names of the classes; all, if they are few.
        prompts: Texts, for pipelines that take them.
        negative_prompt: What the images shall not show.
        count: Images of each class or prompt, or in all.
        guidance_scale: Of classifier-free guidance; the pipeline's default if left out.
        seed: Seed of the first image; the next has the next seed.
        batch: Images at once.
        device: Device of the pipeline, or ``auto``.
        dtype: Precision of the networks.
        size: Height and width in pixels, for pipelines that take them.
        lora: Adapter of the transformer: a folder or file of ``thalweg export``, diffusers or PEFT.
        out: Folder for 00000.png and so on, grid.png and sample.json.

    Raises:
        ValueError: If pipeline, scheduler, classes or prompts do not fit together.
    """
    import torch

    from thalweg.apps.results import provenance, write_json
    from thalweg.diffusion.draw import choose_scheduler, contents, open_pipeline, set_scheduler
    from thalweg.diffusion.library import steps_for

    pipe: Any = open_pipeline(pipeline, getattr(torch, dtype))
    if lora is not None:
        from thalweg.diffusion.suites.drawing import add_lora, read_fitting

        add_lora(pipe, *read_fitting(pipe, lora))
    if scheduler is not None:
        set_scheduler(pipe, choose_scheduler(pipe, scheduler))
    shown = contents(pipe, classes, prompts, count)
    steps_for(pipe.scheduler, nfe)
    where = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    options: dict[str, Any] = {"guidance_scale": guidance_scale, "negative_prompt": negative_prompt}
    if size is not None:
        options |= {"height": size[0], "width": size[1]}
    start = time.perf_counter()
    images, calls = with_progress(pipe.to(where), shown, nfe, seed, batch, options)
    seconds = time.perf_counter() - start
    folder = Path(out)
    files = save(images, folder)
    grid(images, count if len(shown) > count > 1 else None).save(folder / "grid.png")
    report = {
        "pipeline": pipeline,
        "pipeline_class": type(pipe).__name__,
        "lora": lora,
        "scheduler": scheduler,
        "scheduler_class": type(pipe.scheduler).__name__,
        "settings": {**options, "seed": seed, "batch": batch, "device": where, "dtype": dtype},
        "nfe": calls,
        "seconds": round(seconds, 3),
        "images": [
            {"file": file, "seed": seed + i, "shows": what}
            for i, (file, what) in enumerate(zip(files, shown, strict=True))
        ],
        "provenance": provenance(),
    }
    write_json(report, folder / "sample.json")
    print(f"{len(images)} images, {calls:g} evaluations each, {seconds:.1f} s: {folder / 'grid.png'}")


def with_progress(
    pipe: DiffusionPipeline,
    shown: Sequence[Any],
    nfe: int,
    seed: int,
    batch: int,
    options: dict[str, Any],
) -> tuple[list[Image], float]:
    """Draw with a progress bar; also the evaluations of the network that were counted, per batch."""
    from rich.progress import Progress

    from thalweg.diffusion.draw import draw, network

    calls = 0

    def count_one(*_: Any) -> None:
        nonlocal calls
        calls += 1

    handle = network(pipe).register_forward_pre_hook(count_one)
    images: list[Image] = []
    try:
        with Progress() as bar:
            task = bar.add_task("drawing", total=len(shown))
            for part in draw(pipe, shown, nfe=nfe, seed=seed, batch=batch, **options):
                images += part
                bar.update(task, completed=len(images))
    finally:
        handle.remove()
    return images, calls / math.ceil(len(shown) / batch)


def save(images: Sequence[Image], folder: Path) -> list[str]:
    """Write 00000.png and so on, each whole or not at all; returns the names."""
    from thalweg.checkpoints.atomic import replacing

    names = [f"{i:05d}.png" for i in range(len(images))]
    for name, image in zip(names, images, strict=True):
        with replacing(folder / name) as path:
            image.save(path, format="PNG")
    return names
