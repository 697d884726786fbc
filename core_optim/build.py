"""From a config to a live optimizer with its schedule, in the form that Lightning expects."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
import warnings
from collections.abc import Sequence
from typing import Any, TypedDict

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from thalweg.core_optim.config import GroupRule, OptimConfig
from thalweg.core_optim.groups import parameter_groups
from thalweg.core_optim.registry import RULES, check_name, optimizer_class
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
    check_name(config.name, [*RULES, *WITHOUT_GRADIENTS])
    steps = None if total_steps is None or total_steps < 0 or math.isinf(total_steps) else int(total_steps)
    schedule = bind(config.schedule, steps)
    if steps is not None and (warmup := warmup_steps(config.schedule, steps)) > steps:
        warnings.warn(
            f"the warm-up of {warmup} steps is longer than the run of {steps} steps: its peak is not reached",
            stacklevel=2,
        )
    groups = parameter_groups(module, config, extra_rules)
    optimizer = make_optimizer(groups, config)
    scheduler = LambdaLR(optimizer, [schedule] * len(groups))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def make_optimizer(groups: list[dict[str, Any]], config: OptimConfig) -> Optimizer:
    """Optimizer over complete groups, with sharpness-aware minimisation around it if that is asked for."""
    if config.name in WITHOUT_GRADIENTS:
        if config.sam is not None:
            raise ValueError(f"sam needs gradients, which {config.name!r} does without; remove one of them")
        return _zeroth_order(groups, config)
    optimizer = optimizer_class(config.name)(groups, kernel=config.kernel, seed=config.seed)
    if config.sam is None:
        return optimizer
    from thalweg.core_optim.sam import SAM

    return SAM(None, base=optimizer, **dataclasses.asdict(config.sam))


def _zeroth_order(groups: list[dict[str, Any]], config: OptimConfig) -> Optimizer:
    """Optimizer that evaluates losses only; its groups differ in rate and decay alone."""
    from thalweg.core_optim.mezo import MeZO

    module, name = WITHOUT_GRADIENTS[config.name].split(":")
    kind = getattr(importlib.import_module(module), name)
    given = {"seed": config.seed, **({} if config.eps is None else {"eps": config.eps}), **config.options}
    if config.betas is not None:
        raise ValueError(f"optimizer {config.name!r} has no betas; remove them")
    makers = (kind.__init__, MeZO.__init__)
    allowed = set().union(*(inspect.signature(maker).parameters for maker in makers))
    if unknown := sorted(set(given) - allowed):
        raise ValueError(
            f"optimizer {config.name!r}: option {unknown[0]!r} is unknown, allowed:"
            f" {', '.join(sorted(allowed - {'self', 'params', 'lr', 'weight_decay'}))}"
        )
    return kind(groups, **given)


WITHOUT_GRADIENTS = {
    "mezo": "thalweg.core_optim.mezo:MeZO",
    "zo2": "thalweg.core_optim.zo2:ZO2",
}
"""Optimizers that need no gradients, as module and class; Lightning runs them through a callback."""
OPTIMIZERS = RULES
"""Known algorithms that use gradients."""
