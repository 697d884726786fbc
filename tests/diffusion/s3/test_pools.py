"""Pools by name: each is made, and says what it cannot do."""

import builtins
from typing import Any

import pytest
from pool_facts import tasks
from search_objectives import objective

from thalweg.diffusion.s3.pool import InlinePool, ObjectiveRef
from thalweg.diffusion.s3.pools import POOLS, make_pool

REFERENCE = ObjectiveRef(function="search_objectives:objective")


def test_this_process_by_name_scores_as_its_objective() -> None:
    pool = make_pool("inline", REFERENCE)
    assert dict(pool.scores(tasks((1, 2)))) == dict(InlinePool(objective()).scores(tasks((1, 2))))
    pool.close()


@pytest.mark.parametrize("name", sorted(POOLS))
def test_a_pool_without_workers_or_with_unknown_options_is_refused(name: str) -> None:
    make_pool(name, REFERENCE).close()  # nothing is started before there is work
    with pytest.raises(ValueError, match=r"got 0 and \['cpu'\]"):
        make_pool(name, REFERENCE, workers=0)
    with pytest.raises(ValueError, match=f"pool '{name}' has no colour, allowed: "):
        make_pool(name, REFERENCE, colour="red")


def test_an_unknown_pool_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="pool 'dask' is not known, allowed: inline, process, ray, submitit"):
        make_pool("dask", REFERENCE)


@pytest.mark.parametrize("name", ["ray", "submitit"])
def test_a_missing_package_is_named_with_its_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = builtins.__import__

    def find_all_but(module: str, *args: Any, **kwargs: Any) -> Any:
        if module.partition(".")[0] == name:
            raise ModuleNotFoundError(f"No module named {module!r}")
        return find(module, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", find_all_but)
    pool = make_pool(name, REFERENCE)
    with pytest.raises(ModuleNotFoundError, match=rf"pip install 'thalweg\[{name}\]'"):
        list(pool.scores(tasks((1,))))
    pool.close()
