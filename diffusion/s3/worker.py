"""A worker of a pool that is reached over a network or by files: what goes in and comes out is JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from thalweg.diffusion.s3.objective import Score
from thalweg.diffusion.s3.pool import Objective, ObjectiveRef
from thalweg.diffusion.solvers.schedule import SolverSchedule

Outcome = dict[str, Any]
"""``{"score": {...}}`` or ``{"error": "..."}``."""


class Worker:
    """An objective on a device.

    Args:
        function: ``module:function`` that makes the objective.
        options: Its arguments.
        device: Where it computes.
    """

    def __init__(self, function: str, options: Mapping[str, Any], device: str) -> None:
        self.reference = ObjectiveRef(function=function, options=options)
        self.device = device
        self._objective: Objective | None = None

    def here(self) -> bool:
        """Answers as soon as there is a worker."""
        return True

    def begin(self) -> str | None:
        """Make the objective; what went wrong, if something did."""
        import torch

        torch.set_num_threads(1)  # one sum for all workers, whatever their number of cores
        try:
            self._objective = self.reference.make(self.device)
        except Exception as error:
            return _told(error)
        return None

    def evaluate(self, values: Mapping[str, Any], count: int | None) -> Outcome:
        """Score a schedule, given as JSON, on the first ``count`` samples."""
        assert self._objective is not None
        try:
            return {"score": asdict(self._objective(SolverSchedule.from_dict(values), count))}
        except Exception as error:  # a candidate's own fault must not end the search
            return {"error": _told(error)}


def work_through(path: str) -> None:
    """Evaluate the candidates of a file, and append to PATHl, line by line, what comes of them.

    The file has ``function``, ``options``, ``device``, ``count`` and ``tasks``, pairs of number and schedule.
    A line ``{"begun": n}`` precedes the outcome of candidate n, so that it is known of which one a job died.
    """
    told = json.loads(Path(path).read_text())
    worker = Worker(told["function"], told["options"], told["device"])
    with open(f"{path}l", "a") as out:
        if (error := worker.begin()) is not None:
            _append(out, {"no_objective": error})
            return
        for number, values in told["tasks"]:
            _append(out, {"begun": number})
            _append(out, {"number": number, **worker.evaluate(values, told["count"])})


def _append(out: TextIO, values: dict[str, Any]) -> None:
    out.write(json.dumps(values, allow_nan=False) + "\n")
    out.flush()


def read_score(outcome: Outcome) -> Score | str:
    """The score of an outcome, or the error."""
    if "score" in outcome:
        return Score(**outcome["score"])
    error: str = outcome["error"]
    return error


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
