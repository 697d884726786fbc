"""The order in which a mixture's pairs are visited: seeded, weighted, split over processes, resumable.

The order of an epoch is a function of (seed, epoch) alone. Resuming in the middle of an epoch means to draw
the same order again and skip what has been seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import numpy as np
from torch.utils.data import Dataset, DistributedSampler

# Indices are handed out as Python integers; a whole epoch of those would take hundreds of megabytes.
_SLICE = 65536


class PairSampler(DistributedSampler[int]):
    """Random order over the pairs of several data sets.

    A weight says how often per epoch each pair of a set is visited: 2 means twice, 0.5 means a random half,
    another half in the next epoch. With all weights 1 every pair is visited once.

    It is a `DistributedSampler` so that Lightning leaves it in place: it knows about ranks itself.

    Args:
        sizes: (trajectories, pairs per trajectory) of each data set, in the order of their indices.
        weights: visits per pair and epoch of each data set.
        seed: seed of the order.
        pairs_per_trajectory: how many pairs of one trajectory follow each other. 1 is uniformly random; more
            share snapshots within a batch and read less (a gain on slow disks, a small one otherwise), at
            the price of correlated batches.
        num_replicas: number of processes that share an epoch.
        rank: index of this process.
    """

    def __init__(
        self,
        sizes: Sequence[tuple[int, int]],
        weights: Sequence[float],
        *,
        seed: int = 0,
        pairs_per_trajectory: int = 1,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        if min(weights) <= 0:
            raise ValueError(f"weights of data sets must be positive, got {list(weights)}")
        if pairs_per_trajectory < 1:
            raise ValueError(f"pairs_per_trajectory={pairs_per_trajectory} must be at least 1")
        self.sizes, self.weights = list(sizes), list(weights)
        self.pairs_per_trajectory = pairs_per_trajectory
        visits = sum(self._visits(size, weight) for size, weight in zip(sizes, weights))
        super().__init__(
            cast("Dataset[int]", range(visits)), num_replicas=num_replicas, rank=rank, shuffle=True, seed=seed
        )
        block = pairs_per_trajectory if num_replicas > 1 else 1
        self._share = -(-visits // (block * num_replicas)) * block
        self.visits = visits
        """Visits per epoch, all processes together."""
        self.start = 0
        """Number of this process's visits to skip when next iterated."""
        self.offset = 0
        """Added to the epoch that was set; see `ResumableLoader`."""

    @staticmethod
    def _visits(size: tuple[int, int], weight: float) -> int:
        return max(1, round(weight * size[0] * size[1]))

    def __len__(self) -> int:
        return self._share

    def order(self, epoch: int) -> np.ndarray:
        """Indices of an epoch for all processes together."""
        rng = np.random.default_rng((self.seed, epoch))
        indices, keys, first = [], [], 0
        for size, weight in zip(self.sizes, self.weights):
            visits = self._visits(size, weight)
            while visits > 0:
                index, key = self._one_pass(rng, size, visits)
                indices.append(index + first)
                keys.append(key)
                visits -= len(index)
            first += size[0] * size[1]
        return np.concatenate(indices)[np.argsort(np.concatenate(keys), kind="stable")]

    def _one_pass(
        self, rng: np.random.Generator, size: tuple[int, int], limit: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """At most `limit` indices of a data set, each once, with keys that put them in random order."""
        trajectories, pairs = size
        if self.pairs_per_trajectory == 1:
            index = np.arange(trajectories * pairs)
            key = rng.random(len(index))
        else:
            within = np.argsort(rng.random(size), axis=1)
            index = (within + np.arange(trajectories)[:, None] * pairs).ravel()
            blocks = -(-pairs // self.pairs_per_trajectory)
            # All pairs of a block share a key, so that a stable sort keeps them together.
            keys = np.repeat(rng.random((trajectories, blocks)), self.pairs_per_trajectory, axis=1)
            key = keys[:, :pairs].ravel()
        if limit < len(index):
            kept = np.argsort(key, kind="stable")[:limit]
            index, key = index[kept], key[kept]
        return index, key

    def __iter__(self) -> Iterator[int]:
        order = self.order(self.epoch + self.offset)
        if self.num_replicas > 1:
            # Filled up from the front so that all processes make the same number of steps.
            order = np.resize(order, self._share * self.num_replicas)
            blocks = order.reshape(-1, self.pairs_per_trajectory)
            order = blocks[self.rank :: self.num_replicas].ravel()
        for begin in range(self.start, len(order), _SLICE):
            yield from order[begin : begin + _SLICE].tolist()
