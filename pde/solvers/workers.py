"""Computes batches of samples in this process, in worker processes or on a dask cluster.

Each task writes its own piece, so nothing large travels between processes. Every process computes with one
thread, which keeps the results independent of the machine's core count.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

import torch

from thalweg.pde.solvers import recipes
from thalweg.pde.solvers.parts import write_part
from thalweg.pde.solvers.recipes import SampleRequest

ENGINES = ("processes", "dask")


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One batch of samples and where it goes."""

    name: str
    """Recipe."""
    request: SampleRequest
    """Which samples, and how."""
    shapes: Mapping[str, tuple[int, ...]]
    """Variable -> shape of one sample, for a check of the recipe."""
    path: Path
    """Piece to write."""


def run_task(task: Task) -> int:
    """Compute a batch and write its piece; returns the number of samples.

    Raises:
        FloatingPointError: If the solver produced NaN or infinity.
        OSError: If the piece cannot be written.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            fields = recipes.get(task.name).sample(task.request)
    finally:
        torch.set_num_threads(threads)
    found = {variable: tuple(field.shape[1:]) for variable, field in fields.items()}
    assert found == dict(task.shapes), f"recipe {task.name} made {found}, the catalog says {task.shapes}"
    for variable, field in fields.items():
        if not bool(torch.isfinite(field).all()):
            raise FloatingPointError(
                f"{task.name}: {variable!r} is not finite in samples {task.request.indices} of seed "
                f"{task.request.seed}"
            )
    write_part(task.path, {variable: field.cpu().numpy() for variable, field in fields.items()})
    return len(task.request.indices)


def run(tasks: Sequence[Task], *, engine: str, workers: int) -> Iterator[int]:
    """Run all tasks; yields the number of samples each time a task has finished.

    Raises:
        RuntimeError: If a worker process dies.
        ValueError: If the engine is not known or its package is missing.
    """
    if engine == "dask":
        return _run_dask(tasks, workers)
    if engine != "processes":
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")
    return map(run_task, tasks) if workers == 1 else _run_processes(tasks, workers)


def _run_processes(tasks: Sequence[Task], workers: int) -> Iterator[int]:
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(tasks) or 1), mp_context=context, initializer=_start_worker)
    try:
        for future in as_completed([pool.submit(run_task, task) for task in tasks]):
            yield future.result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a worker process died, perhaps for lack of memory; finished samples are kept: run the same "
            "command again, with fewer workers or a smaller batch size"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _run_dask(tasks: Sequence[Task], workers: int) -> Iterator[int]:
    """Use the cluster of dask's ``scheduler-address`` setting if there is one, else a local one."""
    try:
        import dask
        from dask.distributed import Client
        from dask.distributed import as_completed as dask_as_completed
    except ImportError as error:
        raise ValueError("engine dask needs an optional package: pip install 'thalweg[dask]'") from error
    if dask.config.get("scheduler-address", None):
        client = Client()
    else:
        client = Client(n_workers=workers, threads_per_worker=1, dashboard_address=None)
    with client:
        futures = client.map(run_task, tasks, pure=False)
        for future in dask_as_completed(futures):
            yield future.result()


def _start_worker() -> None:
    """Die quietly on Ctrl-C, and with the parent: a worker whose parent was killed would wait for ever."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None, "workers are started by a pool"

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
