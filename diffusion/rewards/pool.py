"""Workers that score batches while the next ones are drawn: one thread for each reward.

No model is used by two threads, and results do not depend on how many batches are under way.

Shapes: B images, C = 3 channels, H x W pixels.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

from torch import Tensor

from thalweg.diffusion.rewards.base import Metadata, Reward, RewardError, RewardResult, evaluate
from thalweg.diffusion.rewards.http import WAIT, retry
from thalweg.diffusion.rewards.registry import WeightedSum, combine


@dataclass(frozen=True)
class Pending:
    """Results that are on their way."""

    futures: Mapping[str, Future[RewardResult]]
    """Of each reward."""
    weights: Mapping[str, float]
    """Of the sum."""

    def done(self) -> bool:
        """Whether :meth:`result` would not wait."""
        return all(future.done() for future in self.futures.values())

    def result(self, timeout: float | None = None) -> RewardResult:
        """Weighted sum, once all rewards are there.

        Args:
            timeout: Seconds to wait for each reward.

        Raises:
            RewardError: If a reward failed in all of its tries, or is not there in time.
        """
        results = {}
        for name, future in self.futures.items():
            try:
                results[name] = future.result(timeout)
            except TimeoutError:
                raise RewardError(f"reward {name!r} gave no result within {timeout} s") from None
        return combine(results, self.weights)


class RewardPool:
    """One thread for each reward.

    Args:
        rewards: What is added, with weights.
        retries: Tries after the first where a reward fails; its own refusals (:class:`RewardError`) are not
            tried again.
        wait: Seconds before the second try, twice as long before each further one.
        limit: Batches under way at most; :meth:`submit` waits where there are more.

    Raises:
        ValueError: If the limit is below 1 or the retries below 0.
    """

    def __init__(
        self, rewards: WeightedSum, *, retries: int = 2, wait: float = WAIT, limit: int = 32
    ) -> None:
        if limit < 1 or retries < 0:
            raise ValueError(f"limit {limit}, retries {retries}, allowed: at least 1 and at least 0")
        self.rewards, self.retries, self.wait = rewards, retries, wait
        self._room = threading.Semaphore(limit)
        self._workers = {
            name: ThreadPoolExecutor(1, thread_name_prefix=f"reward-{name}") for name in rewards.rewards
        }

    def submit(self, images_BCHW: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Pending:
        """Hand a batch to all workers; it must not be written to until its result is there."""
        images = images_BCHW.detach()
        self._room.acquire()
        left = _Countdown(len(self._workers), self._room.release)
        futures = {}
        for name, worker in self._workers.items():
            reward = self.rewards.rewards[name]
            futures[name] = worker.submit(self._score, reward, images, list(prompts), list(metadata))
            futures[name].add_done_callback(left)
        return Pending(futures, self.rewards.weights)

    def _score(
        self, reward: Reward, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> RewardResult:
        def call() -> RewardResult:
            try:
                return evaluate(reward, images, prompts, metadata)
            except RewardError:
                raise
            except Exception as error:
                raise _Failed(repr(error)) from error

        try:
            return retry(call, self.retries, self.wait, on=_Failed)
        except _Failed as error:
            tries = f"{self.retries + 1} tries" if self.retries else "its only try"
            raise RewardError(f"reward {reward.name!r} failed in {tries}, the last: {error}") from error

    def close(self) -> None:
        """Drop what has not begun, and wait for the rest."""
        for worker in self._workers.values():
            worker.shutdown(cancel_futures=True)

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _Failed(Exception):
    """A failure of a reward, after which another try may help."""


class _Countdown:
    """Calls a function once it was called so many times itself."""

    def __init__(self, count: int, then: Callable[[], None]) -> None:
        self.count, self.then, self.lock = count, then, threading.Lock()

    def __call__(self, future: Future[RewardResult]) -> None:
        with self.lock:
            self.count -= 1
            last = self.count == 0
        if last:
            self.then()
