"""Optimizers that need more of the training loop than a call of ``step``: SAM and schedule-free ones.

The command line adds `SAMGuard` and `ScheduleFreeMode` to every fit; with other optimizers they do nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor
from torch.optim import Optimizer

from thalweg.core_optim.sam import SAM

SCHEDULE_FREE_KEY = "schedule_free"
"""Entry of a checkpoint whose ``state_dict`` holds the weights for evaluation of such an optimizer."""


class SAMGuard(L.Callback):
    """Let SAM do under automatic optimisation what it says, and refuse what would silently be something else.

    In the second evaluation nothing is logged and batch norms keep their statistics; the loss that callbacks
    see is that of the first. Gradients are clipped in both: the norm of the first does not matter, and the
    second is the one that counts.
    """

    def __init__(self) -> None:
        self.optimizers: list[SAM] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look for SAM.

        Raises:
            ValueError: If the combination cannot be right.
        """
        self.optimizers = [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, SAM)]
        if not self.optimizers:
            return
        check_sam(trainer)
        for optimizer in self.optimizers:
            optimizer.model = optimizer.model or pl_module
            optimizer.around_second.append(partial(unlogged, pl_module))

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Look again at what callbacks may change from epoch to epoch."""
        if self.optimizers:
            check_sam(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Give callbacks the loss at the weights themselves; Lightning keeps that of the last evaluation."""
        if self.optimizers and isinstance(outputs, dict) and isinstance(self.optimizers[0].loss, Tensor):
            outputs["loss"] = self.optimizers[0].loss


def check_sam(trainer: L.Trainer) -> None:
    """Refuse what cannot be right with two evaluations per step.

    Raises:
        ValueError: With the reason.
    """
    module = trainer.lightning_module
    if not (module.automatic_optimization or getattr(module, "gives_closures", False)):
        raise ValueError(
            f"{type(module).__name__} runs its own steps, and SAM needs a closure: train without SAM, or let"
            " the module hand optimizer.step a closure and say gives_closures = True"
        )
    parts, precision = trainer.accumulate_grad_batches, str(trainer.precision)
    if parts != 1:
        raise ValueError(
            f"accumulate_grad_batches is {parts}, allowed with SAM: 1. Lightning can evaluate only the last"
            " of the batches again, so the second gradient would mix two places; enlarge the batch, or"
            " optimise manually with a closure that goes through all of them"
        )
    if precision == "16-mixed" or getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise ValueError(
            f"precision is {precision}, allowed with SAM: 32-true, bf16-mixed or bf16-true. The loss scaler"
            " runs the closure once and then steps without it, so there is no second evaluation"
        )
    if trainer.gradient_clip_val and trainer.gradient_clip_algorithm == "value":
        raise ValueError(
            "gradient_clip_algorithm is value, allowed with SAM: norm. Clipping each entry turns the first"
            " gradient, which points to the worst place, elsewhere"
        )
    if trainer.strategy.handles_gradient_accumulation:
        raise ValueError(f"{type(trainer.strategy).__name__} runs the steps itself, without SAM's closure")


@contextmanager
def unlogged(module: L.LightningModule) -> Iterator[None]:
    """Let a module log nothing inside."""
    before = module.__dict__.get("log")
    module.log = lambda *args, **kwargs: None
    try:
        yield
    finally:
        if before is None:
            del module.log
        else:
            module.log = before


class ScheduleFreeMode(L.Callback):
    """Switch a schedule-free optimizer between its weights for training and those for evaluation.

    Validation, exports and what follows the fit use the weights for evaluation, x; training goes on with its
    own, y, to the last bit. Checkpoints hold x under ``state_dict`` and y under ``current_model_state``, as
    those of `EMA` hold averages and raw weights, so a resumed run equals an uninterrupted one. Batch norms
    have statistics of y only.
    """

    def __init__(self) -> None:
        self.optimizers: list[Any] = []
        self.raw: list[Tensor] | None = None
        """The weights for training, while the module holds the others."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look for such an optimizer.

        Raises:
            ValueError: If its weights would be averaged once more.
        """
        self.raw = None
        self.optimizers = [found for found in map(schedule_free, trainer.optimizers) if found is not None]
        if self.optimizers and any(isinstance(c, WeightAveraging) for c in trainer.callbacks):
            raise ValueError("a schedule-free optimizer averages weights already: remove the callback EMA")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Train with the weights for training; those of a checkpoint are in place."""
        for optimizer in self.optimizers:
            optimizer.train()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validate the weights for evaluation."""
        self._evaluate()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go on with the weights for training."""
        if trainer.state.fn == "fit":
            self._train()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the weights for evaluation to what follows; the last checkpoint is written."""
        self._evaluate()

    def _evaluate(self) -> None:
        if self.optimizers and self.raw is None:
            self.raw = [p.detach().clone() for p in self._parameters()]
            for optimizer in self.optimizers:
                optimizer.eval()

    @torch.no_grad()
    def _train(self) -> None:
        if self.raw is None:
            return
        for optimizer in self.optimizers:
            optimizer.train()
        for parameter, value in zip(self._parameters(), self.raw):
            parameter.copy_(value)  # the way there and back rounds
        self.raw = None

    def _parameters(self) -> list[Tensor]:
        return [p for o in self.optimizers for group in o.param_groups for p in group["params"]]

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Store both kinds of weights, and the optimizer as it is in training."""
        if not self.optimizers:
            return
        evaluating = self.raw is not None
        self._train()
        states = [trainer.strategy.optimizer_state(optimizer) for optimizer in trainer.optimizers]
        checkpoint["optimizer_states"] = states
        checkpoint["current_model_state"] = copies(pl_module)
        self._evaluate()
        checkpoint["state_dict"] = copies(pl_module)
        checkpoint[SCHEDULE_FREE_KEY] = True
        if not evaluating:
            self._train()

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on training with the weights for training; outside of a fit those for evaluation are wanted."""
        if checkpoint.get(SCHEDULE_FREE_KEY) and trainer.state.fn == "fit":
            pl_module.load_state_dict(checkpoint["current_model_state"])


def copies(module: L.LightningModule) -> dict[str, Tensor]:
    """State of a module that does not change with it."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def schedule_free(optimizer: Optimizer) -> Any:
    """The schedule-free optimizer that this one is or wraps; None if there is none.

    Ours knows by the rules of its groups; of others, such as the package ``schedulefree``, the methods
    ``train`` and ``eval`` tell.
    """
    inner = getattr(optimizer, "base", optimizer)
    names = [group["rule"] for group in inner.param_groups if "rule" in group]
    if names:
        from thalweg.core_optim.registry import rule

        return inner if any(hasattr(rule(name), "exchange") for name in names) else None
    has_modes = callable(getattr(inner, "train", None)) and callable(getattr(inner, "eval", None))
    return inner if has_modes else None
