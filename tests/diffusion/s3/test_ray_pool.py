"""Pool of Ray actors on a cluster of this machine; the same facts as for processes."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pool_facts
import pytest
from pool_facts import tasks
from search_objectives import objective

from thalweg.diffusion.s3.pool import FAILED, InlinePool, ObjectiveRef
from thalweg.diffusion.s3.ray_pool import RayPool

pytestmark = pytest.mark.dist
SUPPORT = {"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray = pytest.importorskip("ray")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=SUPPORT)
    yield
    ray.shutdown()


def pool(function: str = "objective", **options: Any) -> RayPool:
    return RayPool(ObjectiveRef(function=f"search_objectives:{function}", options=options), workers=2)


def test_a_device_that_ray_cannot_choose_is_refused() -> None:
    with pytest.raises(ValueError, match=r"devices are \['cuda:1'\], allowed: cpu, cuda"):
        RayPool(ObjectiveRef(function="a:b"), workers=1, devices=("cpu", "cuda:1"))


def test_pools_start_a_cluster_of_their_own_and_the_last_ends_it() -> None:
    ray = pytest.importorskip("ray")
    assert not ray.is_initialized()
    reference = ObjectiveRef(function="search_objectives:objective")
    first, second = (RayPool(reference, workers=1, address="local", runtime_env=SUPPORT) for _ in range(2))
    todo = tasks((1, 2))
    expected = dict(InlinePool(objective()).scores(todo))
    try:
        assert dict(first.scores(todo)) == dict(second.scores(todo)) == expected
        first.close()
        assert dict(second.scores(todo)) == expected
    finally:
        first.close()
        assert ray.is_initialized()
        second.close()
    assert not ray.is_initialized()
    second.close()


@pytest.mark.usefixtures("cluster")
def test_two_actors_end_like_this_process() -> None:
    workers = pool()
    try:
        pool_facts.check_search_ends_like_inline(workers)
        pool_facts.check_scores_on_the_first_samples(workers)
    finally:
        workers.close()


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("order", [1, 3])
def test_an_actor_that_dies_takes_no_result_with_it(order: int, tmp_path: Path) -> None:
    workers = pool("deadly", mark=str(tmp_path / "died"), order=order, always=False)
    todo = tasks((2, 2, order, 2, 2))
    try:
        found = dict(workers.scores(todo))
    finally:
        workers.close()
    assert (tmp_path / "died").exists()
    expected = dict(InlinePool(objective()).scores(todo))
    if order == 3:  # raises once it lives
        expected[12] = FAILED
        assert workers.errors == {12: "RuntimeError: out of memory"}
    assert found == expected


@pytest.mark.usefixtures("cluster")
def test_actors_killed_from_outside_take_no_result_with_them() -> None:
    import ray

    workers = pool()
    todo = tasks((1, 2, 3, 1, 2, 3))
    found = {}
    try:
        for number, score in workers.scores(todo):
            found[number] = score
            if len(found) == 2:
                for actor, candidate in list(workers._busy.values()):
                    if candidate is not None:
                        ray.kill(actor)
        assert found == dict(InlinePool(objective()).scores(todo))
        for actor in workers._idle:  # between two rounds
            ray.kill(actor)
        assert dict(workers.scores(todo)) == found
    finally:
        workers.close()


@pytest.mark.usefixtures("cluster")
def test_a_candidate_that_kills_every_actor_fails_alone(tmp_path: Path) -> None:
    workers = pool("deadly", mark=str(tmp_path / "died"), order=1, always=True)
    todo = tasks((2, 1, 2))
    try:
        found = dict(workers.scores(todo))
    finally:
        workers.close()
    assert found == {**dict(InlinePool(objective()).scores(todo)), 11: FAILED}
    assert workers.errors == {11: "the worker died twice"}


@pytest.mark.usefixtures("cluster")
def test_actors_that_cannot_make_their_objective_end_the_search() -> None:
    workers = pool(count=-1)
    try:
        with pytest.raises(ValueError, match=r"no worker can make .*:objective': RuntimeError"):
            list(workers.scores(tasks((1,))))
    finally:
        workers.close()
    workers = pool("stillborn")
    try:
        with pytest.raises(RuntimeError, match=r"3 workers in a row died while making .*:stillborn'"):
            list(workers.scores(tasks((1,))))
    finally:
        workers.close()


@pytest.mark.usefixtures("cluster")
def test_a_pool_that_idles_makes_room_for_another(caplog: pytest.LogCaptureFixture) -> None:
    first, second = pool(), pool()
    first.patience = second.patience = 4.0
    todo = tasks((1, 2, 3))
    try:
        expected = dict(first.scores(todo))  # holds both cores from now on
        assert dict(second.scores(todo)) == expected
        assert dict(first.scores(todo)) == expected
    finally:
        first.close()
        second.close()
    assert "no worker has a place after 4 s; the cluster has {'CPU': 0" in caplog.text
