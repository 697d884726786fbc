"""Which prompts are sampled when: the authors' batches, whole groups on any processes, resuming."""

import json
from collections import Counter
from typing import Any

import pytest
from golden import golden_files
from torch.utils.data import DataLoader

from thalweg.diffusion.nft.geometry import geometry, reference_geometry
from thalweg.diffusion.nft.prompts import CountedBatches, GroupBatches, KRepeatBatches

(GOLDEN,) = (json.loads(path.read_text())["cases"] for path in golden_files("nft", "krepeat.json"))


def k_repeat(case: dict[str, Any], rank: int = 0, batches: int = 8) -> KRepeatBatches:
    return KRepeatBatches(
        case["dataset_size"],
        batch_size=case["batch"],
        k=case["k"],
        batches=batches,
        seed=case["seed"],
        num_replicas=case["world_size"],
        rank=rank,
    )


@pytest.mark.parametrize(
    "case", GOLDEN, ids=lambda case: f"{case['dataset_size']}-{case['batch']}x{case['world_size']}"
)
def test_golden_batches(case: dict[str, Any]) -> None:
    if case["error"] or not case["gate"]:  # too few prompts: short batches there, an error here
        with pytest.raises(
            ValueError, match=r"allowed: (multiples of (24|4)$|1 to 2, the number of prompts)"
        ):
            k_repeat(case)
        return
    for rank in range(case["world_size"]):
        sampler = k_repeat(case, rank)
        for batch in case["batches"]:
            assert sampler.batch(batch["counter"]) == batch["ranks"][rank]


def test_epochs_of_the_authors_continue_the_count() -> None:
    case = GOLDEN[0]
    expected = {batch["counter"]: batch["ranks"][1] for batch in case["batches"]}
    sampler = k_repeat(case, rank=1, batches=3)
    first, second = list(sampler), list(sampler)
    assert len(first) == len(second) == len(sampler) == 3
    assert first == [expected[0], expected[1], expected[2]]
    assert second[0] == sampler.batch(3) != first[0]


def epoch_of(prompts: int, world_size: int, largest: int, epoch: int) -> list[list[tuple[int, int]]]:
    """Image number and prompt of every image, by process."""
    shape = geometry(12, 6, world_size, largest)
    ranks = []
    for rank in range(world_size):
        sampler = GroupBatches(prompts, shape, seed=3, rank=rank)
        numbers = range(epoch * len(sampler), (epoch + 1) * len(sampler))
        pairs = [list(zip(sampler.images(n), sampler.batch(n), strict=True)) for n in numbers]
        ranks.append([pair for batch in pairs for pair in batch])
    return ranks


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 12])
@pytest.mark.parametrize("largest", [1, 4, 6, 50])
def test_groups_are_whole_and_the_same_on_any_processes(world_size: int, largest: int) -> None:
    for epoch in (0, 1, 4):
        ranks = epoch_of(30, world_size, largest, epoch)
        together = [pair for rank in ranks for pair in rank]
        assert together == [pair for rank in epoch_of(30, 1, 6, epoch) for pair in rank]
        assert [image for image, _ in together] == list(range(72))
        assert set(Counter(prompt for _, prompt in together).values()) == {6}
        for rank in ranks:
            assert set(Counter(prompt for _, prompt in rank).values()) == {6}


def test_prompts_come_again_when_all_have_come() -> None:
    sampler = GroupBatches(30, geometry(10, 2, 1, 2), seed=1)
    epochs = [sampler.epoch(i) for i in range(6)]
    for turn in (epochs[:3], epochs[3:]):
        assert sorted(p for epoch in turn for p in epoch) == list(range(30))
    assert epochs[:3] != epochs[3:]
    assert epochs[0] != GroupBatches(30, geometry(10, 2, 1, 2), seed=2).epoch(0)


def both() -> list[CountedBatches]:
    return [GroupBatches(30, geometry(4, 6, 1, 3), seed=1), k_repeat(GOLDEN[1])]


@pytest.mark.parametrize("which", [0, 1], ids=["groups", "k-repeat"])
@pytest.mark.parametrize("stop", [0, 1, 5, 8, 11])
def test_resuming_equals_going_on(which: int, stop: int) -> None:
    """Through a DataLoader, saved by JSON after any batch."""

    def run(sampler: CountedBatches, upto: int) -> list[list[int]]:
        loader: DataLoader[int] = DataLoader(range(100), batch_sampler=sampler)  # type: ignore[arg-type]
        seen: list[list[int]] = []
        while len(seen) < upto:
            for batch in loader:
                seen.append(batch.tolist())
                if len(seen) == upto:
                    break
        return seen

    whole = run(both()[which], 19)
    before = both()[which]
    seen = run(before, stop)
    after = both()[which]
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert seen + run(after, 19 - stop) == whole


def test_whole_epochs_continue_on_other_processes() -> None:
    first = GroupBatches(30, geometry(4, 6, 2, 3), seed=1, rank=1)
    for _ in first:
        pass
    state = first.state_dict()
    then = GroupBatches(30, geometry(4, 6, 4, 6), seed=1, rank=3)
    then.load_state_dict(state)
    assert then.done == len(then)
    next(iter(first))
    with pytest.raises(ValueError, match="within an epoch with world_size 2, which is 4"):
        then.load_state_dict(first.state_dict())


@pytest.mark.parametrize("which", [0, 1], ids=["groups", "k-repeat"])
def test_states_of_other_runs_are_refused(which: int) -> None:
    sampler = both()[which]
    for name in sampler.identity():
        state = sampler.state_dict() | {name: 99}
        with pytest.raises(ValueError, match=f"was written with {name} 99"):
            sampler.load_state_dict(state)


def test_wrong_settings() -> None:
    with pytest.raises(ValueError, match="groups is 4, allowed: 1 to 3"):
        GroupBatches(3, geometry(4, 6, 1, 3), seed=0)
    with pytest.raises(ValueError, match="rank is 2, allowed: 0 to 1"):
        GroupBatches(9, geometry(4, 6, 2, 3), seed=0, rank=2)
    with pytest.raises(ValueError, match="scatters groups"):
        GroupBatches(99, reference_geometry(48, 24, 8, 9), seed=0)
    with pytest.raises(ValueError, match="batches is 0"):
        k_repeat(GOLDEN[0], batches=0)
    with pytest.raises(ValueError, match="rank is -1, allowed: 0 to 1"):
        k_repeat(GOLDEN[0], rank=-1)
