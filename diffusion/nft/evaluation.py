"""Results of an evaluation during training, put together from all processes.

Shapes: B images of a batch, V prompts of the evaluation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from thalweg.diffusion.nft.collect import concatenated, spread
from thalweg.diffusion.nft.data import EvalBatch
from thalweg.diffusion.nft.diagnostics import mean_of_known
from thalweg.diffusion.rewards.pool import Pending


class Evaluation:
    """Rewards of prompts, and the first images.

    Args:
        total: V.
        shown: Images that are kept for a picture.
    """

    def __init__(self, total: int, shown: int) -> None:
        self.total, self.shown = total, shown
        self.pending: list[tuple[EvalBatch, Pending]] = []
        self.pictures: list[tuple[str, Tensor]] = []

    def add(self, batch: EvalBatch, images: Tensor, pending: Pending) -> None:
        """Take in a batch whose rewards are on their way."""
        self.pending.append((batch, pending))
        for prompt, image, kept in zip(batch["prompts"], images, batch["kept"], strict=True):
            if kept and len(self.pictures) < self.shown:
                self.pictures.append((prompt, image.cpu()))

    def means(self, total: Callable[[Tensor], Tensor], timeout: float | None = None) -> dict[str, float]:
        """Mean reward, and the mean of each part over the prompts that it applies to.

        Args:
            total: Sum over processes.
            timeout: Seconds to wait for each batch.

        Raises:
            RewardError: If a reward cannot be had.
        """
        found = concatenated([pending.result(timeout) for _, pending in self.pending])
        kept = torch.tensor([kept for batch, _ in self.pending for kept in batch["kept"]])
        numbers = [number for batch, _ in self.pending for number in batch["numbers"]]
        own = [number for number, yes in zip(numbers, kept.tolist(), strict=True) if yes]
        names = sorted(found.parts)
        values = [found.scores[kept], *(found.parts[name][kept] for name in names)]
        table = total(spread([torch.ones(len(own)), *values], own, self.total))
        table = table[:, table[0] > 0]  # fewer where Lightning only tries a few batches
        return {"reward": float(table[1].mean())} | {
            name: mean_of_known(row) for name, row in zip(names, table[2:], strict=True)
        }
