"""Pool of submitit jobs, with processes of this machine as jobs; the same facts as for processes."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pool_facts
import psutil
import pytest
from pool_facts import tasks
from search_objectives import objective

from thalweg.diffusion.s3.pool import FAILED, InlinePool, ObjectiveRef
from thalweg.diffusion.s3.submitit_pool import SubmititPool

pytest.importorskip("submitit")


@pytest.fixture(autouse=True)
def _support_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))


def pool(folder: Path, function: str = "objective", chunk: int | None = None, **options: Any) -> SubmititPool:
    reference = ObjectiveRef(function=f"search_objectives:{function}", options=options)
    return SubmititPool(reference, workers=2, folder=folder, cluster="local", poll=0.05, chunk=chunk)


@pytest.mark.dist
def test_two_jobs_end_like_this_process(tmp_path: Path) -> None:
    pool_facts.check_search_ends_like_inline(pool(tmp_path))
    pool_facts.check_scores_on_the_first_samples(pool(tmp_path))


@pytest.mark.parametrize("order", [1, pytest.param(3, marks=pytest.mark.dist)])
def test_a_job_that_dies_takes_no_result_with_it(order: int, tmp_path: Path) -> None:
    workers = pool(tmp_path, "deadly", mark=str(tmp_path / "died"), order=order, always=False)
    todo = tasks((2, 2, order, 2, 2))
    found = list(workers.scores(todo))
    assert (tmp_path / "died").exists()
    expected = dict(InlinePool(objective()).scores(todo))
    if order == 3:  # raises once it lives
        expected[12] = FAILED
        assert workers.errors == {12: "RuntimeError: out of memory"}
    assert dict(found) == expected
    assert len(found) == len(todo)


@pytest.mark.dist
def test_a_candidate_that_kills_every_job_fails_alone(tmp_path: Path) -> None:
    workers = pool(tmp_path, "deadly", chunk=3, mark=str(tmp_path / "died"), order=1, always=True)
    todo = tasks((2, 1, 2))
    assert dict(workers.scores(todo)) == {**dict(InlinePool(objective()).scores(todo)), 11: FAILED}
    assert workers.errors[11].startswith("two jobs died of it; log: ")


@pytest.mark.dist
def test_jobs_killed_from_outside_take_no_result_with_them(tmp_path: Path) -> None:
    workers = pool(tmp_path)
    todo = tasks((1, 2, 3, 1, 2, 3))
    found = {}
    for number, score in workers.scores(todo):
        if not found:
            for job in workers._running:
                for process in psutil.Process(int(job.handle.job_id)).children(recursive=True):
                    process.kill()
        assert number not in found
        found[number] = score
    assert found == dict(InlinePool(objective()).scores(todo))


@pytest.mark.dist
def test_jobs_that_cannot_begin_end_the_search(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no worker can make .*:objective': RuntimeError"):
        list(pool(tmp_path, count=-1).scores(tasks((1,))))
    with pytest.raises(RuntimeError, match="3 jobs in a row ended before their first candidate; log: /"):
        list(pool(tmp_path, "stillborn").scores(tasks((1,))))


def test_jobs_get_json(tmp_path: Path) -> None:
    todo = tasks((1, 2))
    list(pool(tmp_path, chunk=1).scores(todo, 8))
    told = sorted(tmp_path.glob("round-*/*.json"))
    assert [json.loads(path.read_text())["tasks"] for path in told] == [[[n, s.to_dict()]] for n, s in todo]
    with pytest.raises(ValueError, match="a job needs 1 candidate or more, got 0"):
        pool(tmp_path, chunk=0)
