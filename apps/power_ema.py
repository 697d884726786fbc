"""Power-function averages of any app's weights: snapshots while it trains (Karras et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor

from thalweg.apps.ema_profiles import KIND
from thalweg.checkpoints.tensors import save
from thalweg.core_optim import ema


class PowerEMA(L.Callback):
    """Keep averages with a few profiles, and write them down again and again.

    ``thalweg ema`` makes from the snapshots the average of any other profile, after the fit, so that its
    length need not be chosen before. Validation and checkpoints keep the weights they have.

    Args:
        stds: Relative standard deviations of the profiles; two are enough.
        every_n_steps: Optimizer steps between snapshots. A fit should have some dozens; the last step is
            written in any case.
        folder: Where snapshots go; ``power_ema`` in the folder of the run by default.
        dtype: How they are written.
        device: Where averages are kept; that of the weights by default.
    """

    def __init__(
        self,
        stds: Sequence[float] = (0.05, 0.1),
        every_n_steps: int = 1000,
        folder: str | None = None,
        dtype: Literal["float32", "float16", "bfloat16"] = "float32",
        device: str | None = None,
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps is {every_n_steps}, allowed: an integer >= 1")
        ema.PowerEMA(torch.nn.Identity(), stds)  # checks them
        self.stds, self.every_n_steps = tuple(stds), every_n_steps
        self.folder, self.dtype, self.device = folder, dtype, device
        self.average: ema.PowerEMA | None = None
        self.loaded: dict[str, Any] = {}
        self.written = 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the averages or continue them."""
        self.average = ema.PowerEMA(pl_module, self.stds, device=self.device)
        self.written = 0
        if self.loaded:
            self.average.load_state_dict(self.loaded)
            self.loaded = {}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Take in the weights of a step."""
        assert self.average is not None
        if trainer.global_step > self.average.time:
            self.average.update(pl_module, trainer.global_step)
            if trainer.global_step % self.every_n_steps == 0:
                self._write(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the last snapshot."""
        self._write(trainer)

    def _write(self, trainer: L.Trainer) -> None:
        assert self.average is not None
        step = int(self.average.time)
        if step in (0, self.written):
            return
        self.written = step
        folder = Path(self.folder or Path(trainer.log_dir or trainer.default_root_dir) / KIND)
        for gamma, std, weights in zip(self.average.gammas, self.average.stds, self.average.averages):
            whole = {name: _whole(weight).to(getattr(torch, self.dtype)) for name, weight in weights.items()}
            if trainer.is_global_zero:
                about = {"kind": KIND, "gamma": gamma, "std": std, "step": step}
                save(whole, folder / f"step{step:08d}-std{std:.6g}.safetensors", about)

    def state_dict(self) -> dict[str, Any]:
        """The averages."""
        return self.loaded if self.average is None else self.average.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the averages when the fit starts."""
        self.loaded, self.average = state_dict, None


def _whole(tensor: Tensor) -> Tensor:
    """A weight that may be split over processes, put together."""
    full = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()
