"""Refinement of a sampler's nodes and weights by the gradient of its error.

The sampler is run on starts whose ends a teacher gave, and all of its free numbers (see
:mod:`thalweg.diffusion.s3.parameters`) follow the gradient of the mean distance, as in NeuralSolver
(arXiv 2505.21114) and S4S (arXiv 2502.17423), or of another goal (:mod:`thalweg.diffusion.s3.goals`). What
is kept is judged by the median distance, or what the goal says, on other starts, which were not trained on,
and is never worse there than what was started from.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from thalweg.diffusion.s3.descent import Descent, Settings, jitter
from thalweg.diffusion.s3.examples import Denoiser, Examples, evaluate
from thalweg.diffusion.s3.goals import Distance, Goal
from thalweg.diffusion.s3.parameters import Parameters
from thalweg.diffusion.schedules import NoiseSchedule
from thalweg.diffusion.solvers.linear import Compilable, LinearSchedule


@dataclass(frozen=True, kw_only=True)
class Refined:
    """What a refinement gave."""

    schedule: LinearSchedule
    """The best sampler on the validation starts; where nothing was better, the best start as weights."""
    error: float
    """Its median distance there, or how the goal judges it."""
    start_error: float
    """That of the best start."""
    evaluations: int
    """Runs of the network on one sample, forward, the repeated ones of checkpointing left out."""
    seconds: float
    """Time taken."""
    runs: list[dict[str, Any]] = field(default_factory=list)
    """Start, learning rate, iterations, best iteration and best median of each run."""


Found = tuple[float, int, LinearSchedule]
"""Median distance, number of the start, sampler."""


def refine(
    starts: Compilable | Sequence[Compilable],
    denoiser: Denoiser,
    train: Examples,
    validation: Examples,
    *,
    noise_schedule: NoiseSchedule | None = None,
    settings: Settings | None = None,
    mean: Tensor | None = None,
    goal: Goal | None = None,
) -> Refined:
    """Refine samplers, and keep the best.

    Args:
        starts: A sampler or several.
        denoiser: Differentiable data prediction.
        train: Starts to learn from.
        validation: Other starts, to judge by.
        noise_schedule: The network's, for its labels; without it the denoiser is given None.
        settings: How.
        mean: Mean of the data, for samplers whose first step uses it.
        goal: What is descended and judged by; by default the distance to the ends, as the settings say.

    Raises:
        ValueError: If nodes follow no known rule, or there are no starts.
    """
    begun = time.perf_counter()
    samplers = list(starts) if isinstance(starts, Sequence) else [starts]
    if not samplers:
        raise ValueError("there is nothing to refine")
    work = _Refinement(denoiser, train, validation, noise_schedule, settings or Settings(), mean, goal)
    begin = sorted((work.judge(sampler), i) for i, sampler in enumerate(samplers))
    start_error, first = begin[0]
    found = work.search([(i, samplers[i]) for _, i in begin])
    error, origin, best = (
        found if found is not None and found[0] < start_error else (start_error, first, None)
    )
    if best is None:
        best = LinearSchedule.of(samplers[origin])
    scores = {"median": error, "start_median": start_error}
    info = {"start": _written(samplers[origin]), **scores, "settings": _plain(work.settings)}
    return Refined(
        schedule=replace(best, info={"refined": info}),
        error=error,
        start_error=start_error,
        evaluations=work.calls,
        seconds=time.perf_counter() - begun,
        runs=work.runs,
    )


class _Refinement:
    """What all runs share, and their record."""

    def __init__(
        self,
        denoiser: Denoiser,
        train: Examples,
        validation: Examples,
        noise_schedule: NoiseSchedule | None,
        settings: Settings,
        mean: Tensor | None,
        goal: Goal | None,
    ) -> None:
        self.denoiser, self.train, self.validation, self.mean = denoiser, train, validation, mean
        self.noise_schedule, self.settings = noise_schedule, settings
        self.goal = goal or Distance(settings.loss)
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.runs: list[dict[str, Any]] = []
        self.calls = 0

    def judge(self, sampler: Compilable) -> float:
        """Median distance on the validation starts, or what the goal says."""
        self.calls += _nfe(sampler) * len(self.validation)
        size, judge = self.settings.batch_size, self.goal.judge
        return evaluate(sampler, self.denoiser, self.validation, size, self.mean, judge)

    def search(self, samplers: list[tuple[int, Compilable]]) -> Found | None:
        """Best of all runs; after short ones from all starts if there are more than are to be kept."""
        settings, found = self.settings, list[Found]()
        if settings.keep is not None and len(samplers) > settings.keep:
            rate = settings.learning_rates[0]
            found = self._descend(samplers, (rate,), settings.scout)
            samplers = [(i, schedule) for _, i, schedule in found[: settings.keep]] or samplers[
                : settings.keep
            ]
        found += self._descend(samplers, settings.learning_rates, settings.iterations)
        return min(found, key=lambda run: run[0], default=None)

    def _descend(
        self, samplers: list[tuple[int, Compilable]], rates: Sequence[float], iterations: int
    ) -> list[Found]:
        """One run for each start and learning rate; the best first."""
        found = []
        for i, sampler in samplers:
            for k, rate in enumerate(rates):
                options = {n: getattr(self.settings, n) for n in ("free_end", "free_start", "offsets")}
                parameters = Parameters(sampler, self.noise_schedule, **options)
                if k:
                    jitter(parameters, self.settings.jitter, self.generator)
                run = Descent(
                    parameters,
                    self.denoiser,
                    self.train,
                    self.validation,
                    self.settings,
                    self.mean,
                    self.generator,
                    self.goal,
                )
                schedule, error, at = run.adam(rate, iterations)
                self.calls += run.calls
                of = {"start": i, "learning_rate": rate, "iterations": iterations}
                self.runs.append({**of, "best_iteration": at, "median": error})
                if schedule is not None:
                    found.append((error, i, schedule))
        return sorted(found, key=lambda run: run[0])


def _nfe(sampler: Compilable) -> int:
    return len(sampler.nodes) - 1 - (sampler.first != "network")


def _written(sampler: Compilable) -> dict[str, Any]:
    """The start as JSON, for the record."""
    write = getattr(sampler, "to_dict", None)
    return write() if write is not None else {"info": dict(sampler.info)}


def _plain(settings: Settings) -> dict[str, Any]:
    values = asdict(settings)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
