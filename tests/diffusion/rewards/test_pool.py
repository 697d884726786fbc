"""Workers of rewards: equal to calling them directly, one thread for each model, tries, and errors."""

import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from thalweg.diffusion.rewards.base import RewardError, RewardResult, evaluate
from thalweg.diffusion.rewards.http import retry
from thalweg.diffusion.rewards.pool import RewardPool
from thalweg.diffusion.rewards.registry import WeightedSum, open_rewards
from thalweg.diffusion.shapes.dataset import ShapesDataset


def batch(count: int, seed: int = 0) -> tuple[Tensor, list[str], list[Any]]:
    data = ShapesDataset(size=count, seed=seed, wrong=0.5)
    examples = [data[i] for i in range(count)]
    images = torch.stack([e["image"] for e in examples])
    return images, [e["prompt"] for e in examples], [e["metadata"] for e in examples]


class Flaky:
    """Fails so many times, and remembers who called it and how many at once."""

    def __init__(self, failures: int = 0, seconds: float = 0.0, error: Exception | None = None) -> None:
        self.name, self.failures, self.seconds = "flaky", failures, seconds
        self.error = error or RuntimeError("out of memory")
        self.threads: set[str] = set()
        self.inside, self.most, self.calls = 0, 0, 0

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> RewardResult:
        self.threads.add(threading.current_thread().name)
        self.calls += 1
        self.inside += 1
        self.most = max(self.most, self.inside)
        time.sleep(self.seconds)
        self.inside -= 1
        if self.failures:
            self.failures -= 1
            raise self.error
        return RewardResult(scores=images_BCHW.mean(dim=(1, 2, 3)))


def one(reward: Any, **options: Any) -> RewardPool:
    return RewardPool(WeightedSum(rewards={"flaky": reward}, weights={"flaky": 1.0}), wait=0.0, **options)


def test_workers_give_what_direct_calls_give_in_the_order_of_the_batches() -> None:
    rewards = open_rewards(
        {"shapes": {}, "jpeg_compressibility": {"weight": 3}, "saturation": {"weight": 0.1}}
    )
    batches = [batch(5, seed) for seed in range(6)]
    with RewardPool(rewards) as pool:
        pending = [pool.submit(*b) for b in batches]
        found = [p.result(timeout=60) for p in pending]
    for result, b in zip(found, batches, strict=True):
        expected = evaluate(rewards, *b)
        assert torch.equal(result.scores, expected.scores)
        assert result.parts.keys() == expected.parts.keys()
        for name, part in result.parts.items():
            assert torch.allclose(part, expected.parts[name], equal_nan=True)


def test_a_model_is_used_by_one_thread_and_several_models_at_the_same_time() -> None:
    a, b = Flaky(seconds=0.05), Flaky(seconds=0.05)
    both = threading.Barrier(2, timeout=10)
    meet = {"a": lambda: both.wait(), "b": lambda: both.wait()}

    class Meets(Flaky):
        def __init__(self, inner: Flaky, key: str) -> None:
            self.name, self.inner, self.key = key, inner, key

        def __call__(self, *args: Any) -> RewardResult:
            meet[self.key]()  # waits until the other reward is at work, too
            return self.inner(*args)

    rewards = WeightedSum(rewards={"a": Meets(a, "a"), "b": Meets(b, "b")}, weights={"a": 1, "b": 1})
    with RewardPool(rewards) as pool:
        pending = [pool.submit(*batch(2)) for _ in range(4)]
        for p in pending:
            p.result(timeout=30)
            assert p.done()
    for reward in (a, b):
        assert (len(reward.threads), reward.most, reward.calls) == (1, 1, 4)
    assert a.threads != b.threads


def test_a_failure_is_tried_again_and_then_named() -> None:
    with one(Flaky(failures=2), retries=2) as pool:
        assert pool.submit(*batch(3)).result(timeout=10).scores.shape == (3,)
    with one(Flaky(failures=9), retries=2) as pool:
        pending = pool.submit(*batch(3))
        with pytest.raises(
            RewardError, match=r"'flaky' failed in 3 tries, .*RuntimeError\('out of memory'\)"
        ):
            pending.result(timeout=10)
    with one(Flaky(failures=1), retries=0) as pool:
        pending = pool.submit(*batch(3))
        with pytest.raises(RewardError, match="failed in its only try"):
            pending.result(timeout=10)


def test_what_a_reward_refuses_is_not_tried_again() -> None:
    reward = Flaky(failures=9, error=RewardError("no weights"))
    with one(reward) as pool:
        pending = pool.submit(*batch(3))
        with pytest.raises(RewardError, match="no weights"):
            pending.result(timeout=10)
    assert reward.calls == 1


def test_a_nan_is_an_error_and_other_batches_go_on() -> None:
    class Nan(Flaky):
        def __call__(self, images_BCHW: Tensor, *rest: Any) -> RewardResult:
            scores = images_BCHW.mean(dim=(1, 2, 3))
            return RewardResult(scores=scores / (0 if len(images_BCHW) == 1 else 1) * 0)

    with one(Nan()) as pool:
        bad, good = pool.submit(*batch(1)), pool.submit(*batch(2))
        with pytest.raises(RewardError, match="gave nan for 1 of 1 images"):
            bad.result(timeout=10)
        assert good.result(timeout=10).scores.tolist() == [0.0, 0.0]


def test_a_slow_reward_is_named_once_the_time_is_over() -> None:
    with one(Flaky(seconds=0.3)) as pool:
        pending = pool.submit(*batch(2))
        with pytest.raises(RewardError, match=r"'flaky' gave no result within 0\.01 s"):
            pending.result(timeout=0.01)
        assert pending.result(timeout=10).scores.shape == (2,)


def test_no_more_batches_are_under_way_than_the_limit() -> None:
    with one(Flaky(seconds=0.1), limit=2) as pool:
        start = time.monotonic()
        pending = [pool.submit(*batch(1)) for _ in range(4)]
        assert time.monotonic() - start > 0.15  # the third and fourth had to wait
        for p in pending:
            p.result(timeout=10)


def test_closing_drops_what_has_not_begun() -> None:
    reward = Flaky(seconds=0.2)
    with one(reward) as pool:
        pending = [pool.submit(*batch(1)) for _ in range(5)]
    assert reward.calls < 5
    assert pending[-1].done()


def test_tries_are_counted() -> None:
    calls: list[int] = []

    def call() -> int:
        calls.append(1)
        if len(calls) < 3:
            raise KeyError
        return len(calls)

    assert retry(call, 2, 0.0, on=KeyError) == 3
    with pytest.raises(ValueError, match="retries -1"):
        retry(call, -1, 0.0)
    with pytest.raises(ValueError, match="limit 0"):
        one(Flaky(), limit=0)
