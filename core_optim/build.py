"""From a config to a live optimizer with its schedule, in the form that Lightning expects."""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from thalweg.core_optim.config import GroupRule, OptimConfig
from thalweg.core_optim.groups import parameter_groups
from thalweg.core_optim.schedules import bind, warmup_steps


class SchedulerEntry(TypedDict):
    """Scheduler and how often it steps, as Lightning reads it."""

    scheduler: LambdaLR
    interval: str


class Optimization(TypedDict):
    """Return value of ``LightningModule.configure_optimizers``."""

    optimizer: Optimizer
    lr_scheduler: SchedulerEntry


def build(
    module: nn.Module,
    config: OptimConfig,
    total_steps: int | float | None,
    extra_rules: Sequence[GroupRule] = (),
) -> Optimization:
    """Optimizer over grouped parameters with one schedule for all groups, stepped after each optimizer step.

    Args:
        module: Owner of the parameters.
        config: What to build.
        total_steps: Optimizer steps of the whole run, e.g. ``trainer.estimated_stepping_batches``; None, -1
            or infinity for an endless run.
        extra_rules: Group rules that the module brings along, tried after ``config.groups``.

    Raises:
        ValueError: For an unknown optimizer, a bad group rule, or a schedule that needs total_steps.
    """
    make = _lookup(config.name)
    steps = None if total_steps is None or total_steps < 0 or math.isinf(total_steps) else int(total_steps)
    schedule = bind(config.schedule, steps)
    if steps is not None and (warmup := warmup_steps(config.schedule, steps)) > steps:
        warnings.warn(
            f"the warm-up of {warmup} steps is longer than the run of {steps} steps: its peak is not reached",
            stacklevel=2,
        )
    groups = parameter_groups(module, config, extra_rules)
    optimizer = make(groups, config)
    scheduler = LambdaLR(optimizer, [schedule] * len(groups))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _lookup(name: str) -> Callable[[list[dict[str, Any]], OptimConfig], Optimizer]:
    if name not in OPTIMIZERS:
        near = difflib.get_close_matches(name.lower(), OPTIMIZERS, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"optimizer {name!r} is unknown, allowed: {', '.join(sorted(OPTIMIZERS))}{hint}")
    return OPTIMIZERS[name]


def _adamw(groups: list[dict[str, Any]], config: OptimConfig) -> Optimizer:
    """AdamW (Loshchilov & Hutter 2019): decay by lr * weight_decay, apart from the gradient."""
    kernel = config.kernel
    if kernel == "auto":
        kernel = "fused" if all(_has_fused_kernel(p) for g in groups for p in g["params"]) else "foreach"
    optimizer = torch.optim.AdamW(groups, fused=kernel == "fused", foreach=kernel == "foreach")
    if kernel == "fused":
        # The flag asks loss scalers to leave unscaling to the kernel. Then gradients could not be clipped in
        # between, and Lightning refuses clipping under any mixed precision. Without it scalers unscale first.
        optimizer._step_supports_amp_scaling = False
    return optimizer


def _has_fused_kernel(parameter: nn.Parameter) -> bool:
    return parameter.is_floating_point() and parameter.device.type in ("cpu", "cuda", "mps", "xpu")


OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], OptimConfig], Optimizer]] = {"adamw": _adamw}
"""Known algorithms; each takes complete parameter groups."""
