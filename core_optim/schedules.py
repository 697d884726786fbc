"""Learning-rate schedules as pure functions of the step.

A factor multiplies the peak learning rate of every group. With warm-up over w steps, n steps in all and
progress s = (step - w) / (n - w) clipped to [0, 1]:

    warm-up         step / w                                  for step < w
    cosine          f + (1 - f) (1 + cos(pi s)) / 2           Loshchilov & Hutter 2017
    linear          f + (1 - f) (1 - s)
    linear-to-zero  1 - s                                     best for the last iterate, Defazio et al. 2023
    one-minus-sqrt  f + (1 - f) (1 - sqrt(s))                 Haegele et al. 2024
    power           f + (1 - f) (1 - s)^power                 polynomial decay
    inverse-sqrt    max(f, sqrt(T / (T + step - w)))          Vaswani et al. 2017 with T = w
    cyclic          f + (1 - f) d(s_k) in each of k cycles    Loshchilov & Hutter 2017; Smith 2017
    wsd             1, then f + (1 - f) d(s') over the last share of the run (Hu et al. 2024)
    constant        1

where f is the final ratio, T the timescale and d the curve ``decay_shape``. The factor at step 0 of a warm-up
is 0, as in the published Poseidon recipe.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

from thalweg.core_optim.config import ScheduleConfig

# schedules that are one decay over all that follows the warm-up, and its curve
_SHAPES = {"cosine": "cosine", "linear": "linear", "linear-to-zero": "linear", "one-minus-sqrt": "sqrt"}


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
        total_steps: Optimizer steps of the whole run; constant and inverse-sqrt can do without.

    Raises:
        ValueError: If the schedule needs total_steps and there is none.
    """
    warmup = warmup_steps(config, total_steps)
    if step < warmup:
        return step / warmup
    if config.name == "constant":
        return 1.0
    if config.name == "inverse-sqrt":
        timescale = config.timescale or max(warmup, 1)
        return max(config.final_ratio, math.sqrt(timescale / (timescale + step - warmup)))
    if total_steps is None:
        raise ValueError(_needs_total(f"schedule {config.name!r}"))
    start = warmup
    if config.name == "wsd":
        start = max(warmup, total_steps - round(config.decay_ratio * total_steps))
    if step < start:
        return 1.0
    # A run that ends at its peak (start == total_steps) has nothing left to decay over.
    progress = min(1.0, (step - start) / (total_steps - start)) if start < total_steps else 1.0
    return config.final_ratio + (1.0 - config.final_ratio) * _height(config, progress)


def bind(config: ScheduleConfig, total_steps: int | None) -> Callable[[int], float]:
    """The schedule as a function of the step alone, checked once so that errors come before training."""
    factor(config, 0, total_steps)
    factor(config, warmup_steps(config, total_steps), total_steps)
    return functools.partial(_factor_at, config, total_steps)


def _factor_at(config: ScheduleConfig, total_steps: int | None, step: int) -> float:
    return factor(config, step, total_steps)


def _height(config: ScheduleConfig, progress: float) -> float:
    """Height between the final ratio (0) and the peak (1) while progress goes from 0 to 1."""
    if config.name == "power":
        return (1.0 - progress) ** config.power
    if config.name == "cyclic":
        return _cycle(config, progress)
    if config.name == "wsd":
        return _decay(config.decay_shape, progress)
    return _decay(_SHAPES[config.name], progress)


def _cycle(config: ScheduleConfig, progress: float) -> float:
    """Saw-tooth or triangles; the first cycle only falls, as it starts from the peak of the warm-up."""
    if progress >= 1.0:
        return 0.0
    cycle, within = divmod(progress * config.cycles, 1.0)
    rise = config.cycle_rise if cycle else 0.0
    return within / rise if within < rise else _decay(config.decay_shape, (within - rise) / (1.0 - rise))


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
        " trainer.max_steps or trainer.max_epochs, or use schedule.name=constant or inverse-sqrt with"
        " warmup_steps"
    )
