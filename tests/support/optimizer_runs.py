"""Fits of real modules with optimizers and loss terms that need callbacks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from poseidon_runs import data, module, scot, trainer
from torch import Tensor

from thalweg.checkpoints import lightning_ckpt
from thalweg.core_optim.config import OptimConfig, ScheduleConfig
from thalweg.core_optim.sam import SAM
from thalweg.pde.poseidon.module import PoseidonModule

Weights = dict[str, Tensor]


class Chosen(PoseidonModule):
    """Another optimizer."""

    made: Any = staticmethod(lambda params: SAM(params, "AdamW", {"lr": 1e-2}, rho=0.1))

    def configure_optimizers(self) -> Any:
        return self.made(self.network.parameters())


class Steps(L.Callback):
    """What a fit does."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.evaluations = 0
        self.validated: list[Weights] = []
        self.terms: list[float | None] = []

    def on_after_backward(self, *_: Any) -> None:
        self.evaluations += 1

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(float(outputs["loss"]))
        found = [trainer.callback_metrics.get(f"train/{name}") for name in ("saf", "mesa")]
        self.terms += [float(value) for value in found if value is not None] or [None]

    def on_validation_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.validated.append(copy_of(pl_module))


def copy_of(model: L.LightningModule) -> Weights:
    return {name: value.detach().clone() for name, value in model.network.state_dict().items()}


def equal(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def chosen(make: Any = None, seed: int = 1) -> Chosen:
    model = Chosen(scot(seed=seed), OptimConfig(lr=1e-2))
    if make is not None:
        model.made = make
    return model


def plain(seed: int = 1) -> PoseidonModule:
    return module(scot(seed=seed), optim=OptimConfig(lr=1e-2, schedule=ScheduleConfig(name="constant")))


def fit(
    model: L.LightningModule,
    folder: Path,
    out: Path,
    callbacks: Sequence[L.Callback] = (),
    ckpt: Path | None = None,
    **options: Any,
) -> tuple[L.Trainer, Steps]:
    """Epochs of three steps and one validation batch each."""
    steps = Steps()
    given = {"max_epochs": 1, "limit_train_batches": 3, "limit_val_batches": 1, **options}
    datamodule = given.pop("datamodule", None) or data(folder, "NS-Sines")
    saver = ModelCheckpoint(out, save_last=True)
    run = trainer(out, callbacks=[*callbacks, steps, saver], enable_checkpointing=True, **given)
    run.fit(model, datamodule=datamodule, ckpt_path=ckpt)
    return run, steps


def plain_sgd() -> Chosen:
    return chosen(lambda params: torch.optim.SGD(params, lr=0.0))


def stored(path: Path, weights: Any) -> Weights:
    return lightning_ckpt.read(path, weights).network_state()
