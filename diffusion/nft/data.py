"""Prompts for Lightning: the groups of each epoch, and prompts to evaluate with.

A training loader yields one thing per Lightning epoch: all images of an epoch of the algorithm on this
process, by their numbers over all processes, with their prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypedDict

import lightning as L

from thalweg.diffusion.nft.config import require
from thalweg.diffusion.nft.geometry import Geometry, geometry, reference_geometry
from thalweg.diffusion.nft.prompt_sets import Prompt, geneval_prompts, read_prompts, shapes_prompts
from thalweg.diffusion.nft.prompts import CountedBatches, GroupBatches, KRepeatBatches

VAL_SEED = 1
"""Sets generated prompts of evaluations apart from those of training."""


class EpochPlan(TypedDict):
    """Images of an epoch on one process, in the order in which they are drawn."""

    epoch: int
    """Epochs since the start of training."""
    numbers: list[int]
    """Number of each image within the epoch, over all processes."""
    groups: list[int]
    """Index of each image's prompt in the set."""
    prompts: list[str]
    """Its text."""
    metadata: list[Mapping[str, Any]]
    """What rewards are told of it."""


class EvalBatch(TypedDict):
    """Images of an evaluation."""

    numbers: list[int]
    """Index of each prompt in the set."""
    prompts: list[str]
    """Texts."""
    metadata: list[Mapping[str, Any]]
    """What rewards are told of them."""
    kept: list[bool]
    """Whether an image counts; others only keep processes in step."""


class EpochLoader:
    """One plan per iteration; the number of the epoch is all the state there is."""

    def __init__(self, prompts: Sequence[Prompt], batches: CountedBatches) -> None:
        self.prompts, self.batches = prompts, batches

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[EpochPlan]:
        """The plan of the next epoch."""
        batches = self.batches
        epoch = batches.done // batches.batches
        batches.done = (epoch + 1) * batches.batches
        yield self.plan(epoch)

    def plan(self, epoch: int) -> EpochPlan:
        """The plan of an epoch."""
        which = range(epoch * self.batches.batches, (epoch + 1) * self.batches.batches)
        groups = [index for number in which for index in self.batches.batch(number)]
        return {
            "epoch": epoch,
            "numbers": [image for number in which for image in self.batches.images(number)],
            "groups": groups,
            "prompts": [self.prompts[index].text for index in groups],
            "metadata": [self.prompts[index].metadata for index in groups],
        }


