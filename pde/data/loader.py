"""A DataLoader that continues in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from thalweg.pde.data.sampler import PairSampler


class ResumableLoader(DataLoader[Any]):
    """DataLoader over a `PairSampler` whose state is the epoch and the number of visits handed out.

    Lightning stores ``state_dict()`` in its checkpoints and gives it back on resume. What workers have
    fetched ahead does not count: only batches that were handed out do.

    Trainers number epochs themselves through ``set_epoch``, and may number them otherwise after a resume:
    Lightning 2.6 counts one too many when it resumes from the end of an epoch. Hence the state has both the
    epoch of the order and the trainer's number for it: the same number on resume means the interrupted epoch
    goes on, a larger one that it was complete. From then on the difference between the two is kept.
    """

    _handed_out: int = 0
    _resume: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator, so that nothing happens before the first batch: trainers ask for the iterator first and
        # set the sampler's epoch later.
        sampler = self.sampler
        if not isinstance(sampler, PairSampler):  # Lightning's overfit_batches puts its own in place
            yield from super().__iter__()
            return
        sampler.start = 0
        if self._resume is not None:
            self._continue(sampler, self._resume)
            self._resume = None
        self._handed_out = sampler.start * sampler.num_replicas
        assert self.batch_size is not None
        for batch in super().__iter__():
            left = len(sampler) * sampler.num_replicas - self._handed_out
            self._handed_out += min(self.batch_size * sampler.num_replicas, left)
            yield batch
        sampler.start = 0
        sampler.set_epoch(sampler.epoch + 1)
        self._handed_out = 0

    @staticmethod
    def _continue(sampler: PairSampler, state: dict[str, Any]) -> None:
        """Place a sampler where a state says."""
        complete = state["handed_out"] >= state["padded"] or sampler.epoch > state["set_epoch"]
        sampler.offset = state["epoch"] + complete - sampler.epoch
        if complete or not state["handed_out"]:
            return
        for name, now in (("visits", sampler.visits), ("seed", sampler.seed)):
            if state[name] != now:
                raise ValueError(
                    f"the checkpoint was written in the middle of an epoch of other data ({name} was "
                    f"{state[name]}, is {now}); resume with the same data, or from the end of an epoch"
                )
        sampler.start = state["handed_out"] // sampler.num_replicas

    def state_dict(self) -> dict[str, Any]:
        """Where the epoch stands."""
        sampler = self.sampler
        if not isinstance(sampler, PairSampler):
            return {}
        if self._resume is not None:
            return dict(self._resume)
        return {
            "epoch": sampler.epoch + sampler.offset,
            "set_epoch": sampler.epoch,
            "padded": len(sampler) * sampler.num_replicas,
            "handed_out": self._handed_out,
            "visits": sampler.visits,
            "seed": sampler.seed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state; takes effect at the next iteration."""
        if isinstance(self.sampler, PairSampler) and state:
            self._resume = dict(state)
            self.sampler.set_epoch(state["set_epoch"])
