"""Bytes that an optimizer keeps, counted from shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from thalweg.core_optim.engine.optimizer import state_dtype
from thalweg.core_optim.engine.rule import StateSpec
from thalweg.core_optim.registry import rule

STEP = 4
"""Bytes of the count of steps, which every parameter has."""


def state_bytes_of(group: Mapping[str, Any]) -> int:
    """Bytes of the state of a parameter group with a rule, those of sharded parameters in full."""
    found = rule(group["rule"])
    params = list(group["params"])
    specs = found.state_elements([p.shape for p in params], group)
    total = 0
    for parameter, states in zip(params, specs):
        total += STEP + sum(_bytes(parameter, spec, group) for spec in states.values())
    return total


def _bytes(parameter: Tensor, spec: StateSpec, group: Mapping[str, Any]) -> int:
    dtype = spec.dtype or state_dtype(parameter, group["state_dtype"])
    if spec.shape == "like":
        elements = parameter.numel()
    else:
        if dtype.is_complex:
            dtype = torch.float32 if dtype == torch.complex64 else torch.float64
        elements = parameter.shape[0] if spec.shape == "rows" and parameter.dim() else 1
        if not isinstance(spec.shape, str):
            elements = math.prod(spec.shape)
    return elements * torch.empty((), dtype=dtype, device="meta").element_size()
