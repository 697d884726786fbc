"""Data sets of (input, label, lead time) that are asked for a whole batch of indices at once.

``DataLoader`` hands the list of a batch's indices to ``__getitems__``; the snapshots behind them are sorted,
read once each and normalised straight into the batch, so nothing is left to collate.

Legend: B batch, C channels, H W space.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from thalweg.pde.data.normalize import Normalizer
from thalweg.pde.data.pairs import PairRule
from thalweg.pde.data.recycle import Recycler
from thalweg.pde.data.trajectories import Side, TrajectoryReader, pixel_mask

# Steady problems are posed as the state at this lead time.
STEADY_LEAD_TIME = 1.0


class PairDataset:
    """Pairs of one data set's part.

    Args:
        reader: its trajectories.
        normalizer: its constants.
        trajectories: which trajectories belong to the part.
        rule: pairs of a trajectory; None for steady problems.
        cache: hold all needed snapshots in memory, normalised.

    Raises:
        ValueError: the rule needs snapshots that the file does not have.
    """

    def __init__(
        self,
        reader: TrajectoryReader,
        normalizer: Normalizer,
        trajectories: range,
        rule: PairRule | None,
        *,
        cache: bool = False,
    ) -> None:
        self.reader, self.normalizer, self.trajectories = reader, normalizer, trajectories
        spec = reader.spec
        self.pairs = np.zeros((1, 2), np.int64) if rule is None else rule.pairs()
        """Snapshot indices (input, label) of a trajectory, in order."""
        if self.pairs.max() >= reader.frames:
            raise ValueError(
                f"{spec.name}: {rule} needs snapshot {self.pairs.max()}, but {reader.contents.path} has "
                f"{reader.frames} snapshots; choose a smaller max_num_time_steps or time_step_size"
            )
        self.lead_times = (
            np.full(1, STEADY_LEAD_TIME)
            if rule is None
            else (self.pairs[:, 1] - self.pairs[:, 0]) / spec.time_scale
        )
        self._shared = spec.inputs == spec.outputs
        self._affine = {
            "inputs": (normalizer.input_shift + normalizer.input_mean, normalizer.input_std),
            "outputs": (normalizer.output_shift + normalizer.output_mean, normalizer.output_std),
        }
        self._cached: dict[str, Tensor] = {}
        self._positions = np.unique(self.pairs)
        if cache:
            sides: tuple[Side, ...] = ("inputs",) if self._shared else ("inputs", "outputs")
            self._cached = {side: self._load(side) for side in sides}

    def __len__(self) -> int:
        return len(self.trajectories) * len(self.pairs)

    def locate(self, index: int) -> tuple[int, int, int, float]:
        """Trajectory, input snapshot, label snapshot and lead time of a sample."""
        trajectory, pair = divmod(index, len(self.pairs))
        first, last = self.pairs[pair].tolist()
        return self.trajectories[trajectory], first, last, float(self.lead_times[pair])

    def _load(self, side: Side) -> Tensor:
        channels = self._affine[side][0]
        count = len(self.trajectories) * len(self._positions)
        fields = torch.empty(count, len(channels), *self.reader.grid)
        samples = np.repeat(np.asarray(self.trajectories), len(self._positions))
        frames = np.tile(self._positions, len(self.trajectories))
        self.reader.fill(side, samples, frames, fields.numpy(), *self._affine[side])
        return fields

    def fill(self, indices: np.ndarray, rows: np.ndarray, batch: dict[str, Tensor]) -> None:
        """Write samples to rows of a batch.

        Args:
            indices: samples of this data set.
            rows: where they go.
            batch: ``fields`` (2, B, C, H, W) or ``pixel_values`` and ``labels``, ``time`` (B,), and
                ``pixel_mask`` if wanted.
        """
        trajectory, pair = np.divmod(indices, len(self.pairs))
        samples = trajectory + self.trajectories.start
        first, last = self.pairs[pair].T
        inputs, labels = batch["pixel_values"], batch["labels"]
        if self._shared and "fields" in batch:
            both = batch["fields"].flatten(0, 1)
            targets = np.concatenate([rows, rows + len(inputs)])
            self._put("inputs", np.tile(samples, 2), np.concatenate([first, last]), targets, both)
        else:
            self._put("inputs", samples, first, rows, inputs)
            self._put("outputs", samples, last, rows, labels)
        batch["time"].numpy()[rows] = self.lead_times[pair]
        self._fill_mask(rows, inputs.numpy(), labels.numpy(), batch)

    def _put(
        self, side: Side, samples: np.ndarray, frames: np.ndarray, rows: np.ndarray, out_NCHW: Tensor
    ) -> None:
        if self._cached:
            fields = self._cached["inputs" if self._shared else side]
            position = np.searchsorted(self._positions, frames)
            place = (samples - self.trajectories.start) * len(self._positions) + position
            target, source = out_NCHW.numpy(), fields.numpy()
            # One copy per snapshot; indexing with arrays would make a second one on the way.
            for row, position in zip(rows.tolist(), place.tolist()):
                target[row] = source[position]
        else:
            self.reader.fill(side, samples, frames, out_NCHW.numpy(), *self._affine[side], rows=rows)

    def _fill_mask(
        self, rows: np.ndarray, inputs: np.ndarray, labels: np.ndarray, batch: dict[str, Tensor]
    ) -> None:
        if "pixel_mask" not in batch:
            return
        spec, mask = self.reader.spec, batch["pixel_mask"].numpy()
        if spec.mask_rule != "input_is_one":
            masked = np.array([spec.mask_rule == "channels" and channel.masked for channel in spec.outputs])
            mask[rows] = masked[:, None, None] if mask.ndim == 4 else masked
            return
        # The airfoil's indicator is used as stored, so normalised and raw inputs agree on where it is 1.
        found = pixel_mask(spec, inputs[rows])
        assert found is not None
        mask[rows] = found
        labels[rows] = np.where(found, np.float32(1.0), labels[rows])


class MixtureDataset(Dataset[Any]):
    """Several data sets behind one range of indices, first to last; batches are dicts of tensors.

    Keys: ``pixel_values`` (B, Cin, H, W) and ``labels`` (B, Cout, H, W), normalised float32; ``time`` (B,)
    lead time; ``dataset`` (B,) index into `parts`; ``index`` (B,) of the sample itself; and if any part has
    a mask ``pixel_mask`` (B, Cout), or (B, Cout, H, W) if any part masks single points.

    Args:
        parts: data sets with equal channels and grids.
        ids: values of ``dataset``, by default the positions in `parts`.
        mask_rules: mask rules of the whole mixture, if `parts` is only some of it.

    Raises:
        ValueError: channels or grids differ.
    """

    def __init__(
        self,
        parts: Sequence[PairDataset],
        ids: Sequence[int] | None = None,
        mask_rules: Sequence[str] | None = None,
    ) -> None:
        self.parts = list(parts)
        self.ids = list(range(len(parts)) if ids is None else ids)
        self._edges = np.cumsum([0] + [len(part) for part in parts])
        self._memory = Recycler()
        rules = mask_rules or [part.reader.spec.mask_rule for part in parts]
        self._mask_rank = 4 if "input_is_one" in rules else 2 if "channels" in rules else 0
        first = self.parts[0]
        for part in self.parts[1:]:
            if self._form(part) != self._form(first):
                raise ValueError(
                    "data sets of a mixture need equal channels and grids: "
                    f"{first.reader.spec.name} has {self._describe(first)}, "
                    f"{part.reader.spec.name} has {self._describe(part)}"
                )

    @staticmethod
    def _form(part: PairDataset) -> tuple[int, int, tuple[int, int]]:
        spec = part.reader.spec
        return len(spec.inputs), len(spec.outputs), part.reader.grid

    @classmethod
    def _describe(cls, part: PairDataset) -> str:
        num_in, num_out, grid = cls._form(part)
        return f"{num_in} input and {num_out} output channels on {grid[0]}x{grid[1]} points"

    def __len__(self) -> int:
        return int(self._edges[-1])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: values[0] for name, values in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Batch of the samples at some indices, in their order."""
        index = np.asarray(indices, np.int64)
        batch = self._empty(len(index))
        owner = np.searchsorted(self._edges, index, side="right") - 1
        for k in np.unique(owner).tolist():
            rows = np.flatnonzero(owner == k)
            self.parts[k].fill(index[rows] - self._edges[k], rows, batch)
            batch["dataset"][torch.from_numpy(rows)] = self.ids[k]
        batch.pop("fields", None)
        batch["index"] = torch.from_numpy(index)
        return batch

    def _empty(self, size: int) -> dict[str, Tensor]:
        num_in, num_out, grid = self._form(self.parts[0])
        batch: dict[str, Tensor] = {}
        if num_in == num_out:
            # Inputs and labels side by side, so that snapshots needed for both are read once.
            batch["fields"] = self._memory.empty(2, size, num_in, *grid)
            batch["pixel_values"], batch["labels"] = batch["fields"].unbind()
        else:
            batch["pixel_values"] = self._memory.empty(size, num_in, *grid)
            batch["labels"] = self._memory.empty(size, num_out, *grid)
        batch["time"] = torch.empty(size)
        batch["dataset"] = torch.empty(size, dtype=torch.int64)
        if self._mask_rank:
            shape = (size, num_out, *grid)[: self._mask_rank]
            batch["pixel_mask"] = torch.empty(shape, dtype=torch.bool)
        return batch


def as_is(batch: Any) -> Any:
    """Collate function for data sets that give whole batches."""
    return batch
