"""Outputs of past epochs by sample: a ring of lag + 1 epochs that knows what was written when.

A table is found by the number of a sample, so that it does not matter in which order, or by which process,
samples are visited. With several processes each keeps the rows of its own samples, index mod processes, and
batches are exchanged; all processes must call `write` and `read` equally often.

Shapes: B batch, N samples, S slots of the ring, R rows that this process keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

NEVER = -1
Precision = Literal["float32", "float16", "bfloat16"]


class TrajectoryStore:
    """Outputs of N samples in the last epochs, kept on the CPU.

    Epoch e is written into slot e mod (lag + 1), and read again in epoch e + lag. Every row carries the epoch
    in which it was written: a row that was left out then, or is older than a turn of the ring, has no past.

    Args:
        samples: N; indices are 0 to N - 1.
        shape: Shape of one output.
        lag: Epochs between writing and reading.
        dtype: How outputs are kept; in float16 they are clamped to its range.
        rank: Number of this process.
        world: Processes.

    Raises:
        ValueError: For a number out of range.
    """

    def __init__(
        self,
        samples: int,
        shape: Sequence[int],
        *,
        lag: int = 3,
        dtype: Precision = "float32",
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if samples < 1 or lag < 1:
            raise ValueError(f"samples and lag are {samples} and {lag}, allowed: integers >= 1")
        if dtype not in ("float32", "float16", "bfloat16"):
            raise ValueError(f"dtype of the store is {dtype!r}, allowed: float32, float16, bfloat16")
        if not 0 <= rank < world:
            raise ValueError(f"rank is {rank}, allowed: 0 to {world - 1}")
        self.samples, self.shape, self.lag = samples, tuple(shape), lag
        self.rank, self.world = rank, world
        self.group = None if world == 1 or dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
        rows = len(range(rank, samples, world))
        self.outputs_SR = torch.zeros(lag + 1, rows, *self.shape, dtype=getattr(torch, dtype))
        self.epochs_SR = torch.full((lag + 1, rows), NEVER, dtype=torch.int64)

    @property
    def nbytes(self) -> int:
        """Bytes that this process keeps."""
        return self.outputs_SR.nbytes + self.epochs_SR.nbytes

    @torch.no_grad()
    def write(self, index_B: Tensor, outputs: Tensor, epoch: int) -> None:
        """Keep the outputs (B, ...) of samples in an epoch; of a sample that comes twice one of the two.

        Raises:
            ValueError: For an index or a shape that does not belong here.
        """
        index_B, outputs = index_B.cpu(), outputs.detach().cpu()
        self._check(index_B)
        if outputs.shape != (len(index_B), *self.shape):
            raise ValueError(f"outputs have shape {tuple(outputs.shape)}, needed: (B, *{self.shape})")
        for index, values in zip(self._gather(index_B), self._gather(outputs)):
            mine = index % self.world == self.rank
            rows, slot = index[mine] // self.world, epoch % (self.lag + 1)
            self.outputs_SR[slot, rows] = self._narrow(values[mine])
            self.epochs_SR[slot, rows] = epoch

    @torch.no_grad()
    def read(self, index_B: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Outputs (B, ...) of `lag` epochs ago, and which samples have such, (B,) bool.

        Raises:
            ValueError: For an index that does not belong here.
        """
        index_B = index_B.cpu()
        self._check(index_B)
        asked = self._gather(index_B)
        answers = [self._mine(index, epoch - self.lag) for index in asked]
        if self.world == 1:
            return answers[0]
        counts = [valid.int() for _, valid in answers]
        for (outputs, _), count in zip(answers, counts):  # every row has one owner, and is 0 elsewhere
            dist.all_reduce(outputs, group=self.group)
            dist.all_reduce(count, group=self.group)
        return answers[self.rank][0], counts[self.rank] > 0

    def _mine(self, index: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Rows that this process keeps, zeros in the place of others."""
        mine = index % self.world == self.rank
        rows, slot = index // self.world * mine, epoch % (self.lag + 1)
        valid = mine & (self.epochs_SR[slot, rows] == epoch) if epoch >= 0 else torch.zeros_like(mine)
        kept = self.outputs_SR[slot, rows].float()
        return torch.where(valid.view(-1, *[1] * len(self.shape)), kept, 0.0), valid

    def _narrow(self, values: Tensor) -> Tensor:
        limits = torch.finfo(self.outputs_SR.dtype)
        return values.float().clamp(limits.min, limits.max).to(self.outputs_SR.dtype)

    def _check(self, index_B: Tensor) -> None:
        if len(index_B) and not 0 <= int(index_B.min()) <= int(index_B.max()) < self.samples:
            odd = int(index_B.max()) if int(index_B.max()) >= self.samples else int(index_B.min())
            raise ValueError(f"sample {odd} is not in the store, allowed: 0 to {self.samples - 1}")

    def _gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensor of each process; they may differ in length."""
        if self.world == 1:
            return [tensor]
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
        dist.all_gather(lengths, torch.tensor([len(tensor)]), group=self.group)
        longest = max(int(length) for length in lengths)
        padded = tensor.new_zeros(longest, *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        sent = padded.view(torch.uint8)  # not all backends know all types
        parts = [torch.empty_like(sent) for _ in range(self.world)]
        dist.all_gather(parts, sent, group=self.group)
        return [part.view(tensor.dtype)[: int(length)] for part, length in zip(parts, lengths)]

    def state_dict(self) -> dict[str, Any]:
        """Everything of all processes, in the order of samples, so that other numbers of them can go on."""
        return {
            "lag": self.lag,
            "outputs": self._whole(self.outputs_SR),
            "epochs": self._whole(self.epochs_SR),
        }

    def _whole(self, kept_SR: Tensor) -> Tensor:
        parts = self._gather(kept_SR.transpose(0, 1).contiguous())
        whole = kept_SR.new_empty(self.samples, *parts[0].shape[1:])
        for rank, part in enumerate(parts):
            whole[rank :: self.world] = part
        return whole.transpose(0, 1)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state.

        Raises:
            ValueError: If it is of another lag, or of other samples or outputs.
        """
        whole = state_dict["outputs"]
        wanted = (self.lag + 1, self.samples, *self.shape)
        if tuple(whole.shape) != wanted:
            raise ValueError(f"the stored outputs have shape {tuple(whole.shape)}, needed: {wanted}")
        self.outputs_SR.copy_(whole[:, self.rank :: self.world])
        self.epochs_SR.copy_(state_dict["epochs"][:, self.rank :: self.world])
