"""Running a compiled schedule on a denoiser: the plain sampler that searches and tests use.

Shapes: B batch, ... anything; K channels where they have coefficients of their own, of states (B, K, ...).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
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
        ValueError: If a schedule that starts from the mean gets none, or the states have other channels than
            the schedule.
    """
    rows = coefficients(schedule, x_T)
    states, predictions = [x_T], list[Tensor]()
    for i in range(len(schedule.nodes) - 1):
        if i == 0 and schedule.first != "network":
            predictions.append(first_prediction(schedule, x_T, mean))
        else:
            predictions.append(denoiser(states[-1], schedule.nodes[i]))
        factor, *weights, constant = rows[i + 1]
        x = factor * x_T
        for weight, prediction in zip(weights, predictions, strict=False):
            x = x + weight * prediction if isinstance(weight, Tensor) else x.add(prediction, alpha=weight)
        states.append(x + constant if isinstance(constant, Tensor) or constant else x)
    return states


def coefficients(schedule: Compilable, x_T: Tensor) -> list[list[float]] | list[list[Tensor]]:
    """Factor of the start, weights of the predictions and constant of each state.

    Numbers, or tensors (K, 1, ...) where channels have their own.

    Raises:
        ValueError: If the states have other channels than the schedule.
    """
    tables = []
    for part in schedule.by_channel():
        compiled = part.compile()
        constant = np.zeros(len(schedule.nodes)) if compiled.B_pred is None else compiled.B_pred
        tables.append(np.column_stack([compiled.A_pred, compiled.C_pred, constant]))
    if len(tables) == 1:
        return list(tables[0].tolist())
    check_channels(len(tables), x_T)
    shape = (len(tables),) + (1,) * (x_T.ndim - 2)
    table = torch.as_tensor(np.stack(tables), dtype=x_T.dtype, device=x_T.device)
    return [[entry.view(shape) for entry in row.unbind(1)] for row in table.unbind(1)]


def check_channels(count: int, x: Tensor) -> None:
    """Refuse states that have other channels than a schedule with coefficients for each.

    Raises:
        ValueError: If so.
    """
    if x.ndim < 2 or x.shape[1] != count:
        raise ValueError(f"the schedule has coefficients for {count} channels, the state {tuple(x.shape)}")


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
