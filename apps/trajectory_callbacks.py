"""Flatter minima without second gradients, for any app: SAF and MESA as callbacks (Du et al. 2022)."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from thalweg.apps.loss_term import Call, LossTerm, tensor_of
from thalweg.core_optim.ema import EMA
from thalweg.core_optim.mezo import MeZO
from thalweg.core_optim.sam import SAM
from thalweg.core_optim.trajectory import Kind, distance_to_past, is_active, replay, streams_of
from thalweg.core_optim.trajectory_store import Precision, TrajectoryStore

CHANGES = {"flip": "mirrors images", "mixup": "mixes samples", "cutmix": "mixes samples"}
"""Options of data modules that change samples."""


class SAFTerm(LossTerm):
    """SAF: the distance between a sample's output and that of `lag` epochs ago.

    Batches have to say which samples they hold, by ``batch["index"]``, as those of ``PDEDataModule``,
    ``ImageDataModule`` and ``CaptionDataModule`` do. Samples that were not visited then count 0.

    A module whose inputs are random, one with a method ``draw`` as ``DiffusionModule``, gets draws of its
    own for every sample: those of `lag` epochs are recorded, and repeated in the next `lag` epochs, in which
    the term counts. Then all is new again.

    Args:
        weight: Factor of the term; 0.3 is the published one.
        kind: ``kl`` for logits (B, C, ...), ``squared`` for regression and denoising.
        tau: Temperature of ``kl``.
        start_epoch: The term counts in epochs after this one.
        end_epoch: And before this one, if given.
        lag: Epochs between an output and the one it is compared with.
        part: Name of the part of the module whose output is compared.
        dtype: How outputs are kept, in the memory of the host and in checkpoints.
        max_gib: Refuse to keep more than this.
        seed: Seed of the draws.
    """

    name = "saf"

    def __init__(
        self,
        weight: float = 0.3,
        kind: Kind = "squared",
        tau: float = 5.0,
        start_epoch: int = 5,
        end_epoch: int | None = None,
        lag: int = 3,
        part: str = "network",
        dtype: Precision = "float16",
        max_gib: float = 4.0,
        seed: int = 0,
    ) -> None:
        super().__init__(weight, kind, tau, start_epoch, end_epoch, part)
        TrajectoryStore(1, (), lag=lag, dtype=dtype)  # checks them
        self.lag, self.dtype, self.max_gib, self.seed = lag, dtype, max_gib, seed
        self.store: TrajectoryStore | None = None
        self.loaded: dict[str, Any] = {}

    def check(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse what cannot be right.

        Raises:
            ValueError: With the reason.
        """
        super().check(trainer, pl_module)
        several = [type(o).__name__ for o in trainer.optimizers if isinstance(o, SAM | MeZO)]
        if several:
            raise ValueError(
                f"{several[0]} evaluates each batch at several weights: SAF would record them all"
            )
        for owner in (pl_module, getattr(trainer, "datamodule", None)):
            for name, what in CHANGES.items():
                if getattr(owner, name, None):
                    raise ValueError(
                        f"{name} {what} anew in every epoch, so outputs have no past to be compared with:"
                        " turn it off, or use MESATerm"
                    )

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Watch the part, add to the loss, and take over the draws of a module that has such.

        Raises:
            ValueError: If the combination cannot be right.
        """
        super().on_fit_start(trainer, pl_module)
        self.store = None
        if not hasattr(pl_module, "draw"):
            return
        inner = pl_module.draw

        @functools.wraps(inner)
        def draw(batch: Any, stream: torch.Generator, *args: Any, **kwargs: Any) -> Any:
            epoch = trainer.current_epoch
            if not self.watching or not any(self.plan(epoch, is_random=True)):
                return inner(batch, stream, *args, **kwargs)
            key, index_B = replay(epoch, self.lag).key, index_of(batch)
            rows = [{name: values[i : i + 1] for name, values in batch.items()} for i in range(len(index_B))]
            streams = streams_of(index_B, key, self.seed)
            parts = [inner(row, own, *args, **kwargs) for row, own in zip(rows, streams)]
            return tuple(None if column[0] is None else torch.cat(column) for column in zip(*parts))

        self.changes.replace(pl_module, "draw", draw)

    def plan(self, epoch: int, *, is_random: bool) -> tuple[bool, bool]:
        """Whether an epoch records outputs, and whether it compares them with recorded ones."""
        records = is_active(epoch + self.lag, self.start_epoch, self.end_epoch)
        compares = is_active(epoch, self.start_epoch, self.end_epoch)
        if is_random:
            again = replay(epoch, self.lag).compares
            return records and not again, compares and again
        return records, compares

    def term(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, call: Call) -> Tensor | None:
        """Compare with the past and record the present."""
        epoch, now, index_B = trainer.current_epoch, call[2], index_of(batch)
        records, compares = self.plan(epoch, is_random=hasattr(pl_module, "draw"))
        store = self._store(trainer, now) if records or compares else None
        term = None
        if store is not None and compares:
            past, valid_B = store.read(index_B, epoch)
            term = distance_to_past(self.kind, now, past, valid_B, tau=self.tau)
        if store is not None and records:
            store.write(index_B, now, epoch)
        return term

    def _store(self, trainer: L.Trainer, now: Tensor) -> TrajectoryStore:
        """The store, made when the shape of outputs is known."""
        if self.store is not None:
            return self.store
        dataset: Any = getattr(trainer.train_dataloader, "dataset", None)
        if not hasattr(dataset, "__len__"):
            raise ValueError(f"SAF needs training data of known length, not a {type(dataset).__name__}")
        samples, shape = len(dataset), tuple(now.shape[1:])
        world = trainer.world_size
        gib = (self.lag + 1) * samples * now[0].numel() * getattr(torch, self.dtype).itemsize / world / 2**30
        if gib > self.max_gib:
            raise ValueError(
                f"outputs of {samples} samples in {self.lag + 1} epochs take {gib:.3g} GiB, max_gib is"
                f" {self.max_gib:g}: raise it, lower lag, or use MESATerm, which keeps none"
            )
        self.store = TrajectoryStore(
            samples, shape, lag=self.lag, dtype=self.dtype, rank=trainer.global_rank, world=world
        )
        if self.loaded:
            self.store.load_state_dict(self.loaded)
            self.loaded = {}
        return self.store

    def state_dict(self) -> dict[str, Any]:
        """Outputs so far."""
        return self.loaded if self.store is None else self.store.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with outputs, once their shape is known."""
        self.loaded, self.store = state_dict, None


