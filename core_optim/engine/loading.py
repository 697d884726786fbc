"""State that survives a checkpoint in its own dtype.

torch casts loaded state to the dtype of the parameter: fp32 moments of bf16 parameters, counters and masks
would all become bf16. Here each tensor keeps the dtype in which it was saved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer


def refuse_foreign(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Before ``load_state_dict`` changes anything: the checkpoint must be one of the same rules.

    A checkpoint of torch's own classes names no rule, and its state tells.

    Raises:
        ValueError: If a group was saved with another rule, or a state lacks what the rule keeps.
    """
    from thalweg.core_optim.registry import rule

    for number, (group, now) in enumerate(zip(saved["param_groups"], optimizer.param_groups)):
        name = group.get("rule", now["rule"])
        if name != now["rule"]:
            raise ValueError(
                f"group {number} was saved with the rule {name!r}, and is now {now['rule']!r}; build the"
                " optimizer with the groups of the checkpoint"
            )
        for i, parameter in zip(group["params"], now["params"]):
            state = saved["state"].get(i)
            needed = rule(name).states(parameter.shape, {**now, **group}) if state else {}
            if missing := [key for key in needed if key not in state]:
                raise ValueError(
                    f"group {number}: the saved state of parameter {i} has {', '.join(map(str, state))} and"
                    f" no {missing[0]!r}, so it is not of {name!r}; load it into the optimizer that saved it"
                )


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
            if name == "step":
                optimizer.state[parameter][name] = torch.tensor(float(value))
            elif not isinstance(value, Tensor):
                continue
            elif isinstance(value, DTensor):
                optimizer.state[parameter][name] = value.detach().clone()
            else:
                device = parameter.to_local().device if isinstance(parameter, DTensor) else parameter.device
                optimizer.state[parameter][name] = value.detach().to(device, copy=True)
