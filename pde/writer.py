"""Callback for ``thalweg predict``: predictions and truth as NetCDF, one file per data set.

Add it with ``--trainer.callbacks+=thalweg.pde.writer.PredictionWriter``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from thalweg.pde.data.pairs import part_range
from thalweg.pde.predictions import PredictionFile


class PredictionWriter(BasePredictionWriter):
    """Write what ``predict_step`` returns, in physical units, batch by batch.

    Args:
        folder: Where files go, named like the data sets.
    """

    def __init__(self, folder: str = "runs/predictions") -> None:
        super().__init__(write_interval="batch")
        self.folder = Path(folder)
        self.files: dict[int, PredictionFile] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse several processes, which would write to one file.

        Raises:
            ValueError: If there is more than one.
        """
        if stage == "predict" and trainer.world_size > 1:
            raise ValueError(f"PredictionWriter works on one device, not {trainer.world_size}")

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Tensor,
        batch_indices: Sequence[int] | None,
        batch: dict[str, Tensor],
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Append a batch; batches come in the order of the test trajectories."""
        data: Any = trainer.datamodule
        reader = data.readers[dataloader_idx]
        samples = part_range(reader.splits, "test")
        if dataloader_idx not in self.files:
            self.files[dataloader_idx] = self._open(data, dataloader_idx, batch)
        start = batch_idx * data.eval_batch_size
        truth = data.normalizers[dataloader_idx].denormalize_outputs(batch["labels"])
        chosen = list(samples[start : start + len(prediction)])
        self.files[dataloader_idx](chosen, prediction[:, None], truth[:, None])

    def _open(self, data: Any, index: int, batch: dict[str, Tensor]) -> PredictionFile:
        """File of one data set."""
        spec, reader = data.problems[index], data.readers[index]
        samples = part_range(reader.splits, "test")
        time = 0.0
        if not spec.steady:
            first = data.fix_input_to_time_step or 0
            time = float(reader.times[first + round(batch["time"][0].item() * spec.time_scale)])
        return PredictionFile(self.folder / f"{spec.name}.nc", spec, samples, [time], reader.grid)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Give the complete files their names."""
        self._close(complete=True)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Remove what is incomplete."""
        self._close(complete=False)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: Literal["predict"]) -> None:
        """Remove what is incomplete."""
        self._close(complete=False)

    def _close(self, *, complete: bool) -> None:
        for file in self.files.values():
            file.close(complete=complete)
        self.files.clear()
