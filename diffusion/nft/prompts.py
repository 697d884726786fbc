"""Which prompts are sampled when: K images of each, in batches.

Both samplers yield batches of indices of prompts, for the ``batch_sampler`` of a DataLoader. Batches are
counted over the whole run and each is a function of its number alone, so the number is all there is to save.
It counts what was handed to the loader: exact without prefetching (``num_workers=0``; prompts need no
workers). Loaders with workers run ahead; set ``done`` to the number of batches used before saving then.

The loader must keep its sampler: pass ``use_distributed_sampler=False`` to Lightning's Trainer.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from thalweg.diffusion.nft.geometry import Geometry
from thalweg.diffusion.order import generator


class CountedBatches(Sampler[list[int]]):
    """Batches by their number since the start of training; an iteration is what is left of an epoch."""

    done: int = 0
    """Batches handed out since the start of training."""
    batches: int
    """Batches of an epoch on this process."""

    @abstractmethod
    def batch(self, number: int) -> list[int]:
        """Indices of prompts of a batch of the run."""

    @abstractmethod
    def images(self, number: int) -> list[int]:
        """Numbers of a batch's images within the epoch, over all processes: seeds of their noise.

        Copies of a prompt must differ in their noise, and it must not depend on processes and batches.
        """

    @abstractmethod
    def identity(self) -> dict[str, int]:
        """What has to be equal for a number to mean the same batch."""

    def __len__(self) -> int:
        """Batches of an epoch."""
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        """The batches that are left of the epoch that is under way."""
        end = (self.done // self.batches + 1) * self.batches
        while self.done < end:
            self.done += 1
            yield self.batch(self.done - 1)

    def state_dict(self) -> dict[str, int]:
        """Where training stands."""
        return {"epoch": self.done // self.batches, "into": self.done % self.batches, **self.identity()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a state.

        Raises:
            ValueError: If it belongs to other prompts, seeds or sizes.
        """
        for name, now in self.identity().items():
            if state.get(name) != now:
                raise ValueError(
                    f"the checkpoint was written with {name} {state.get(name)}, allowed to resume: {name} the"
                    f" same; it is {now} now"
                )
        self.done = state["epoch"] * self.batches + state["into"]


