"""The split of an epoch: golden rows of the authors' search, and whole groups on any number of processes."""

import json
from typing import Any

import pytest
from golden import golden_files
from hypothesis import given
from hypothesis import strategies as st

from thalweg.diffusion.nft.geometry import geometry, reference_geometry

(GOLDEN,) = (json.loads(path.read_text())["geometry"] for path in golden_files("nft", "schedules.json"))
SIZES = (GOLDEN["groups"], GOLDEN["group_size"])


@pytest.mark.parametrize(
    "row", GOLDEN["rows"], ids=lambda row: f"{row['world_size']}-{row['gradient_steps']}"
)
def test_golden_geometry(row: dict[str, Any]) -> None:
    settings = (*SIZES, row["world_size"], GOLDEN["largest_batch"], row["gradient_steps"])
    if not row["possible"]:
        with pytest.raises(ValueError, match=rf"world_size is {row['world_size']}, .* allowed: 3, 4, 6, 8"):
            reference_geometry(*settings)
        return
    found = reference_geometry(*settings)
    assert found.batch == row["batch"]
    assert {found.batches_of(rank) for rank in range(found.world_size)} == {row["batches_per_epoch"]}
    assert found.accumulation == row["accumulation"]
    assert found.batch * found.world_size // found.group_size == row["prompts_per_batch"]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 7, 8, 16, 48])
@pytest.mark.parametrize("gradient_steps", [1, 2, 3])
def test_published_sizes_fit_any_number_of_processes(world_size: int, gradient_steps: int) -> None:
    found = geometry(*SIZES, world_size, 9, gradient_steps)
    assert 1 <= found.batch <= 9
    batches = [found.batches_of(rank) for rank in range(world_size)]
    assert sum(batches) * found.batch == found.images == 1152
    assert all(count % gradient_steps == 0 for count in batches)


def test_largest_batches_by_hand() -> None:
    assert geometry(48, 24, 1, 9).batch == 8  # 9 does not divide a group of 24
    assert geometry(48, 24, 2, 24).batch == 24
    assert geometry(48, 24, 2, 50).batch == 48
    assert geometry(16, 12, 1, 64).batch == 48  # 60 images are five groups, and 16 groups are not fives
    assert geometry(16, 12, 1, 64, 3).batch == 4  # a step has 64 images, and 4 of them divide 12


@given(
    groups=st.integers(1, 30),
    group_size=st.integers(2, 12),
    world_size=st.integers(1, 30),
    largest=st.integers(1, 40),
    steps=st.integers(1, 3),
)
def test_groups_are_whole(groups: int, group_size: int, world_size: int, largest: int, steps: int) -> None:
    shares = {groups // world_size, -(-groups // world_size)}
    if world_size > groups or any(share * group_size % steps for share in shares):
        with pytest.raises(ValueError, match="allowed: 1"):
            geometry(groups, group_size, world_size, largest, steps)
        return
    found = geometry(groups, group_size, world_size, largest, steps)
    ranks = [found.groups_of(rank) for rank in range(world_size)]
    assert [group for part in ranks for group in part] == list(range(groups))
    assert max(map(len, ranks)) - min(map(len, ranks)) <= 1
    assert found.even == (len(set(map(len, ranks))) == 1)
    assert found.batch % group_size == 0 or group_size % found.batch == 0
    assert all(
        found.batches_of(rank) * found.batch == len(ranks[rank]) * group_size for rank in range(world_size)
    )
    mean = sum(found.batches_of(rank) for rank in range(world_size)) / world_size
    assert found.accumulation == pytest.approx(mean / steps)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((48, 24, 0, 9), "world_size is 0, allowed: 1 to 48"),
        ((48, 24, 49, 9), "world_size is 49, allowed: 1 to 48"),
        ((48, 1, 2, 9), "group_size is 1, allowed: 2 and more: an advantage compares"),
        ((0, 24, 1, 9), "groups is 0"),
        ((48, 24, 1, 0), "largest_batch is 0"),
        ((5, 2, 1, 4, 3), "gradient_steps is 3 for 10 images of a process, allowed: 1, 2, 5, 10"),
        ((3, 2, 2, 4, 4), "gradient_steps is 4 for 2 or 4 images of a process, allowed: 1, 2"),
    ],
)
def test_wrong_sizes(settings: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        geometry(*settings)
