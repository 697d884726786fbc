"""Running a compiled schedule on a denoiser: the plain sampler that searches and tests use.

Shapes: B batch, ... anything.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from thalweg.diffusion.solvers.linear import Compilable
from thalweg.diffusion.solvers.schedule import Node

Denoiser = Callable[[Tensor, Node], Tensor]
"""Data prediction at a state x = alpha x0 + sigma eps and its node, both of shape (B, ...)."""


def sample(schedule: Compilable, denoiser: Denoiser, x_T: Tensor, mean: Tensor | None = None) -> list[Tensor]:
    """All states that the network sees, and the result as the last one.

    Args:
        schedule: What to do.
        denoiser: Called once per node but the last, on the uncorrected state.
        x_T: Start, alpha_0 x0 + sigma_0 eps.
        mean: Mean of the data, for schedules whose first step uses it.

    Raises:
        ValueError: If a schedule that starts from the mean gets none.
    """
    compiled = schedule.compile()
    states, predictions = [x_T], list[Tensor]()
    for i in range(len(schedule.nodes) - 1):
        if i == 0 and schedule.first != "network":
            predictions.append(first_prediction(schedule, x_T, mean))
        else:
            predictions.append(denoiser(states[-1], schedule.nodes[i]))
        x = float(compiled.A_pred[i + 1]) * x_T
        for weight, prediction in zip(compiled.C_pred[i + 1].tolist(), predictions, strict=False):
            x = torch.add(x, prediction, alpha=weight)
        states.append(x)
    return states


def first_prediction(schedule: Compilable, x_T: Tensor, mean: Tensor | None) -> Tensor:
    """What stands for the network's data prediction at the start.

    Raises:
        ValueError: If the mean is needed and missing.
    """
    if schedule.first == "zero":
        return torch.zeros_like(x_T)
    if mean is None:
        raise ValueError("this schedule starts from the mean of the data; pass mean")
    return mean.to(x_T).expand_as(x_T)
