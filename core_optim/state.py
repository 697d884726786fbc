"""Memory of an optimizer, counted without making it."""

from __future__ import annotations

from torch import nn

from thalweg.core_optim.config import OptimConfig
from thalweg.core_optim.groups import parameter_groups
from thalweg.core_optim.memory import state_bytes_of


def state_bytes(module: nn.Module, config: OptimConfig) -> int:
    """Bytes of the state that an optimizer keeps for the trainable parameters of a module.

    Args:
        module: Any device, meta included; nothing of it changes.
        config: The optimizer.

    Raises:
        ValueError: As :func:`thalweg.core_optim.build.build` does.
    """
    from thalweg.core_optim.build import WITHOUT_GRADIENTS

    if config.name in WITHOUT_GRADIENTS:
        return 0
    return sum(state_bytes_of(group) for group in parameter_groups(module, config))
