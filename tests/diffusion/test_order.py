"""The order of training samples: complete, seeded, shared by processes, continued."""

from itertools import chain

import pytest
import torch

from thalweg.diffusion.order import CountedLoader, CountedSampler, generator


def loader(
    samples: int = 10, batch_size: int = 3, seed: int = 0, rank: int = 0, ranks: int = 1
) -> CountedLoader:
    sampler = CountedSampler(samples, batch_size=batch_size, seed=seed, num_replicas=ranks, rank=rank)
    return CountedLoader(list(range(samples)), batch_size=batch_size, sampler=sampler, drop_last=True)


def batches(source: CountedLoader, epochs: int) -> list[list[int]]:
    return [batch.tolist() for _ in range(epochs) for batch in source]


def test_an_epoch_visits_each_sample_once_and_epochs_differ() -> None:
    seen = batches(loader(9), 2)
    assert sorted(chain(*seen[:3])) == list(range(9))
    assert sorted(chain(*seen[3:])) == list(range(9))
    assert seen[:3] != seen[3:]


def test_the_order_depends_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = batches(loader(seed=5), 1)
    torch.manual_seed(2)
    assert batches(loader(seed=5), 1) == first
    assert batches(loader(seed=6), 1) != first


def test_processes_share_an_epoch() -> None:
    parts = [batches(loader(12, rank=rank, ranks=2), 1) for rank in range(2)]
    assert sorted(chain(*parts[0], *parts[1])) == list(range(12))


@pytest.mark.parametrize("done", [0, 1, 2, 3, 4, 5])
def test_a_resumed_order_goes_on(done: int) -> None:
    straight = batches(loader(), 6)
    first = loader()
    for _ in range(done):
        stop = iter(first)
        next(stop)
    second = loader()
    second.load_state_dict(first.state_dict())
    resumed = batches(second, 3)
    assert len(resumed) > 6
    assert resumed == straight[done : done + len(resumed)]


def test_resuming_with_other_data_is_refused_in_an_epoch_only() -> None:
    state = {"done": 3, "batches": 3, "seed": 0, "samples": 10, "global batch": 3}
    changed = loader(batch_size=5)
    changed.load_state_dict(state)
    assert changed.state_dict()["done"] == 2
    with pytest.raises(ValueError, match="global batch was 3, is 5"):
        changed.load_state_dict({**state, "done": 4})


def test_a_batch_larger_than_the_set_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size is 11 on 1 processes, allowed: 1 to 10"):
        loader(batch_size=11)


def test_generators_differ_by_their_numbers() -> None:
    draws = {tuple(torch.rand(2, generator=generator(*n)).tolist()) for n in [(0,), (0, 1), (1, 0), (0, 2)]}
    assert len(draws) == 4
    assert torch.equal(torch.rand(3, generator=generator(4, 5)), torch.rand(3, generator=generator(4, 5)))
