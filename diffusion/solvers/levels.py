"""Noise levels from the labels that networks are told, on the device of the labels.

Shapes: B labels, N nodes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from thalweg.diffusion.schedules import EDM, VE, Flow, NoiseSchedule, VPCosine, VPDiscrete, VPLinear
from thalweg.diffusion.solvers.schedule import Node

NEAR = 1e-3
"""Largest distance of a label from that of a node which it is taken for."""


def level_of_label(values: Mapping[str, Any], label: float) -> tuple[float, float]:
    """Alpha and sigma at a label of a noise schedule in its JSON form.

    Raises:
        ValueError: For a schedule whose labels cannot be turned back.
    """
    found = levels_of_labels(NoiseSchedule.from_dict(values), torch.tensor(label, dtype=torch.float64))
    return float(found[0]), float(found[1])


def levels_of_labels(schedule: NoiseSchedule, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Alpha and sigma at labels, (B,) each; nothing is read back from a device.

    Raises:
        ValueError: For a schedule whose labels cannot be turned back.
    """
    if isinstance(schedule, Flow):
        sigma = labels / schedule.label_scale
        return 1 - sigma, sigma
    if isinstance(schedule, VE):
        sigma = labels if schedule.label_kind == "sigma" else torch.exp(4 * labels)
        return torch.ones_like(sigma), sigma
    if isinstance(schedule, EDM):
        t = torch.exp(4 * labels)
        norm = torch.sqrt(t**2 + schedule.sigma_data**2)
        return schedule.sigma_data / norm, t / norm
    log_alpha = _log_alpha(schedule, labels)
    return torch.exp(log_alpha), torch.sqrt(-torch.expm1(2 * log_alpha))


def _log_alpha(schedule: NoiseSchedule, labels: Tensor) -> Tensor:
    """Logarithm of alpha of a variance preserving schedule."""
    if isinstance(schedule, VPDiscrete):
        return _from_table(schedule, labels)
    if isinstance(schedule, VPLinear):
        t = labels / schedule.label_scale
        return -(t**2) * (schedule.beta_1 - schedule.beta_0) / 4 - t * schedule.beta_0 / 2
    if isinstance(schedule, VPCosine):
        d = labels / schedule.label_scale * (math.pi / 2 / (1 + schedule.s))
        tan = math.tan(schedule.s / (1 + schedule.s) * math.pi / 2)
        return torch.log1p(-2 * torch.sin(d / 2) ** 2 - torch.sin(d) * tan)
    raise ValueError(f"labels of noise schedule {schedule.kind!r} cannot be turned back into levels")


def _from_table(schedule: VPDiscrete, labels: Tensor) -> Tensor:
    """Linear between the entries, which have the labels 0 to n - 1."""
    entries = schedule.log_alpha(schedule.t_of_label(range(schedule.n))).tolist()  # type: ignore[arg-type]
    zero_snr = schedule.rescale_zero_snr
    last = schedule.n - 2 - zero_snr  # first entry of the last segment that is linear in ln alpha
    table = torch.tensor(entries[: last + 2], dtype=labels.dtype, device=labels.device)
    k = labels.floor().clamp(0, last).long()
    found = table[k] + (labels - k) * (table[k + 1] - table[k])
    if zero_snr:
        left = (schedule.n - 1 - labels).clamp(min=0)
        found = torch.where(labels > schedule.n - 2, entries[-2] + torch.log(left), found)
    return found.clamp(max=0.0)


def levels_at(nodes: Sequence[Node], schedule: NoiseSchedule | None, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Alpha and sigma at labels: those of the node with the label, else of the noise schedule.

    Where there is no noise schedule, a label that is no node's is refused on the CPU; on another device that
    would mean to wait for it, and its levels are NaN.

    Raises:
        ValueError: If a label is no node and there is no noise schedule.
    """
    precise = torch.float32 if labels.device.type == "mps" else torch.float64
    labels = labels.reshape(-1).to(precise)
    known = [(node.t if node.label is None else node.label, node.alpha, node.sigma) for node in nodes]
    rows = torch.tensor([row for row in known if row[0] is not None], dtype=precise, device=labels.device)
    if not len(rows):
        rows = torch.full((1, 3), math.nan, dtype=precise, device=labels.device)
    distance, nearest = (labels[:, None] - rows[None, :, 0]).abs().min(1)
    is_node = distance < NEAR
    if schedule is not None:
        others = levels_of_labels(schedule, labels)
    else:
        if labels.device.type == "cpu" and not is_node.all():
            label = float(labels[~is_node][0])
            raise ValueError(
                f"label {label} is no node, and the scheduler has no noise_schedule to look it up"
            )
        others = (torch.full_like(labels, math.nan),) * 2
    alpha, sigma = (torch.where(is_node, rows[nearest, i + 1], others[i]) for i in range(2))
    return alpha, sigma
