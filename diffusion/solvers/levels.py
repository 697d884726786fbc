"""Noise levels from the labels that networks are told."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from thalweg.diffusion.schedules import EDM, VE, Flow, NoiseSchedule, VPDiscrete


def level_of_label(values: Mapping[str, Any], label: float) -> tuple[float, float]:
    """Alpha and sigma at a label of a noise schedule in its JSON form.

    Raises:
        ValueError: For a schedule whose labels cannot be turned back.
    """
    schedule = NoiseSchedule.from_dict(values)
    if isinstance(schedule, VPDiscrete):
        t = float(schedule.t_of_label(label))
        return float(schedule.alpha(t)), float(schedule.sigma(t))
    if isinstance(schedule, Flow):
        sigma = label / schedule.label_scale
        return 1 - sigma, sigma
    if isinstance(schedule, VE):
        return 1.0, label if schedule.label_kind == "sigma" else math.exp(4 * label)
    if isinstance(schedule, EDM):
        t = math.exp(4 * label)
        return float(schedule.alpha(t)), float(schedule.sigma(t))
    scale = getattr(schedule, "label_scale", None)
    if scale is None:
        raise ValueError(f"labels of noise schedule {schedule.kind!r} cannot be turned back into levels")
    return float(schedule.alpha(label / scale)), float(schedule.sigma(label / scale))
