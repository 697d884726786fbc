"""The visiting order covers the data, respects weights, and splits over processes."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thalweg.pde.data.sampler import PairSampler

SIZES = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 9)), min_size=1, max_size=3)


@given(SIZES, st.integers(1, 4), st.integers(0, 3))
def test_each_pair_is_visited_once_per_epoch(sizes: list[tuple[int, int]], together: int, epoch: int) -> None:
    sampler = PairSampler(sizes, [1.0] * len(sizes), pairs_per_trajectory=together)
    sampler.set_epoch(epoch)
    assert sorted(sampler) == list(range(sum(n * pairs for n, pairs in sizes)))


@given(SIZES, st.integers(1, 4), st.integers(2, 4))
def test_processes_share_an_epoch(sizes: list[tuple[int, int]], together: int, replicas: int) -> None:
    shares = [
        list(
            PairSampler(
                sizes, [1.0] * len(sizes), pairs_per_trajectory=together, num_replicas=replicas, rank=r
            )
        )
        for r in range(replicas)
    ]
    assert len({len(share) for share in shares}) == 1
    assert set().union(*shares) == set(range(sum(n * pairs for n, pairs in sizes)))
    total = sum(map(len, shares))
    assert total - len(set().union(*shares)) < replicas * together


def test_order_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return PairSampler([(5, 6)], [1.0], seed=seed).order(epoch).tolist()

    assert order(0, 3) == order(0, 3)
    assert order(0, 3) != order(0, 4)
    assert order(0, 3) != order(1, 3)


def test_weights_count_visits() -> None:
    sampler = PairSampler([(4, 10), (2, 10)], [0.5, 3.0])
    epochs = [Counter(sampler.order(epoch).tolist()) for epoch in range(20)]
    for visits in epochs:
        first = [visits[i] for i in range(40)]
        assert sum(first) == 20
        assert max(first) == 1
        assert [visits[i] for i in range(40, 60)] == [3] * 20
    # Another half in every epoch: after 20 epochs no pair is left out.
    assert set().union(*epochs) == set(range(60))


def test_pairs_of_a_trajectory_stay_together() -> None:
    order = PairSampler([(7, 12)], [1.0], pairs_per_trajectory=4).order(0)
    trajectories = (order // 12).reshape(-1, 4)
    assert (trajectories == trajectories[:, :1]).all()
    assert len(np.unique(trajectories[:6, 0])) > 1


def test_skipping_continues_the_same_order() -> None:
    sampler = PairSampler([(5, 6)], [1.0])
    whole = list(sampler)
    sampler.start = 11
    assert list(sampler) == whole[11:]


@pytest.mark.parametrize(("weights", "together"), [([0.0], 1), ([-1.0], 1), ([1.0], 0)])
def test_senseless_settings_are_refused(weights: list[float], together: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        PairSampler([(2, 2)], weights, pairs_per_trajectory=together)
