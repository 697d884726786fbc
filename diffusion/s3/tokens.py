"""A solver schedule as a sequence of feature vectors, one per step: what a predictor of its quality reads.

Two descriptions of a step are at hand. Its compiled weights say what it does, whatever it is called:
different decisions with equal weights have equal features. Its decisions say how it was written. The weights
alone rank unseen schedules better (benchmarks/s3_predictor.py), so decisions are left out by default.

Shapes: B schedules, N steps, F features. Lambda is bounded, so that pure noise and pure data have a place.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from thalweg.diffusion.solvers.compile import Compiled
from thalweg.diffusion.solvers.schedule import FIRST_STEPS, PREDICTIONS, SolverSchedule, Step

Array = NDArray[np.float64]

MAX_LAM = 8.0
"""Bound of lambda = ln(alpha / sigma)."""
MAX_ORDER = 4
"""Orders above share one feature; as many predictions have a weight as a feature."""
MAX_WEIGHT = 5.0
"""Bound of a prediction's share in a step."""

_LEVELS = ("lam", "h", "log_h", "log_ratio", "alpha", "sigma", "end_sigma", "position", "left")
_WHOLE = ("nfe", "last_lam", "last_sigma", *(f"first_{name}" for name in FIRST_STEPS))
_WEIGHTS = tuple(f"weight_{lag}" for lag in range(MAX_ORDER))
_DECISIONS = (
    *(f"prediction_{name}" for name in PREDICTIONS),
    *(f"order_{n}" for n in range(1, MAX_ORDER + 1)),
    *("active", "reach", "scale_c", "corrector", "corrector_order", "start_distance"),
)

# First-order constant of R(h) = 1 + c z + ... for the scalings that have none of their own.
_SLOPES = {"none": 0.0, "bh1": -1 / 3, "bh2": 1 / 6}


def feature_names(decisions: bool = False) -> tuple[str, ...]:
    """Names of the F features, in their order."""
    return (*_LEVELS, *_WHOLE, *_WEIGHTS, *(_DECISIONS if decisions else ()))


def tokens(schedule: SolverSchedule, *, decisions: bool = False, compiled: Compiled | None = None) -> Array:
    """Features of the steps of a schedule, (N, F), named by :func:`feature_names`.

    Args:
        schedule: The schedule.
        decisions: Give the decisions as well: one-hot prediction and order, nodes and scaling of the first
            derivative, corrector, distance of the start.
        compiled: Its coefficients, where they are known already; compiling takes most of the time.
    """
    parts = [_levels(schedule), _whole(schedule), _weights(schedule, compiled or schedule.compile())]
    if decisions:
        parts.append(np.array([_decisions(step, i) for i, step in enumerate(schedule.steps)]))
    return np.concatenate(parts, 1)


def _levels(schedule: SolverSchedule) -> Array:
    """Where a step lies and how long it is."""
    nodes, count = schedule.nodes, len(schedule.nodes) - 1
    sigma = np.array([node.sigma for node in nodes])
    alpha = np.array([node.alpha for node in nodes])
    lam = np.array([min(max(node.lam, -MAX_LAM), MAX_LAM) for node in nodes])
    h = np.maximum(np.diff(lam), 1e-6)
    log_h = np.log(h)
    ratio = np.diff(log_h, prepend=log_h[0])
    place = np.arange(count)
    columns = [lam[:-1], h, log_h, ratio, alpha[:-1], sigma[:-1], sigma[1:], place / count, count - 1 - place]
    return np.stack(columns, 1)


def _whole(schedule: SolverSchedule) -> Array:
    """What is the same at every step: evaluations, last level evaluated, last level, first step."""
    last = min(max(schedule.nodes[-2].lam, -MAX_LAM), MAX_LAM)
    first = [float(schedule.first == name) for name in FIRST_STEPS]
    row = np.array([schedule.nfe, last, schedule.nodes[-1].sigma, *first])
    return np.broadcast_to(row, (len(schedule.nodes) - 1, len(row)))


def _weights(schedule: SolverSchedule, compiled: Compiled) -> Array:
    """Shares of the newest data predictions in what a step adds, newest first; all shares sum to one."""
    ratio, weights = compiled.steps()
    alpha = np.array([node.alpha for node in schedule.nodes])
    total = alpha[1:] - ratio * alpha[:-1]
    shares = np.zeros((len(ratio), MAX_ORDER))
    for lag in range(min(MAX_ORDER, len(ratio))):
        shares[lag:, lag] = np.diagonal(weights, -lag) / total[lag:]
    return shares.clip(-MAX_WEIGHT, MAX_WEIGHT)


def _decisions(step: Step, i: int) -> list[float]:
    """What step i was told to do."""
    order, corrector = min(step.order, MAX_ORDER), step.corrector
    kinds = [float(step.prediction == name) for name in PREDICTIONS]
    orders = [float(order == n) for n in range(1, MAX_ORDER + 1)]
    active = reach = slope = 0.0
    if step.derivatives:
        first = step.derivatives[0]
        active = float(len(first.nodes))
        reach = float(i - min(p for d in step.derivatives for p in d.nodes))
        kind, c = first.scale.kind, first.scale.c
        sign = -1.0 if step.prediction == "data" and kind != "linear" else 1.0
        slope = sign * _SLOPES.get(kind, c)
    again = float(corrector is not None), float(corrector.order if corrector else 0)
    return [*kinds, *orders, active, reach, slope, *again, float(i - step.start)]


def pad(
    sequences: Sequence[Array], length: int | None = None
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Sequences of different lengths as one array.

    Args:
        sequences: B arrays (N, F).
        length: Steps of the result, the longest sequence's by default.

    Returns:
        Features (B, N, F), zero behind the end of a sequence, and where there is a step (B, N).

    Raises:
        ValueError: If there is no sequence, or one is longer than ``length``.
    """
    if not sequences:
        raise ValueError("found no schedules, needed: at least one")
    longest = max(map(len, sequences))
    length = longest if length is None else length
    if longest > length:
        raise ValueError(f"a schedule has {longest} steps, allowed: {length} at most")
    features = np.zeros((len(sequences), length, sequences[0].shape[1]), np.float32)
    mask = np.zeros((len(sequences), length), np.bool_)
    for i, sequence in enumerate(sequences):
        features[i, : len(sequence)] = sequence
        mask[i, : len(sequence)] = True
    return features, mask


def token_batch(
    schedules: Sequence[SolverSchedule], *, decisions: bool = False
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Features (B, N, F) and mask (B, N) of schedules; see :func:`pad`."""
    return pad([tokens(schedule, decisions=decisions) for schedule in schedules])
