"""What guides a search between its rounds: a predictor made of everything that has been evaluated."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from thalweg.diffusion.s3.objective import HOPELESS, Score
from thalweg.diffusion.s3.predictor import FitConfig, fit, kendall_tau
from thalweg.diffusion.solvers.schedule import SolverSchedule

Guess = Callable[[Sequence[SolverSchedule]], tuple[np.ndarray, np.ndarray]]
"""Predicted scores and their uncertainty, lower is better."""
Train = Callable[[Sequence[SolverSchedule], Sequence[Score]], Guess]
"""Makes a guess from everything that has been evaluated."""

FAILURE = 1e-3 * HOPELESS
"""Scores from here on are failures: they hold a distance that was not finite."""


def predictor_train(config: FitConfig | None = None, *, worst: float = 1.0) -> Train:
    """Fit an ensemble to the archive of a search; it guesses scores, or their logarithm.

    It is fitted anew in each round and depends on the archive alone, so that a search that goes on from its
    file makes the same guesses.

    Args:
        config: How the ensemble is made.
        worst: Quantile of the scores that stands for all above it: how much worse the bad ones are does not
            help to find the best.
    """
    config = config or FitConfig()

    def train(schedules: Sequence[SolverSchedule], scores: Sequence[Score]) -> Guess:
        values, noise = training_scores(scores, worst)
        return fit(schedules, values, noise, config).predict

    return train


def training_scores(
    scores: Sequence[Score], worst: float = 1.0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Values and their noise as the predictor takes them: failures are infinite, and bad ones equally bad.

    Raises:
        ValueError: If every score is a failure.
    """
    values = np.array([score.value for score in scores], np.float64)
    noise = np.array([score.noise for score in scores], np.float64)
    failed = ~(values < FAILURE)
    if failed.all():
        raise ValueError(f"all {len(scores)} candidates failed; there is nothing to learn from")
    bound = np.quantile(values[~failed], worst)
    values, noise = np.minimum(values, bound), np.minimum(noise, bound)
    return np.where(failed, np.inf, values), noise


def tau_of(guesses: ArrayLike, values: ArrayLike) -> float | None:
    """Kendall's tau of guesses with true scores; None where it has no value, as for equal scores."""
    tau = kendall_tau(guesses, values)
    return tau if math.isfinite(tau) else None
