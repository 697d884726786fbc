"""State that survives a checkpoint in its own dtype.

torch casts loaded state to the dtype of the parameter: fp32 moments of bf16 parameters, counters and masks
would all become bf16. Here each tensor keeps the dtype in which it was saved.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer


def restore_dtypes(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """After ``load_state_dict``: take every tensor from the checkpoint again, on the device of its parameter.

    Args:
        optimizer: Already loaded.
        saved: What it was loaded from.
    """
    numbers = [n for group in saved["param_groups"] for n in group["params"]]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        for name, value in saved["state"].get(number, {}).items():
            if not isinstance(value, Tensor):
                continue
            if name == "step":
                optimizer.state[parameter][name] = value.detach().to("cpu", copy=True)
            elif isinstance(value, DTensor):
                optimizer.state[parameter][name] = value.detach().clone()
            else:
                device = parameter.to_local().device if isinstance(parameter, DTensor) else parameter.device
                optimizer.state[parameter][name] = value.detach().to(device, copy=True)
