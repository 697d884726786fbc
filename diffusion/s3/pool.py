"""Where candidates are evaluated: here, or in processes that keep the model.

A pool takes numbered schedules and gives back numbered scores in any order. What is sent to a worker is
JSON, and how a worker makes its objective is the name of a function, so that nothing of the parent's state
leaks in.
"""

from __future__ import annotations

import importlib
import itertools
import multiprocessing
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any, Protocol

from thalweg.diffusion.s3.objective import HOPELESS, Score
from thalweg.diffusion.solvers.linear import LinearSchedule
from thalweg.diffusion.solvers.schedule import SolverSchedule

Schedule = SolverSchedule | LinearSchedule
Task = tuple[int, Schedule]
Result = tuple[int, Score]

FAILED = Score(value=HOPELESS, noise=0.0, count=0)
"""Score of a candidate whose evaluation fails wherever it is tried."""


class Objective(Protocol):
    """Scores a schedule, lower is better."""

    def __call__(self, schedule: Schedule, count: int | None = None) -> Score:
        """Score on the first ``count`` samples, on all by default."""
        ...


class Pool(Protocol):
    """Evaluates candidates."""

    def scores(self, tasks: Sequence[Task], count: int | None = None) -> Iterator[Result]:
        """Scores on the first ``count`` samples as they come, each with the number of its task."""
        ...

    def close(self) -> None:
        """Let go of workers."""
        ...


class InlinePool:
    """Evaluates in this process, one after the other.

    Args:
        objective: Scores a schedule.
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective

    def scores(self, tasks: Sequence[Task], count: int | None = None) -> Iterator[Result]:
        """Scores on the first ``count`` samples in the order of the tasks."""
        for number, schedule in tasks:
            yield number, self.objective(schedule, count)

    def close(self) -> None:
        """Nothing to let go of."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveRef:
    """How a worker makes its objective."""

    function: str
    """``module:function``; called once per worker as function(device, **options)."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Arguments, as JSON."""

    def make(self, device: str) -> Objective:
        """Call the function.

        Raises:
            ValueError: If it is not there.
        """
        module, _, name = self.function.partition(":")
        try:
            function = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"objective {self.function!r} is not module:function: {error}") from error
        objective: Objective = function(device, **self.options)
        return objective


class ProcessPool:
    """Evaluates in processes, one per device, each with a model of its own.

    A worker that dies takes no result with it: what it had not finished is given to a new one. A candidate
    that brings down two workers, or whose evaluation raises, scores as failed; ``errors`` tells why.

    Args:
        objective: How a worker makes its objective.
        workers: Number of processes.
        devices: Device of each worker, in turn.
    """

    def __init__(self, objective: ObjectiveRef, workers: int, devices: Sequence[str] = ("cpu",)) -> None:
        if workers < 1 or not devices:
            raise ValueError(f"a pool needs a worker and a device, got {workers} and {list(devices)}")
        self.objective = objective
        self.workers = workers
        self.devices = tuple(devices)
        self.errors: dict[int, str] = {}
        self._executor: ProcessPoolExecutor | None = None

    def _start(self) -> ProcessPoolExecutor:
        if self._executor is None:
            context = multiprocessing.get_context("spawn")
            queue = context.Queue()
            for device in itertools.islice(itertools.cycle(self.devices), self.workers):
                queue.put(device)
            self._executor = ProcessPoolExecutor(
                self.workers, context, initializer=_begin, initargs=(self.objective, queue)
            )
        return self._executor

    def scores(self, tasks: Sequence[Task], count: int | None = None) -> Iterator[Result]:
        """Scores on the first ``count`` samples as they come.

        Raises:
            ValueError: If workers cannot make their objective.
        """
        left = dict(tasks)
        crashes = dict.fromkeys(left, 0)
        alone = False
        while left:
            # After a crash candidates go one by one, until it is clear which of them brought the worker down.
            batch = dict(itertools.islice(left.items(), 1)) if alone else left
            for number, score in self._round(batch, count):
                del left[number]
                yield number, score
            broken = any(number in left for number in batch)
            if not broken:
                alone = False
                continue
            self.close()
            if alone:
                (number,) = batch
                crashes[number] += 1
                if crashes[number] == 2:
                    self.errors[number] = "the worker died twice"
                    del left[number]
                    yield number, FAILED
                    alone = False
            else:
                alone = True

    def _round(self, tasks: Mapping[int, Schedule], count: int | None) -> Iterator[Result]:
        """Scores until all are there or a worker dies."""
        executor = self._start()
        futures: dict[Future[Score], int] = {}
        try:
            for number, schedule in tasks.items():
                futures[executor.submit(_evaluate, schedule.to_dict(), count)] = number
            for future in as_completed(futures):
                number = futures[future]
                try:
                    yield number, future.result()
                except BrokenProcessPool:
                    continue  # others may have finished before
                except NoObjective as error:
                    raise ValueError(f"no worker can make {self.objective.function!r}: {error}") from None
                except Exception as error:  # a candidate's own fault must not end the search
                    self.errors[number] = f"{type(error).__name__}: {error}"
                    yield number, FAILED
        except BrokenProcessPool:
            return

    def close(self) -> None:
        """Stop the workers."""
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)
            self._executor = None


class NoObjective(Exception):
    """A worker could not make its objective."""


_objective: Objective | str = "not begun"
"""The objective of this worker, or why there is none."""


def _begin(reference: ObjectiveRef, devices: Any) -> None:
    global _objective
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(1)
    try:
        _objective = reference.make(devices.get())
    except Exception as error:  # a worker that ends here would look like one that a candidate brought down
        _objective = f"{type(error).__name__}: {error}"


def _end_with_parent() -> None:
    """Without this, workers of a search that is killed would wait for candidates for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _evaluate(values: dict[str, Any], count: int | None) -> Score:
    if isinstance(_objective, str):
        raise NoObjective(_objective)
    return _objective(SolverSchedule.from_dict(values), count)
