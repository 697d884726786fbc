"""A term that a callback adds to the training loss of any module, from the output of one of its parts.

The callback sees the output in a forward hook and wraps ``training_step``, so modules need no change.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from thalweg.apps.alterations import Alterations
from thalweg.core_optim.trajectory import Kind, distance_to_past

Call = tuple[tuple[Any, ...], dict[str, Any], Tensor]


class LossTerm(L.Callback, ABC):
    """Add `weight` times a distance between outputs to the training loss.

    Args:
        weight: Factor of the term.
        kind: ``kl`` for logits (B, C, ...), ``squared`` for regression and denoising.
        tau: Temperature of ``kl``.
        start_epoch: The term counts in epochs after this one.
        end_epoch: And before this one, if given.
        part: Name of the part of the module whose output is compared.
    """

    name = "term"

    def __init__(
        self, weight: float, kind: Kind, tau: float, start_epoch: int, end_epoch: int | None, part: str
    ) -> None:
        if not weight >= 0.0:
            raise ValueError(f"weight of the term is {weight}, allowed: a number >= 0")
        distance_to_past(kind, torch.zeros(1, 1), torch.zeros(1, 1), tau=tau)  # checks them
        self.weight, self.kind, self.tau, self.part = weight, kind, tau, part
        self.start_epoch, self.end_epoch = start_epoch, end_epoch
        self.call: Call | None = None
        self.watching = False
        self.changes = Alterations()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Undo what a fit that failed has left."""
        self.changes.undo()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Watch the part and add to the loss.

        Raises:
            ValueError: If the combination cannot be right.
        """
        self.check(trainer, pl_module)
        handle = self._part(pl_module).register_forward_hook(self._see, with_kwargs=True)
        self.changes.later(handle.remove)
        inner = pl_module.training_step

        @functools.wraps(inner)
        def training_step(batch: Any, batch_idx: int, *args: Any, **kwargs: Any) -> Any:
            self.call, self.watching = None, True
            try:
                output = inner(batch, batch_idx, *args, **kwargs)
                self.watching = False
                if self.call is None:
                    raise ValueError(f"{type(pl_module).__name__} did not use its part {self.part!r}")
                term = self.term(trainer, pl_module, batch, self.call)
                if term is None:
                    return output
                pl_module.log(f"train/{self.name}", term.detach(), batch_size=len(self.call[2]))
                return plus(output, self.weight * term)
            finally:
                self.call, self.watching = None, False

        self.changes.replace(pl_module, "training_step", training_step)

    def check(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse what cannot be right.

        Raises:
            ValueError: With the reason.
        """
        if not pl_module.automatic_optimization:
            raise ValueError(f"{type(pl_module).__name__} runs its own steps, and would not see the term")
        self._part(pl_module)

    @abstractmethod
    def term(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, call: Call) -> Tensor | None:
        """The term, () without `weight`; None where it does not count."""

    def _part(self, module: L.LightningModule) -> nn.Module:
        try:
            return module.get_submodule(self.part)
        except AttributeError:
            parts = ", ".join(name for name, _ in module.named_children())
            raise ValueError(
                f"{type(module).__name__} has no part {self.part!r}, only: {parts or 'none'}"
            ) from None

    def _see(self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self.watching and self.call is None:
            self.call = (args, kwargs, tensor_of(output))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Give the module back its training step."""
        self.changes.undo()


def tensor_of(output: Any) -> Tensor:
    """The tensor in what a network returns: itself, ``logits``, ``output``, ``sample``, or the first.

    Raises:
        ValueError: If there is none.
    """
    if isinstance(output, tuple | list) and output:
        output = output[0]
    for name in ("logits", "output", "sample"):
        output = getattr(output, name, output)
    if not isinstance(output, Tensor):
        raise ValueError(f"a {type(output).__name__} has no outputs to compare: no logits, output or sample")
    return output


def plus(output: Any, term: Tensor) -> Any:
    """What a training step returns, with a term added to its loss."""
    if isinstance(output, Mapping):
        return {**output, "loss": output["loss"] + term}
    return None if output is None else output + term
