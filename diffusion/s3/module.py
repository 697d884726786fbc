"""Training of the predictor of schedule quality under a Lightning Trainer; ``fit`` needs none."""

from __future__ import annotations

import lightning as L
import torch
from torch import Tensor

from thalweg.core_optim.build import Optimization, build
from thalweg.core_optim.config import OptimConfig
from thalweg.diffusion.s3.predictor import Data, FitConfig, kendall_tau, loss_of
from thalweg.diffusion.s3.ranker import Ranker


class PredictorModule(L.LightningModule):
    """Train an ensemble on batches of ``training_data``; validation logs Kendall's tau.

    Args:
        ranker: The network, standardised by the training data.
        optim: Optimizer and learning-rate schedule.
        config: Settings of the loss.
    """

    def __init__(self, ranker: Ranker, optim: OptimConfig, config: FitConfig | None = None) -> None:
        super().__init__()
        self.ranker = ranker
        self.optim = optim
        self.config = config or FitConfig()
        self.seen: list[tuple[Tensor, Tensor]] = []

    def configure_optimizers(self) -> Optimization:
        """Optimizer with its schedule over the whole run."""
        return build(self.ranker, self.optim, self.trainer.estimated_stepping_batches)

    def forward(self, tokens_BNF: Tensor, mask_BN: Tensor) -> Tensor:
        """Standardised predictions (E, B)."""
        return self.ranker(tokens_BNF, mask_BN)

    def training_step(self, batch: Data, batch_idx: int) -> Tensor:
        """Ranking loss of all pairs of the batch."""
        loss = loss_of(self.ranker, batch, self.config)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["scores"]))
        return loss

    def validation_step(self, batch: Data, batch_idx: int) -> None:
        """Predictions of the ensemble."""
        self.seen.append((self(batch["tokens"], batch["mask"]).mean(0), batch["scores"]))

    def on_validation_epoch_end(self) -> None:
        """Log Kendall's tau over all validation schedules."""
        predicted, true = (torch.cat(column).cpu().numpy() for column in zip(*self.seen, strict=True))
        self.log("val/tau", kendall_tau(predicted, true), prog_bar=True)
        self.seen.clear()
