"""Seeds on more grids, and the last word on fresh starts."""

import pytest
from search_objectives import objective

from thalweg.diffusion.s3.evolution import Evolution, EvolutionConfig
from thalweg.diffusion.s3.judge import rerank
from thalweg.diffusion.s3.objective import Score
from thalweg.diffusion.s3.pool import InlinePool
from thalweg.diffusion.s3.search import run_search
from thalweg.diffusion.s3.seeds import grid_seeds
from thalweg.diffusion.s3.space import SearchSpace
from thalweg.diffusion.schedules import Flow, VPLinear

SPACE = SearchSpace(noise=VPLinear(), nfe=4)
CONFIG = EvolutionConfig(num_random=4, num_seeds=12, batch=12, parents=4)


@pytest.mark.parametrize("end", ["zero", "free"])
@pytest.mark.parametrize("noise", [VPLinear(), Flow()], ids=["vp", "flow"])
def test_more_grids_give_valid_seeds_that_plain_grids_do_not(noise: VPLinear | Flow, end: str) -> None:
    space = SearchSpace(noise=noise, nfe=5, end=end)
    found = grid_seeds(space)
    assert len(set(found)) == len(found) > 10
    assert not set(found) & set(space.seeds())
    for genes in found:
        assert space.is_valid(genes)
        assert genes.times[0] == noise.t_start
        assert space.repair(genes.times) == pytest.approx(genes.times)


def test_times_of_another_number_are_refused() -> None:
    with pytest.raises(ValueError, match="found 3 times, needed: 4"):
        SPACE.seeds_on([1.0, 0.5, 0.1])


def test_the_winner_is_the_best_on_fresh_starts_and_beats_the_known() -> None:
    evolution = Evolution(SPACE, CONFIG)
    with pytest.raises(ValueError, match="nothing to judge: 0 candidates"):
        rerank(evolution, InlinePool(objective()))
    run_search(evolution, InlinePool(objective(count=32)), budget=60)
    fresh = objective(count=96)
    winner, table = rerank(evolution, InlinePool(fresh), top=5)
    assert winner == table[0]
    assert [row.fresh.value for row in table] == sorted(row.fresh.value for row in table)
    assert {row.number for row in table} >= set(evolution.ranked()[:5])
    assert winner.fresh == fresh(winner.schedule)
    known = [row for row in table if row.known]
    assert known
    assert winner.fresh.value < known[0].fresh.value


def test_luck_on_the_starts_of_a_search_does_not_win() -> None:
    evolution = Evolution(SPACE, CONFIG)
    evolution.tell({c.number: Score(value=1.0 + c.number, noise=0.0, count=4) for c in evolution.ask()})

    class Reversed:
        """Scores that turn the order round."""

        def scores(self, tasks: list, count: int | None = None) -> list:
            return [(n, Score(value=10.0 - n, noise=0.0, count=count or 8)) for n, _ in tasks]

        def close(self) -> None: ...

    winner, table = rerank(evolution, Reversed(), top=4, count=16)  # type: ignore[arg-type]
    assert winner.number == 3
    assert winner.searched.value == 4.0
    assert {row.fresh.count for row in table} == {16}
