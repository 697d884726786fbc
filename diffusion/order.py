"""The order in which training samples are visited: seeded, split over processes, continued after a resume.

Batches are counted over the whole run. The count alone says which permutation is under way and where it
stands, so the trainer's numbering of epochs does not matter.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler


def generator(*numbers: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A random generator whose stream depends on the numbers (each >= 0) alone."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state[0]) >> 1)


class CountedSampler(DistributedSampler[int]):
    """Permutations of the samples, one after the other; each loses its incomplete last batch.

    It is a `DistributedSampler` so that Lightning leaves it in place.

    Args:
        samples: Number of samples.
        batch_size: Samples per batch and process.
        seed: Seed of the permutations.
        num_replicas: Processes that share each batch count.
        rank: Index of this process.

    Raises:
        ValueError: If the samples do not fill one batch of every process.
    """

    def __init__(
        self, samples: int, *, batch_size: int, seed: int, num_replicas: int = 1, rank: int = 0
    ) -> None:
        if not 1 <= batch_size * num_replicas <= samples:
            raise ValueError(
                f"batch_size is {batch_size} on {num_replicas} processes, allowed: 1 to"
                f" {samples // num_replicas}, for {samples} training images"
            )
        everything = cast("Dataset[int]", range(samples))
        super().__init__(everything, num_replicas=num_replicas, rank=rank, shuffle=True, seed=seed)
        self.samples, self.batch_size = samples, batch_size
        self.batches = samples // (batch_size * num_replicas)
        """Batches of one permutation."""
        self.done = 0
        """Batches handed out since the start of training."""

    def __len__(self) -> int:
        return self.batches * self.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Ignore the trainer's number; the count decides."""

    def __iter__(self) -> Iterator[int]:
        turn, start = divmod(self.done, self.batches)
        order = np.random.default_rng((self.seed, turn)).permutation(self.samples)
        share = order[: self.batches * self.batch_size * self.num_replicas]
        of_rank = share.reshape(self.batches, self.num_replicas, self.batch_size)[:, self.rank]
        yield from of_rank[start:].ravel().tolist()

    def identity(self) -> dict[str, int]:
        """What has to be equal for a count to mean the same batches."""
        return {
            "seed": self.seed,
            "samples": self.samples,
            "global batch": self.batch_size * self.num_replicas,
        }


class CountedLoader(DataLoader[Any]):
    """DataLoader over a `CountedSampler` whose state is the number of batches handed out."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        sampler = self.sampler
        if not isinstance(sampler, CountedSampler):  # Lightning's overfit_batches puts its own in place
            yield from super().__iter__()
            return
        for batch in super().__iter__():
            sampler.done += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Where training stands."""
        sampler = self.sampler
        if not isinstance(sampler, CountedSampler):
            return {}
        return {"done": sampler.done, "batches": sampler.batches, **sampler.identity()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a state; other data or batches start where a permutation ends.

        Raises:
            ValueError: If it was written in the middle of a permutation of other data or batches.
        """
        sampler = self.sampler
        if not isinstance(sampler, CountedSampler) or not state:
            return
        turns, into = divmod(state["done"], state["batches"])
        changed = [name for name, now in sampler.identity().items() if state[name] != now]
        if changed and into:
            name = changed[0]
            raise ValueError(
                f"the checkpoint was written in the middle of an epoch of other data or batches ({name} was"
                f" {state[name]}, is {sampler.identity()[name]}); resume with the same, or from the end of an"
                " epoch"
            )
        sampler.done = turns * sampler.batches + into
