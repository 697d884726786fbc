"""Training of operator networks on all-to-all pairs: the LightningModule of Poseidon and its baselines.

Shapes: B batch, C channels, H/W space.
"""

from __future__ import annotations

from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torchmetrics import MeanMetric

from thalweg.core_optim.build import Optimization, build
from thalweg.core_optim.config import GroupRule, OptimConfig
from thalweg.pde.data.normalize import Normalizer
from thalweg.pde.metrics import RelativeLp
from thalweg.pde.poseidon.finetune import load_pretrained
from thalweg.pde.poseidon.groups import freeze_latent, group_rules
from thalweg.pde.poseidon.matching import check_network
from thalweg.pde.poseidon.model import ScOT
from thalweg.pde.problem import ProblemSpec

Batch = dict[str, Tensor]
BASELINE_RULES = (GroupRule(name="no_weight_decay", pattern="bias|norm", weight_decay=0.0, optional=True),)
"""Baselines have no conditional norms of the published kind; their biases and norms do not decay either."""


class PoseidonModule(L.LightningModule):
    """Train, validate and apply an operator network; works with ``PDEDataModule``.

    The module stores no hyper-parameters of its own: the command line embeds the resolved configuration in
    every checkpoint, and flags win on resume.

    Args:
        network: scOT, FNOOperator, UNetOperator, or another network with their forward signature.
        optim: Optimizer and schedule; one cosine scales all groups, step by step.
        lr_embedding_recovery: Learning rate of patch embedding and recovery, for fine-tuning.
        lr_time_embedding: Learning rate of the norms conditioned on time, for fine-tuning.
        pretrained: Weights to start from: ``hf://org/name``, a folder, or a ``.ckpt``. Not needed on resume.
        replace_embedding_recovery: Initialise patch embedding and recovery afresh where the channels of the
            pretrained network differ.
        freeze: ``latent`` trains patch embedding, recovery and conditional norms only.
        compile: Compile the network with torch.compile; names in checkpoints stay the same.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
    """

    def __init__(
        self,
        network: nn.Module,
        optim: OptimConfig,
        lr_embedding_recovery: float | None = None,
        lr_time_embedding: float | None = None,
        pretrained: str | None = None,
        replace_embedding_recovery: bool = False,
        freeze: Literal["none", "latent"] = "none",
        compile: bool = False,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.network = network
        self.optim = optim
        self.extra_rates = {
            "lr_embedding_recovery": lr_embedding_recovery,
            "lr_time_embedding": lr_time_embedding,
        }
        self.pretrained = pretrained
        self.replaces_ends = replace_embedding_recovery
        self.frozen_part = freeze
        self.compiles = compile
        self.checkpoints_gradients = gradient_checkpointing
        self.is_configured = False
        self.pretrained_error: Exception | None = None
        self.val_errors = nn.ModuleList()
        self.val_losses = nn.ModuleList()
        if replace_embedding_recovery and pretrained is None:
            raise ValueError("replace_embedding_recovery acts on pretrained weights: give pretrained as well")

    @property
    def problems(self) -> list[ProblemSpec]:
        """Data sets of the run, in the order of ``batch["dataset"]``.

        Raises:
            ValueError: If the trainer has no data module that knows them.
        """
        data = getattr(self.trainer, "datamodule", None)
        if data is None or not hasattr(data, "problems"):
            raise ValueError(
                "PoseidonModule needs a data module with problems and normalizers: PDEDataModule"
            )
        problems: list[ProblemSpec] = data.problems
        return problems

    @property
    def normalizers(self) -> list[Normalizer]:
        """Normalisers of the data sets, in the same order."""
        normalizers: list[Normalizer] = self.trainer.datamodule.normalizers
        return normalizers

    def setup(self, stage: str) -> None:
        """Check that network and data fit, and make the validation metrics."""
        check_network(self.network.config, self.problems)
        self.val_errors = nn.ModuleList(RelativeLp.for_problem(problem) for problem in self.problems)
        self.val_losses = nn.ModuleList(MeanMetric() for _ in self.problems)

    def configure_model(self) -> None:
        """Load pretrained weights, freeze, shard and compile; does its work once."""
        if self.is_configured:
            return
        self.is_configured = True
        if self.pretrained is not None:
            try:
                load_pretrained(self.network, self.pretrained, replace=self.replaces_ends)
            except (ValueError, OSError) as error:
                self.pretrained_error = error
        if self.frozen_part == "latent":
            freeze_latent(self.network)
        self.network.gradient_checkpointing = self.checkpoints_gradients
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            self._shard()
        if self.compiles:
            self.network.compile()

    def _require_weights(self) -> None:
        """Fail if pretrained weights could not be loaded and no checkpoint has replaced them.

        Lightning restores checkpoints after ``configure_model``; a resumed run does not need the weights that
        it once started from.
        """
        if self.pretrained_error is not None and self.trainer.ckpt_path is None:
            raise self.pretrained_error

    def on_train_start(self) -> None:
        """Make sure that training starts from the weights that were asked for."""
        self._require_weights()

    def on_validation_start(self) -> None:
        """Make sure that the weights are those that were asked for."""
        self._require_weights()

    def on_test_start(self) -> None:
        """Make sure that the weights are those that were asked for."""
        self._require_weights()

    def on_predict_start(self) -> None:
        """Make sure that the weights are those that were asked for."""
        self._require_weights()

    def _shard(self) -> None:
        """Split the network over the data-parallel devices, block by block (FSDP2).

        Raises:
            ValueError: If weights are averaged too: Lightning's averaging does not know shards.
        """
        from torch.distributed.fsdp import fully_shard

        if any(isinstance(callback, WeightAveraging) for callback in self.trainer.callbacks):
            raise ValueError("weight averaging does not work on a sharded model: remove it or use ddp")
        assert self.device_mesh is not None
        mesh = self.device_mesh["data_parallel"]
        for block in self.network.wrap_modules():
            fully_shard(block, mesh=mesh)
        fully_shard(self.network, mesh=mesh)

    def configure_optimizers(self) -> Optimization:
        """Optimizer over the published parameter groups, with its schedule over the whole run.

        Raises:
            ValueError: If a baseline is given the extra learning rates of scOT.
        """
        rules: list[GroupRule]
        if isinstance(self.network, ScOT):
            rules = group_rules(self.optim.lr, self.optim.weight_decay, **self.extra_rates)
        elif any(rate is not None for rate in self.extra_rates.values()):
            names = " and ".join(self.extra_rates)
            raise ValueError(f"{names} belong to scOT, not to {type(self.network).__name__}: remove them")
        else:
            rules = list(BASELINE_RULES)
        return build(self.network, self.optim, self.trainer.estimated_stepping_batches, rules)

    def forward(self, pixel_values: Tensor, time: Tensor) -> Tensor:
        """Normalised prediction (B, C, H, W) at the lead times."""
        output: Tensor = self.network(pixel_values, time).output
        return output

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Grouped relative loss of one batch of pairs."""
        loss = self._predict(batch).loss
        if not torch.isfinite(loss):
            raise ValueError(self._explain(loss, batch, batch_idx))
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["time"]))
        result: Tensor = loss
        return result

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Loss and relative errors of one batch; each data set has its own loader."""
        result = self._predict(batch)
        self.val_losses[dataloader_idx].update(result.loss, weight=len(batch["time"]))
        self.val_errors[dataloader_idx].update(result.output, batch["labels"])

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """As in validation, on the test split."""
        self.validation_step(batch, batch_idx, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Log per data set and averaged over data sets."""
        self._report("val")

    def on_test_epoch_end(self) -> None:
        """Log per data set and averaged over data sets."""
        self._report("test")

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Prediction in physical units, shape (B, C, H, W)."""
        output = self._predict(batch).output.float()
        physical = torch.empty_like(output)
        for index in batch["dataset"].unique().tolist():
            chosen = batch["dataset"] == index
            physical[chosen] = self.normalizers[index].denormalize_outputs(output[chosen])
        return physical

    def _predict(self, batch: Batch) -> Any:
        """Output and loss of the network."""
        return self.network(
            batch["pixel_values"],
            batch["time"],
            pixel_mask=batch.get("pixel_mask"),
            labels=batch.get("labels"),
        )

    def _report(self, prefix: str) -> None:
        """Log medians and losses of every data set that was seen, and their means."""
        losses, medians = [], []
        for problem, errors, loss in zip(self.problems, self.val_errors, self.val_losses, strict=True):
            if not errors.update_called:
                continue
            report = errors.compute()
            losses.append(loss.compute())
            medians.append(report["scored_median_relative_l1_error"])
            single = f"{prefix}/{problem.name}"
            self.log_dict({f"{single}/loss": losses[-1], f"{single}/median_relative_l1": medians[-1]})
            errors.reset()
            loss.reset()
        if losses:
            self.log(f"{prefix}/loss", torch.stack(losses).mean(), prog_bar=True)
            self.log(f"{prefix}/median_relative_l1", torch.stack(medians).mean(), prog_bar=True)

    def _explain(self, loss: Tensor, batch: Batch, batch_idx: int) -> str:
        """What is known when the loss is not a number."""
        names = ", ".join(self.problems[i].name for i in batch["dataset"].unique().tolist())
        bad = [key for key in ("pixel_values", "labels") if not torch.isfinite(batch[key]).all()]
        cause = (
            f"its {' and '.join(bad)} hold NaN or infinity, so the data are damaged"
            if bad
            else "its data are finite, so training diverged: lower the learning rate or clip gradients"
        )
        return (
            f"the loss is {loss.item()} at step {self.trainer.global_step} (epoch {self.current_epoch}, batch"
            f" {batch_idx}) on data set {names}; {cause}"
        )
