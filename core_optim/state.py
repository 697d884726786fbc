"""Memory of an optimizer, found by a step on the meta device."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from thalweg.core_optim.build import build
from thalweg.core_optim.config import OptimConfig, ScheduleConfig


def state_bytes(module: nn.Module, config: OptimConfig) -> int:
    """Bytes of the state that an optimizer keeps for the trainable parameters of a module.

    Args:
        module: On the meta device; its gradients are cleared.
        config: The optimizer.

    Raises:
        ValueError: As :func:`thalweg.core_optim.build.build` does.
    """
    # of all kernels only these run without storage, and the state is the same
    plain = replace(config, kernel="foreach", schedule=ScheduleConfig(name="constant"))
    optimizer = build(module, plain, None)["optimizer"]
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    tensors = [value for state in optimizer.state.values() for value in state.values()]
    return sum(value.numel() * value.element_size() for value in tensors if isinstance(value, torch.Tensor))
