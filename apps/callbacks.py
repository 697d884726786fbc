"""Callbacks of every app: averages that survive a resume, a clean stop on Ctrl-C, the optimizer's groups."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment

from thalweg.core_optim.groups import describe

Handler = Callable[[int, FrameType | None], Any] | int | None


class EMA(EMAWeightAveraging):
    """Exponential moving average of the weights, e <- d e + (1 - d) w after each step.

    Validation during a fit, later ``validate``, ``test``, ``predict`` and ``evaluate``, and exports use the
    averages. Lightning's own callback copies them over the raw weights at the end of a fit, before the last
    checkpoint is written, and an exception in the middle of a validation lets them be saved as raw weights;
    a resumed run then differs from an uninterrupted one. Here the two are exchanged, never overwritten: every
    checkpoint holds the raw weights under ``current_model_state`` and the averages under ``state_dict``.

    Args:
        decay: d of the formula; the average remembers about 1 / (1 - d) steps.
        update_every_n_steps: Steps between updates.
        update_starting_at_step: First step that updates; the first update copies the weights.
        use_buffers: Average buffers as well as parameters.
    """

    def __init__(
        self,
        decay: float = 0.999,
        update_every_n_steps: int = 1,
        update_starting_at_step: int | None = None,
        use_buffers: bool = True,
    ) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay of the moving average is {decay}, allowed: 0 <= decay < 1")
        super().__init__(
            use_buffers=use_buffers,
            decay=decay,
            update_every_n_steps=update_every_n_steps,
            update_starting_at_step=update_starting_at_step,
        )
        self.module_holds_average = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Start a new average from the weights that the module has."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.module_holds_average = False

    def _swap_models(self, pl_module: L.LightningModule) -> None:
        super()._swap_models(pl_module)
        self.module_holds_average = not self.module_holds_average

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the raw weights where they are: the last checkpoint is not yet written."""

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Give the module the averages, for what is done with it after the fit."""
        if self._average_model is not None and not self.module_holds_average:
            self._swap_models(pl_module)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Store averages and raw weights under their own keys, whichever the module holds."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._average_model is not None and self.module_holds_average:
            raw, averages = checkpoint["state_dict"], checkpoint["current_model_state"]
            checkpoint |= {"state_dict": averages, "current_model_state": raw}

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restore raw weights and averages for a fit; outside of one the averages are all that is needed."""
        if self._average_model is not None:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)


class SafeStop(L.Callback):
    """Stop a fit on Ctrl-C or SIGTERM between two steps, with a checkpoint, so that a resume loses nothing.

    The state of a run is consistent only between steps: weights, optimizer, schedule, averages and the place
    in the data belong together there. The first signal waits for the end of the step, or of the epoch with
    its validation if that is next; a second one stops at once, without a checkpoint of its own. With several
    processes, which would have to agree on the step, and under SLURM Lightning's own handling stays.
    """

    def __init__(self) -> None:
        self.requested = False
        self.former: dict[int, Handler] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take over the signals, after Lightning has; only the main thread may."""
        alone = trainer.world_size == 1 and not SLURMEnvironment.detect()
        if alone and threading.current_thread() is threading.main_thread():
            numbers = (signal.SIGINT, signal.SIGTERM)
            self.former = {number: signal.signal(number, self._request) for number in numbers}

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print("\nstopping after this step; once more to stop at once", file=sys.stderr, flush=True)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Write a checkpoint and stop, if asked to; the end of an epoch comes after its validation."""
        if self.requested and not trainer.is_last_batch:
            self._stop(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write a checkpoint and stop, if asked to."""
        if self.requested:
            self._stop(trainer)

    def _stop(self, trainer: L.Trainer) -> None:
        save_last(trainer)
        raise KeyboardInterrupt

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Give the signals back."""
        self._release()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Give the signals back."""
        self._release()

    def _release(self) -> None:
        for number, handler in self.former.items():
            signal.signal(number, handler)
        self.former = {}


class OptimizerTable(L.Callback):
    """Print the parameter groups at the start of a fit: size, algorithm, rates and bytes of state."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print one table per optimizer, on one process."""
        if not trainer.is_global_zero:
            return
        for optimizer in trainer.optimizers:
            kind = type(optimizer).__name__
            base = getattr(optimizer, "base", None)
            name = f"{kind} around {type(base).__name__}" if base is not None else kind
            print(f"{name}\n{describe(optimizer.param_groups)}")


def save_last(trainer: L.Trainer) -> None:
    """Write ``last.ckpt`` into the folder of the run's ModelCheckpoint; nothing in a run without one."""
    savers = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.dirpath]
    if not savers:
        return
    saver = max(savers, key=lambda callback: bool(callback.save_last))
    path = saver.last_model_path or os.path.join(str(saver.dirpath), f"last{saver.FILE_EXTENSION}")
    if saver.save_last:
        saver.last_model_path = path  # part of the saved state
    trainer.save_checkpoint(path)
