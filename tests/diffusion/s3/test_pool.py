"""Pools: the same scores wherever they are computed, and none lost with a worker."""

from pathlib import Path

import pool_facts
import pytest
from pool_facts import CONFIG, SPACE, tasks
from search_objectives import objective

from thalweg.diffusion.s3.evolution import Evolution
from thalweg.diffusion.s3.pool import FAILED, InlinePool, ObjectiveRef, ProcessPool
from thalweg.diffusion.s3.search import Progress, run_search


def pool(function: str, **options: object) -> ProcessPool:
    return ProcessPool(ObjectiveRef(function=f"search_objectives:{function}", options=options), workers=2)


def test_two_processes_end_like_one() -> None:
    workers = pool("objective")
    try:
        pool_facts.check_search_ends_like_inline(workers)
        pool_facts.check_scores_on_the_first_samples(workers)
    finally:
        workers.close()


@pytest.mark.parametrize("order", [1, 3])
def test_a_worker_that_dies_takes_no_result_with_it(order: int, tmp_path: Path) -> None:
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


def test_a_candidate_that_kills_every_worker_fails_alone(tmp_path: Path) -> None:
    workers = pool("deadly", mark=str(tmp_path / "died"), order=1, always=True)
    todo = tasks((2, 1, 2))
    try:
        found = dict(workers.scores(todo))
    finally:
        workers.close()
    assert found == {**dict(InlinePool(objective()).scores(todo)), 11: FAILED}
    assert workers.errors == {11: "the worker died twice"}


def test_a_search_goes_on_from_its_file_and_reports(tmp_path: Path) -> None:
    state, seen = tmp_path / "search.json", list[Progress]()
    whole = Evolution(SPACE, CONFIG)
    run_search(whole, InlinePool(objective()), budget=40)
    run_search(Evolution(SPACE, CONFIG), InlinePool(objective()), budget=20, state=state)
    resumed = Evolution(SPACE, CONFIG)
    run_search(resumed, InlinePool(objective()), budget=40, state=state, report=seen.append)
    assert resumed.state_dict() == whole.state_dict()
    assert [p.evaluated for p in seen] == list(range(seen[0].evaluated, seen[-1].evaluated + 1))
    assert seen[-1].best == whole.best()[0][1].value


def test_this_process_scores_on_the_first_samples() -> None:
    pool_facts.check_scores_on_the_first_samples(InlinePool(objective()))


def test_workers_that_cannot_make_their_objective_end_the_search() -> None:
    workers = pool("objective", count=-1)
    try:
        with pytest.raises(ValueError, match=r"no worker can make .*:objective': RuntimeError"):
            list(workers.scores(tasks((1,))))
    finally:
        workers.close()


def test_pools_that_cannot_work_say_so() -> None:
    with pytest.raises(ValueError, match="needs a worker and a device, got 0"):
        ProcessPool(ObjectiveRef(function="a:b"), workers=0)
    with pytest.raises(ValueError, match="'search_objectives:nothing' is not module:function"):
        ObjectiveRef(function="search_objectives:nothing").make("cpu")
