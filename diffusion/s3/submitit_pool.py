"""Candidates evaluated by jobs of a cluster's queue (Slurm), or by processes under the same interface.

Jobs and the search exchange JSON files in a folder that both see: a job's candidates, and a line for each one
that it begins and finishes. What a dying job has finished is therefore not lost.
"""

from __future__ import annotations

import itertools
import json
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thalweg.checkpoints.atomic import write_text
from thalweg.diffusion.s3.pool import FAILED, ObjectiveRef, Result, Schedule, Task
from thalweg.diffusion.s3.worker import read_score, work_through

STILLBORN = 3
"""Jobs in a row that end without beginning a candidate, after which the search ends."""
PATIENCE = 10.0
"""Seconds given to local jobs to end when they are cancelled."""
PARAMETERS = {"name": "thalweg-search", "timeout_min": 60}


class SubmititPool:
    """Evaluates in jobs, each with a model of its own and a part of the candidates.

    If a job dies, the candidate that it was at goes into a job of its own, and those behind it into another.
    One that brings down two jobs, or whose evaluation raises, scores as failed; ``errors`` tells why.

    Args:
        objective: How a job makes its objective.
        workers: Jobs at once.
        devices: Device of each job, in turn.
        folder: For jobs, candidates and logs; seen by all machines.
        cluster: ``slurm``, or ``local`` for processes of this machine; by default Slurm where it is found.
        chunk: Candidates of a job; by default all of a round are divided among the workers. A job makes the
            objective anew, so short ones are wasteful.
        parameters: Of ``submitit.AutoExecutor``, such as ``{"slurm_partition": "gpu", "timeout_min": 120}``.
            Jobs on ``cuda`` get one GPU if nothing is said.
        poll: Seconds between looks at the folder.

    Raises:
        ValueError: For no workers or empty jobs.
    """

    def __init__(
        self,
        objective: ObjectiveRef,
        workers: int,
        devices: Sequence[str] = ("cpu",),
        *,
        folder: str | Path = "runs/jobs",
        cluster: str | None = None,
        chunk: int | None = None,
        parameters: Mapping[str, Any] | None = None,
        poll: float = 1.0,
    ) -> None:
        if workers < 1 or not devices:
            raise ValueError(f"a pool needs a worker and a device, got {workers} and {list(devices)}")
        if chunk is not None and chunk < 1:
            raise ValueError(f"a job needs 1 candidate or more, got {chunk}")
        self.objective = objective
        self.workers = workers
        self.folder = Path(folder).absolute()
        self.cluster = cluster
        self.chunk = chunk
        self.parameters = dict(parameters or {})
        self.poll = poll
        self.errors: dict[int, str] = {}
        self._devices = itertools.cycle(devices)
        self._running: list[_Job] = []
        self._stillborn = 0

    def scores(self, tasks: Sequence[Task], count: int | None = None) -> Iterator[Result]:
        """Scores on the first ``count`` samples as they come.

        Raises:
            ModuleNotFoundError: Without submitit.
            ValueError: If jobs cannot make their objective.
            RuntimeError: If jobs end before they begin.
        """
        schedules = dict(tasks)
        crashes = dict.fromkeys(schedules, 0)
        size = self.chunk or max(1, math.ceil(len(schedules) / self.workers))
        queue = [list(schedules)[i : i + size] for i in range(0, len(schedules), size)]
        self.folder.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(prefix="round-", dir=self.folder))
        try:
            while queue or self._running:
                while queue and len(self._running) < self.workers:
                    self._submit(place, {n: schedules[n] for n in queue.pop(0)}, count)
                for job in list(self._running):
                    ended = job.handle.done()  # asked first: after the end no line is added
                    yield from self._read(job)
                    if ended:
                        self._running.remove(job)
                        queue += self._left_by(job, crashes)
                        if job.begun is not None and crashes[job.begun] == 2:
                            self.errors[job.begun] = f"two jobs died of it; log: {job.handle.paths.stderr}"
                            yield job.begun, FAILED
                if self._running:
                    time.sleep(self.poll)
        finally:
            self.close()

    def _submit(self, place: Path, schedules: Mapping[int, Schedule], count: int | None) -> None:
        executor = _submitit().AutoExecutor(self.folder / "logs", cluster=self.cluster)
        device = next(self._devices)
        gpus = {"gpus_per_node": 1} if device.startswith("cuda") else {}
        executor.update_parameters(**{**PARAMETERS, **gpus, **self.parameters})
        told = {
            "function": self.objective.function,
            "options": dict(self.objective.options),
            "device": device,
            "count": count,
            "tasks": [(number, schedule.to_dict()) for number, schedule in schedules.items()],
        }
        path = place / f"{len(list(place.glob('*.json')))}.json"
        write_text(path, json.dumps(told, allow_nan=False))
        handle = executor.submit(work_through, str(path))
        self._running.append(_Job(handle=handle, lines=Path(f"{path}l"), numbers=list(schedules)))

    def _read(self, job: _Job) -> Iterator[Result]:
        """Scores that a job has written since the last look."""
        for line in job.news():
            self._stillborn = 0
            if "no_objective" in line:
                name = self.objective.function
                raise ValueError(f"no worker can make {name!r}: {line['no_objective']}")
            if "begun" in line:
                job.begun = line["begun"]
                continue
            number, score = line["number"], read_score(line)
            job.begun = None
            job.numbers.remove(number)
            if isinstance(score, str):
                self.errors[number] = score
                score = FAILED
            yield number, score

    def _left_by(self, job: _Job, crashes: dict[int, int]) -> list[list[int]]:
        """Candidates of a job that has ended, as new jobs."""
        if not job.numbers:
            return []
        if job.begun is None:
            self._stillborn += 1
            if self._stillborn == STILLBORN:
                what = f"{STILLBORN} jobs in a row ended before their first candidate"
                raise RuntimeError(f"{what}; log: {job.handle.paths.stderr}")
            return [job.numbers]
        crashes[job.begun] += 1
        again = [job.begun] if crashes[job.begun] < 2 else []
        return [part for part in (again, [n for n in job.numbers if n != job.begun]) if part]

    def close(self) -> None:
        """Cancel what runs."""
        for job in self._running:
            job.handle.cancel(check=False)
        if self.cluster == "local":  # a queue forgets its jobs by itself, a process is waited for
            until = time.monotonic() + PATIENCE
            while not all(job.handle.done() for job in self._running) and time.monotonic() < until:
                time.sleep(self.poll)
        self._running = []


@dataclass(kw_only=True, slots=True)
class _Job:
    handle: Any
    lines: Path
    """File that the job appends to."""
    numbers: list[int]
    """Candidates without an outcome."""
    begun: int | None = None
    """The one that it is at."""
    read: int = field(default=0)
    """Bytes read."""

    def news(self) -> Iterator[dict[str, Any]]:
        """Whole lines since the last look; one that a dying job has left in the middle never counts."""
        if not self.lines.is_file():
            return
        with open(self.lines, "rb") as file:
            file.seek(self.read)
            whole, end, _ = file.read().rpartition(b"\n")
        self.read += len(whole) + len(end)
        yield from map(json.loads, whole.splitlines())


def _submitit() -> Any:
    try:
        import submitit
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "a pool of queued jobs needs submitit: pip install 'thalweg[submitit]'"
        ) from error
    return submitit
