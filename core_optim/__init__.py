"""Shared optimizer core: optimizers, parameter groups, schedules and wrappers on top of torch alone.

The optimizers are ordinary ``torch.optim.Optimizer`` classes: ``from thalweg.core_optim import SOAP``.
Nothing is imported before it is asked for.
"""

from __future__ import annotations

import importlib
from typing import Any

_OTHERS = {
    "SAM": "sam",
    "MeZO": "mezo",
    "ZO2": "zo2",
    "EMA": "ema",
    "PowerEMA": "ema",
    "TrajectoryStore": "trajectory_store",
    "CoreOptimizer": "engine.optimizer",
    "OptimConfig": "config",
    "GroupRule": "config",
    "ScheduleConfig": "config",
    "FisherInverse": "linalg.fisher",
    "create": "registry",
    "prune_step": "pruning",
}
"""What is not made from a rule, and the module that has it."""


def __getattr__(name: str) -> Any:
    if name in _OTHERS:
        return getattr(importlib.import_module(f"thalweg.core_optim.{_OTHERS[name]}"), name)
    if name[:1].isupper():
        from thalweg.core_optim.registry import CLASSES, optimizer_class

        if name in CLASSES:
            return optimizer_class(CLASSES[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    from thalweg.core_optim.registry import CLASSES

    return sorted([*globals(), *_OTHERS, *CLASSES])
