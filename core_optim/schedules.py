"""Learning-rate schedules as pure functions of the step.

A factor multiplies the peak learning rate of every group. With warm-up over w steps, n steps in all and
progress s = (step - w) / (n - w) clipped to [0, 1]:

    warm-up   step / w                                        for step < w
    cosine    f + (1 - f) (1 + cos(pi s)) / 2
    linear    f + (1 - f) (1 - s)
    constant  1
    wsd       1, then f + (1 - f) d(s') over the last share of the run (Hu et al. 2024)

where f is the final ratio. The factor at step 0 of a warm-up is 0, as in the published Poseidon recipe.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

from thalweg.core_optim.config import ScheduleConfig


def warmup_steps(config: ScheduleConfig, total_steps: int | None) -> int:
    """Steps of warm-up; a ratio is rounded up to whole steps."""
    if not config.warmup_ratio:
        return config.warmup_steps
    if total_steps is None:
        raise ValueError(_needs_total(f"warmup_ratio {config.warmup_ratio}"))
    # A ratio such as 0.07 of 100 steps must give 7 although 0.07 * 100 is a little more than 7.
    return math.ceil(round(config.warmup_ratio * total_steps, 9))


def factor(config: ScheduleConfig, step: int, total_steps: int | None = None) -> float:
    """Factor on the peak learning rate at an optimizer step.

    Args:
        config: The schedule.
        step: Optimizer steps done so far, from 0. Beyond total_steps the factor stays at its final value.
        total_steps: Optimizer steps of the whole run; only a constant schedule can do without.

    Raises:
        ValueError: If the schedule needs total_steps and there is none.
    """
    warmup = warmup_steps(config, total_steps)
    if step < warmup:
        return step / warmup
    if config.name == "constant":
        return 1.0
    if total_steps is None:
        raise ValueError(_needs_total(f"schedule {config.name!r}"))
    start = warmup
    if config.name == "wsd":
        start = max(warmup, total_steps - round(config.decay_ratio * total_steps))
    if step < start:
        return 1.0
    shape = config.decay_shape if config.name == "wsd" else config.name
    # A run that ends at its peak (start == total_steps) has nothing left to decay over.
    progress = min(1.0, (step - start) / (total_steps - start)) if start < total_steps else 1.0
    return config.final_ratio + (1.0 - config.final_ratio) * _decay(shape, progress)


def bind(config: ScheduleConfig, total_steps: int | None) -> Callable[[int], float]:
    """The schedule as a function of the step alone, checked once so that errors come before training."""
    factor(config, 0, total_steps)
    factor(config, warmup_steps(config, total_steps), total_steps)
    return functools.partial(_factor_at, config, total_steps)


def _factor_at(config: ScheduleConfig, total_steps: int | None, step: int) -> float:
    return factor(config, step, total_steps)


def _decay(shape: str, progress: float) -> float:
    """Falls from 1 to 0 while progress goes from 0 to 1."""
    if shape == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    if shape == "sqrt":
        return 1.0 - math.sqrt(progress)
    assert shape == "linear", shape
    return 1.0 - progress


def _needs_total(what: str) -> str:
    return (
        f"{what} needs the number of optimizer steps, which an endless run does not have: set"
        " trainer.max_steps or trainer.max_epochs, or use schedule.name=constant with warmup_steps"
    )