class EvalLoader:
    """Prompts of an evaluation, dealt to processes in turn; all of them get equally many batches."""

    def __init__(self, prompts: Sequence[Prompt], batch_size: int, rank: int, world_size: int) -> None:
        self.prompts, self.batch_size, self.rank, self.world_size = prompts, batch_size, rank, world_size

    def __len__(self) -> int:
        return -(-self._each // self.batch_size)

    @property
    def _each(self) -> int:
        return -(-len(self.prompts) // self.world_size)

    def __iter__(self) -> Iterator[EvalBatch]:
        """Batches of this process."""
        numbers = [self.rank + i * self.world_size for i in range(self._each)]
        for start in range(0, len(numbers), self.batch_size):
            part = numbers[start : start + self.batch_size]
            found = [self.prompts[number % len(self.prompts)] for number in part]
            yield {
                "numbers": [number % len(self.prompts) for number in part],
                "prompts": [prompt.text for prompt in found],
                "metadata": [prompt.metadata for prompt in found],
                "kept": [number < len(self.prompts) for number in part],
            }


class PromptDataModule(L.LightningDataModule):
    """Prompts in groups of K images, and prompts for evaluations.

    Args:
        prompts: File with prompts, ``.txt`` or GenEval's ``.jsonl``; ``geneval`` for training prompts from
            GenEval's grammar, or ``shapes`` for captions of ShapesWorld.
        val_prompts: The same for evaluations; none are made without it.
        num_prompts: Prompts that are generated, or the first so many of a file; all if not given.
        num_val: The same for evaluations.
        groups: Groups of an epoch.
        group_size: Images of a group, K.
        batch_size: Images of a micro-batch at most, on one process.
        gradient_steps: Optimizer steps of an epoch.
        sampler: ``groups`` keeps a group on one process and works on any number of them; ``krepeat`` is the
            authors' sampler.
        eval_batch_size: Prompts of a batch in evaluations.
        seed: Of prompts and their order.

    Raises:
        ValueError: For numbers that are none, or an unknown sampler.
    """

    def __init__(
        self,
        prompts: str,
        val_prompts: str | None = None,
        num_prompts: int | None = None,
        num_val: int | None = None,
        groups: int = 48,
        group_size: int = 24,
        batch_size: int = 9,
        gradient_steps: int = 1,
        sampler: Literal["groups", "krepeat"] = "groups",
        eval_batch_size: int = 16,
        seed: int = 42,
    ) -> None:
        super().__init__()
        require(sampler in ("groups", "krepeat"), "sampler", sampler, "groups, krepeat")
        for name, value in (("num_prompts", num_prompts), ("num_val", num_val)):
            require(value is None or value >= 1, name, value, "1 and more")
        require(eval_batch_size >= 1, "eval_batch_size", eval_batch_size, "1 and more")
        geometry(groups, group_size, 1, batch_size, gradient_steps)
        self.prompts, self.val_prompts = prompts, val_prompts
        self.num_prompts, self.num_val = num_prompts, num_val
        self.groups, self.group_size, self.batch_size = groups, group_size, batch_size
        self.gradient_steps, self.sampler = gradient_steps, sampler
        self.eval_batch_size, self.seed = eval_batch_size, seed
        self._train: list[Prompt] = []
        self._val: list[Prompt] = []
        self._batches: CountedBatches | None = None
        self._place: dict[str, int] = {}

    def setup(self, stage: str | None = None) -> None:
        """Read or generate the prompts; done once."""
        if self._train:
            return
        if self.val_prompts is not None:
            self._val = open_prompts(self.val_prompts, self.num_val, self.seed + VAL_SEED, train=False)
        left_out = {prompt.text for prompt in self._val}
        self._train = open_prompts(self.prompts, self.num_prompts, self.seed, train=True, left_out=left_out)

    def geometry(self, world_size: int) -> Geometry:
        """Shape of an epoch on a number of processes.

        Raises:
            ValueError: If there is none.
        """
        find = geometry if self.sampler == "groups" else reference_geometry
        return find(self.groups, self.group_size, world_size, self.batch_size, self.gradient_steps)

    def texts(self) -> list[str]:
        """All prompts, those of evaluations included; known after ``setup``."""
        return [prompt.text for prompt in (*self._train, *self._val)]

    @property
    def num_evaluated(self) -> int:
        """Prompts of an evaluation."""
        return len(self._val)

    def train_dataloader(self) -> EpochLoader:
        """Plans of epochs."""
        trainer = self.trainer
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        self._batches = self._sampler(rank, world_size)
        if self._place:
            self._batches.load_state_dict(self._place)
        self._place = {}
        return EpochLoader(self._train, self._batches)

    def _sampler(self, rank: int, world_size: int) -> CountedBatches:
        shape = self.geometry(world_size)
        if self.sampler == "groups":
            return GroupBatches(len(self._train), shape, seed=self.seed, rank=rank)
        return KRepeatBatches(
            len(self._train),
            batch_size=shape.batch,
            k=self.group_size,
            batches=shape.batches_of(rank),
            seed=self.seed,
            num_replicas=world_size,
            rank=rank,
        )

    def val_dataloader(self) -> EvalLoader | list[Any]:
        """Prompts of evaluations; nothing if there are none."""
        if not self._val:
            return []
        trainer = self.trainer
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        return EvalLoader(self._val, self.eval_batch_size, rank, world_size)

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        """Texts and numbers stay where they are."""
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Epochs that were begun."""
        return {} if self._batches is None else {"train": self._batches.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after them."""
        self._place = state_dict.get("train", {})
        if self._batches is not None and self._place:
            self._batches.load_state_dict(self._place)


def open_prompts(
    source: str, count: int | None, seed: int, *, train: bool, left_out: Sequence[str] | set[str] = ()
) -> list[Prompt]:
    """Prompts from a file or a grammar.

    Args:
        source: A file, ``geneval`` or ``shapes``.
        count: How many; needed for a grammar.
        seed: Of a grammar.
        train: Whether combinations that are held out, and the texts left_out, are not to be drawn. Captions
            of ShapesWorld are so few that texts of evaluations are trained on.
        left_out: Texts of a test set.

    Raises:
        ValueError: If there is no such file, or the number is missing or larger than the file.
    """
    if source in ("geneval", "shapes"):
        if count is None:
            raise ValueError(f"the prompts {source!r} are generated: say how many (num_prompts, num_val)")
        if source == "shapes":
            return shapes_prompts(count, seed=seed, split="train" if train else "all")
        return geneval_prompts(count, seed=seed, exclude=left_out)
    found = read_prompts(source)
    if count is not None and count > len(found):
        raise ValueError(f"{source} has {len(found)} prompts, but {count} are wanted")
    return found[:count]