class GroupBatches(CountedBatches):
    """Groups of K images that are whole on a process, distinct within an epoch, on any number of processes.

    Epochs walk through permutations of the prompts, each of which loses its incomplete last epoch. What an
    epoch holds does not depend on the number of processes: those get consecutive groups of it. Within a
    process batches are whole groups, or equal parts of one.

    Args:
        prompts: Number of prompts.
        shape: Groups, their size, processes and batches.
        seed: Seed of the permutations.
        rank: Index of this process.

    Raises:
        ValueError: If there are fewer prompts than groups, the shape scatters groups, or there is no such
            rank.
    """

    def __init__(self, prompts: int, shape: Geometry, *, seed: int, rank: int = 0) -> None:
        if prompts < shape.groups:
            raise ValueError(f"groups is {shape.groups}, allowed: 1 to {prompts}, the number of prompts")
        if shape.scattered:
            raise ValueError("this geometry scatters groups over processes; use that of geometry()")
        _check_rank(rank, shape.world_size)
        self.prompts, self.shape, self.seed, self.rank = prompts, shape, seed, rank
        self.batches = shape.batches_of(rank)

    def epoch(self, epoch: int) -> list[int]:
        """Prompts of all groups of an epoch, on all processes: distinct."""
        turn, part = divmod(epoch, self.prompts // self.shape.groups)
        order = torch.randperm(self.prompts, generator=generator(self.seed, turn))
        return order[part * self.shape.groups : (part + 1) * self.shape.groups].tolist()

    def batch(self, number: int) -> list[int]:
        """Indices of prompts of a batch, one for each image; images of a group follow each other."""
        found = self.epoch(number // self.batches)
        return [found[image // self.shape.group_size] for image in self.images(number)]

    def images(self, number: int) -> list[int]:
        """Numbers of a batch's images within the epoch: group and then copy."""
        first = self.shape.groups_of(self.rank).start * self.shape.group_size
        start = first + number % self.batches * self.shape.batch
        return list(range(start, start + self.shape.batch))

    def identity(self) -> dict[str, int]:
        """Prompts, groups and seed: from the end of an epoch a run may continue on other processes."""
        shape = self.shape
        return {
            "prompts": self.prompts,
            "groups": shape.groups,
            "group_size": shape.group_size,
            "seed": self.seed,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a state; within an epoch on as many processes and with batches of the same size.

        Raises:
            ValueError: If it belongs to other prompts, seeds or sizes.
        """
        here = {"world_size": self.shape.world_size, "batch": self.shape.batch}
        for name, now in here.items():
            if state["into"] and state.get(name) != now:
                raise ValueError(
                    f"the checkpoint was written within an epoch with {name} {state.get(name)}, which is"
                    f" {now} now; resume with the same, or from the end of an epoch"
                )
        super().load_state_dict(state)

    def state_dict(self) -> dict[str, int]:
        """Where training stands."""
        return super().state_dict() | {"world_size": self.shape.world_size, "batch": self.shape.batch}


class KRepeatBatches(CountedBatches):
    """The authors' sampler, for reproduction: K copies of m prompts are shuffled over all processes.

    Batch number i is drawn from a generator seeded with seed + i. Prompts can come twice in an epoch, and a
    group is whole over all processes only.

    Args:
        prompts: Number of prompts.
        batch_size: Images of a batch on one process.
        k: Copies of a prompt.
        batches: Batches of an epoch.
        seed: Seed.
        num_replicas: Processes.
        rank: Index of this process.

    Raises:
        ValueError: If a batch of all processes is not whole groups, needs more prompts than there are, or
            there is no such rank.
    """

    def __init__(
        self,
        prompts: int,
        *,
        batch_size: int,
        k: int,
        batches: int,
        seed: int,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        together = batch_size * num_replicas
        if together % k:
            raise ValueError(
                f"batch_size is {batch_size} on {num_replicas} processes: {together} images are no whole"
                f" groups of {k}; allowed: multiples of {k // math.gcd(k, num_replicas)}"
            )
        if not 1 <= together // k <= prompts:
            raise ValueError(
                f"a batch needs {together // k} prompts, allowed: 1 to {prompts}, the number of prompts"
            )
        if batches < 1:
            raise ValueError(f"batches is {batches}, allowed: 1 and more")
        _check_rank(rank, num_replicas)
        self.prompts, self.batch_size, self.k, self.seed = prompts, batch_size, k, seed
        self.num_replicas, self.rank, self.batches = num_replicas, rank, batches

    def batch(self, number: int) -> list[int]:
        """Indices of prompts of a batch, one for each image."""
        stream = torch.Generator().manual_seed(self.seed + number)
        together = self.batch_size * self.num_replicas
        chosen = torch.randperm(self.prompts, generator=stream)[: together // self.k]
        copies = chosen.repeat_interleave(self.k)
        shuffled = copies[torch.randperm(together, generator=stream)]
        return shuffled[self.rank * self.batch_size : (self.rank + 1) * self.batch_size].tolist()

    def images(self, number: int) -> list[int]:
        """Numbers of a batch's images within the epoch: batch, process and then place."""
        start = (number % self.batches * self.num_replicas + self.rank) * self.batch_size
        return list(range(start, start + self.batch_size))

    def identity(self) -> dict[str, int]:
        """All but the rank."""
        return {
            "prompts": self.prompts,
            "batch_size": self.batch_size,
            "k": self.k,
            "batches": self.batches,
            "seed": self.seed,
            "num_replicas": self.num_replicas,
        }


def _check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank}, allowed: 0 to {world_size - 1}")