class MESATerm(LossTerm):
    """MESA: the distance to the output of averaged weights for the same inputs.

    One more forward pass, and weights once more in float32; nothing is kept by sample, so it also suits
    random inputs, mirrored images and endless data.

    Args:
        weight: Factor of the term; 0.8 is the published one.
        kind: ``kl`` for logits (B, C, ...), ``squared`` for regression and denoising.
        tau: Temperature of ``kl``.
        start_epoch: The term counts in epochs after this one.
        end_epoch: And before this one, if given.
        decay: Of the average; 0.9998 is the published one.
        warmup: Let the decay grow with the updates, see :class:`thalweg.core_optim.ema.EMA`.
        part: Name of the part of the module whose output is compared.
    """

    name = "mesa"

    def __init__(
        self,
        weight: float = 0.8,
        kind: Kind = "squared",
        tau: float = 5.0,
        start_epoch: int = 5,
        end_epoch: int | None = None,
        decay: float = 0.9998,
        warmup: bool = True,
        part: str = "network",
    ) -> None:
        super().__init__(weight, kind, tau, start_epoch, end_epoch, part)
        self.decay, self.warmup = decay, warmup
        EMA(nn.Identity(), decay)  # checks it
        self.ema: EMA | None = None
        self.loaded: dict[str, Any] = {}
        self.last_step = 0

    def check(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse what cannot be right.

        Raises:
            ValueError: With the reason.
        """
        super().check(trainer, pl_module)
        if isinstance(trainer.strategy, ModelParallelStrategy):
            raise ValueError("MESA runs averaged weights through the network, which must be whole: use ddp")

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Watch the part, add to the loss, and start the average or continue it.

        Raises:
            ValueError: If the combination cannot be right.
        """
        super().on_fit_start(trainer, pl_module)
        self.ema = EMA(self._part(pl_module), self.decay, warmup=self.warmup, buffers=True)
        if self.loaded:
            self.ema.load_state_dict(self.loaded)
            self.loaded = {}

    def term(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, call: Call) -> Tensor | None:
        """Compare with the average."""
        if not is_active(trainer.current_epoch, self.start_epoch, self.end_epoch):
            return None
        assert self.ema is not None
        args, kwargs, now = call
        part = self._part(pl_module)
        own = dict(part.named_parameters()) | dict(part.named_buffers())
        weights = {name: average.to(own[name]) for name, average in self.ema.average.items()}
        with torch.no_grad(), evaluating(part):
            past = tensor_of(torch.func.functional_call(part, weights, args, kwargs))
        return distance_to_past(self.kind, now, past, tau=self.tau)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Take in the weights of a step."""
        if self.ema is not None and trainer.global_step > self.last_step:
            self.ema.update(self._part(pl_module))
            self.last_step = trainer.global_step

    def state_dict(self) -> dict[str, Any]:
        """The average."""
        return {"ema": self.loaded if self.ema is None else self.ema.state_dict(), "step": self.last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the average when the fit starts."""
        self.loaded, self.last_step = state_dict["ema"], state_dict["step"]


def index_of(batch: Any) -> Tensor:
    """Numbers of the samples in a batch.

    Raises:
        ValueError: If the batch does not say.
    """
    if not isinstance(batch, Mapping) or "index" not in batch:
        raise ValueError(
            "SAF compares a sample with itself, but batches have no 'index' that says which samples they"
            " hold, and their order changes: let the data set give one, or use MESATerm"
        )
    index: Tensor = batch["index"]
    return index


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """A module in evaluation mode: no dropout, no new statistics; each part goes back to its own mode."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
