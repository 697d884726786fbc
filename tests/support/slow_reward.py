"""A reward that takes its time, says when it begins, and waits for a file."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thalweg.diffusion.rewards.base import RewardResult


class Slow:
    """Mean brightness, once the file ``go`` is there."""

    name = "slow"

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> RewardResult:
        (self.folder / "begun").touch()
        until = time.monotonic() + 60
        while not (self.folder / "go").exists() and time.monotonic() < until:
            time.sleep(0.01)
        return RewardResult(scores=images_BCHW.double().mean((1, 2, 3)) + torch.zeros(len(prompts)))


def slow(device: str = "cpu", *, folder: str) -> Slow:
    """One that watches a folder."""
    return Slow(folder)
