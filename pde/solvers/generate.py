"""The driver of all generators: plans batches, runs them, resumes, and assembles the published layout."""

from __future__ import annotations

import errno
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import h5py
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from thalweg.pde.data import catalog
from thalweg.pde.problem import ProblemSpec
from thalweg.pde.solvers import recipes
from thalweg.pde.solvers.generated_file import sizes, write_dataset
from thalweg.pde.solvers.parts import Parts, differences
from thalweg.pde.solvers.recipes import Precision, Recipe, SampleRequest
from thalweg.pde.solvers.workers import ENGINES, Task, run

GENERATOR = "thalweg 1"
"""Name and version of the numerical methods; raised whenever a change alters numbers."""


def generate(
    name: str,
    out: str | Path,
    samples: int,
    resolution: int = 128,
    seed: int = 0,
    workers: int = 1,
    batch_size: int = 8,
    device: str = "cpu",
    num_val: int | None = None,
    num_test: int | None = None,
    frames: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
    engine: Literal["processes", "dask"] = "processes",
    dtype: Precision = "float32",
) -> Path:
    """Generate a data set in the published layout.

    Sample i depends on the seed and i alone: batch size, workers and restarts do not change it, and a larger
    set starts with the samples of a smaller one. An interrupted run continues where it stopped when it is
    called again.

    Args:
        name: Data set, e.g. ``NS-Sines``.
        out: Folder for the file; it gets the published file name.
        samples: Number of trajectories, or of samples of a steady problem.
        resolution: Grid points per axis.
        seed: Seed of the whole set.
        workers: Number of processes; 1 computes in this one. Scripts that use more need the usual
            ``if __name__ == "__main__"`` guard.
        batch_size: Samples computed together.
        device: Where the solver runs, e.g. ``cpu`` or ``cuda``.
        num_val: Validation samples, stored in the file; by default a tenth, at least one if there are three.
        num_test: Test samples; likewise.
        frames: Number of snapshots, counted from the start; all published times by default.
        overwrite: Compute again what is already there.
        progress: Show a progress bar and messages on standard error.
        engine: ``processes``, or ``dask`` for a local or configured dask cluster.
        dtype: Precision of the time stepping.

    Returns:
        The finished file.

    Raises:
        ValueError: If an argument is not possible, or what exists was made with other parameters.
        FloatingPointError: If a solver blows up.
        OSError: If the disk is full; finished samples are kept.
        RuntimeError: If a worker dies.
    """
    recipe, spec = recipes.get(name), catalog.get(name)
    _check_counts(samples=samples, workers=workers, batch_size=batch_size, seed=seed)
    _check_choice("engine", engine, ENGINES)
    _check_device(device)
    num_val, num_test = _held_out(samples, num_val, num_test)
    request = recipe.request((), seed=seed, resolution=resolution, frames=frames, device=device, dtype=dtype)
    manifest = _manifest(recipe, request)
    record = {**manifest, "samples": samples, "num_val": num_val, "num_test": num_test}
    console = Console(stderr=True, quiet=not progress)
    target = Path(out) / spec.file
    if _is_finished(target, record, overwrite=overwrite):
        message = f"{target} is already there; pass --overwrite to make it again"
        console.print(message, highlight=False, soft_wrap=True)
        return target
    shapes = sizes(spec, samples=samples, frames=max(1, request.frames), resolution=resolution)
    parts = Parts(target)
    parts.open(manifest, overwrite=overwrite)
    tasks = _tasks(recipe, request, parts, shapes, samples, max(1, min(batch_size, -(-samples // workers))))
    _compute(tasks, samples, console=console, engine=engine, workers=workers)
    write_dataset(
        target,
        spec,
        shapes,
        parts.samples(samples),
        train=samples - num_val - num_test,
        times=request.times,
        attributes=_attributes(spec, recipe, record),
    )
    parts.remove()
    return target


def _manifest(recipe: Recipe, request: SampleRequest) -> dict[str, object]:
    """Everything that decides the numbers of a sample."""
    return {
        "stream": request.stream,
        "seed": request.seed,
        "resolution": request.resolution,
        "frames": request.frames,
        "device": torch.device(request.device).type,
        "dtype": request.dtype,
        "parameters": dict(recipe.parameters),
        "generator": GENERATOR,
    }


def _attributes(spec: ProblemSpec, recipe: Recipe, record: Mapping[str, object]) -> dict[str, object]:
    """Global attributes of a finished file."""
    return {
        "thalweg_problem": spec.name,
        "equation": spec.equation,
        "boundary": spec.boundary,
        "parameters": json.dumps(record["parameters"]),
        "axes": recipe.axes,
        "seed": record["seed"],
        "num_val": record["num_val"],
        "num_test": record["num_test"],
        "generator": GENERATOR,
        "generation": json.dumps(record),
    }


def _tasks(
    recipe: Recipe,
    request: SampleRequest,
    parts: Parts,
    shapes: Mapping[str, tuple[int, ...]],
    samples: int,
    size: int,
) -> list[Task]:
    """Batches that are still to be computed.

    Raises:
        OSError: If the disk has no room for them and for the finished file.
    """
    batches = parts.missing(samples, size)
    of_sample = {variable: shape[1:] for variable, shape in shapes.items()}
    needed = 4 * sum(math.prod(shape) for shape in of_sample.values()) * (samples + sum(map(len, batches)))
    free = shutil.disk_usage(parts.folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"{parts.folder.parent} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB are needed",
        )
    return [
        Task(
            name=recipe.name,
            request=replace(request, indices=tuple(batch)),
            shapes=of_sample,
            path=parts.path(batch),
        )
        for batch in batches
    ]


def _compute(tasks: Sequence[Task], samples: int, *, console: Console, engine: str, workers: int) -> None:
    """Run the tasks under a progress bar that counts samples."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    done = samples - sum(len(task.request.indices) for task in tasks)
    with Progress(*columns, console=console, disable=console.quiet) as bar:
        row = bar.add_task(tasks[0].name if tasks else "samples", total=samples, completed=done)
        for count in run(tasks, engine=engine, workers=workers):
            bar.advance(row, count)


def _is_finished(target: Path, record: Mapping[str, object], *, overwrite: bool) -> bool:
    """Whether the file is there and may stay.

    Raises:
        ValueError: If it holds something else and must not be replaced.
    """
    if not target.exists():
        return False
    with h5py.File(target, "r") as file:
        stored = file.attrs.get("generation")
    if stored is None:
        raise ValueError(f"{target} exists and was not generated here; move it away or choose another folder")
    changed = differences(json.loads(stored), record)
    if changed and not overwrite:
        raise ValueError(f"{target} exists with other parameters ({changed}); pass --overwrite to replace it")
    return not overwrite


def _held_out(samples: int, num_val: int | None, num_test: int | None) -> tuple[int, int]:
    """Sizes of the validation and test parts; a tenth each by default, and at least one of three samples.

    Raises:
        ValueError: If they are negative or leave nothing to train on.
    """
    default = max(1, samples // 10) if samples >= 3 else 0
    num_val = default if num_val is None else num_val
    num_test = default if num_test is None else num_test
    if min(num_val, num_test) < 0 or num_val + num_test >= samples:
        raise ValueError(
            f"num_val and num_test must not be negative and must leave training samples; got {num_val} and "
            f"{num_test} of {samples} samples"
        )
    return num_val, num_test


def _check_counts(*, samples: int, workers: int, batch_size: int, seed: int) -> None:
    for name, value in {"samples": samples, "workers": workers, "batch_size": batch_size}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")


def _check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
