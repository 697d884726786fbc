"""Shared optimizer core: optimizers, parameter groups, schedules and wrappers on top of torch alone.

The optimizers are ordinary ``torch.optim.Optimizer`` classes: ``from thalweg.core_optim import SOAP``.
"""

from __future__ import annotations

import importlib
from typing import Any

_WRAPPERS = {
    "SAM": "sam",
    "MeZO": "mezo",
    "EMA": "ema",
    "PowerEMA": "ema",
    "CoreOptimizer": "engine.optimizer",
}


def __getattr__(name: str) -> Any:
    if name in _WRAPPERS:
        return getattr(importlib.import_module(f"thalweg.core_optim.{_WRAPPERS[name]}"), name)
    if name[:1].isupper():
        from thalweg.core_optim.registry import CLASSES, optimizer_class

        if name in CLASSES:
            return optimizer_class(CLASSES[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
