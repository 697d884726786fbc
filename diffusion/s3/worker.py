"""A worker of a pool that is reached over a network or by files: what goes in and comes out is JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

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


def read_score(outcome: Outcome) -> Score | str:
    """The score of an outcome, or the error."""
    if "score" in outcome:
        return Score(**outcome["score"])
    error: str = outcome["error"]
    return error


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
