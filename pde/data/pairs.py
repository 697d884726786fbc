"""Which (input, label) snapshot pairs a trajectory gives, and which trajectories belong to which split.

All2all training (Herde et al. 2024, section 2) uses every pair i <= j of the snapshots 0, s, 2s, ..., Ks: the
identity pairs i = j included, (K + 1)(K + 2) / 2 pairs per trajectory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from thalweg.pde.problem import Splits

Part = Literal["train", "val", "test"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PairRule:
    """Rule for the pairs of one trajectory."""

    max_num_time_steps: int
    """K: the last snapshot is K * s."""
    time_step_size: int
    """s: snapshots are taken every s-th."""
    fix_input_to_time_step: int | None = None
    """If given, the input is always this snapshot and the labels are the K following ones."""
    allowed_time_transitions: tuple[int, ...] | None = None
    """If given, only pairs with (j - i) among these are used, counted in steps of s."""

    def pairs(self) -> np.ndarray:
        """Snapshot indices (input, label), shape (P, 2), in the published order.

        Raises:
            ValueError: the rule allows no pair.
        """
        steps, stride = self.max_num_time_steps, self.time_step_size
        if steps < 1 or stride < 1:
            raise ValueError(f"max_num_time_steps={steps} and time_step_size={stride} must be at least 1")
        if (start := self.fix_input_to_time_step) is not None:
            pairs = [(start, start + stride * (k + 1)) for k in range(steps)]
        else:
            allowed = self.allowed_time_transitions
            pairs = [
                (stride * i, stride * j)
                for i in range(steps + 1)
                for j in range(i, steps + 1)
                if allowed is None or j - i in allowed
            ]
        if not pairs:
            raise ValueError(
                f"allowed_time_transitions={self.allowed_time_transitions} leaves no pair; "
                f"choose among 0..{steps}"
            )
        return np.array(pairs, np.int64)


def num_train(splits: Splits, num_trajectories: int) -> int:
    """Number of training trajectories; -1 means all, -2 half and -8 an eighth of what is available."""
    if num_trajectories in (-1, -2, -8):
        return splits.train // -num_trajectories
    if 1 <= num_trajectories <= splits.train:
        return num_trajectories
    raise ValueError(
        f"num_trajectories={num_trajectories} is not available: choose 1..{splits.train}, "
        "or -1 for all, -2 for half, -8 for an eighth of them"
    )


def part_range(splits: Splits, part: Part, num_trajectories: int = -1) -> range:
    """Trajectories of a split: train is the head, test the tail, validation lies before the test part."""
    if part == "train":
        return range(num_train(splits, num_trajectories))
    if part == "val":
        return range(splits.train, splits.train + splits.val)
    return range(splits.total - splits.test, splits.total)
