"""A search with a predictor and with stages: what it notes, what it spends, and that it is its state."""

from pathlib import Path

import numpy as np
import pytest
from search_objectives import objective

from thalweg.diffusion.s3.evolution import Evolution, EvolutionConfig
from thalweg.diffusion.s3.genes import Genes
from thalweg.diffusion.s3.guide import Guess, predictor_train, tau_of, training_scores
from thalweg.diffusion.s3.objective import HOPELESS, Score
from thalweg.diffusion.s3.pool import InlinePool, Schedule
from thalweg.diffusion.s3.predictor import FitConfig, kendall_tau
from thalweg.diffusion.s3.search import Progress, run_search
from thalweg.diffusion.s3.space import SearchSpace
from thalweg.diffusion.schedules import VPLinear
from thalweg.diffusion.solvers.schedule import SolverSchedule

SPACE = SearchSpace(noise=VPLinear(), nfe=4)
FIT = FitConfig(members=2, hidden=8, layers=1, steps=20)
CONFIG = EvolutionConfig(
    num_random=4, num_seeds=12, batch=8, parents=4, guided_pool=2, guided_generations=2, counts=(8, 32)
)


def guided(config: EvolutionConfig = CONFIG) -> Evolution:
    return Evolution(SPACE, config, train=predictor_train(FIT))


class Killed(Exception):
    """The end of a process."""


class Dying:
    """An objective that ends the search at an evaluation."""

    def __init__(self, lives: int) -> None:
        self.error = objective(count=32)
        self.lives = lives

    def __call__(self, schedule: Schedule, count: int | None = None) -> Score:
        if not self.lives:
            raise Killed
        self.lives -= 1
        assert isinstance(schedule, SolverSchedule)
        return self.error(schedule, count)


@pytest.mark.parametrize("lives", [3, 19, 29, 34])
def test_a_search_killed_in_any_stage_ends_like_one_that_was_not(tmp_path: Path, lives: int) -> None:
    whole = guided()
    run_search(whole, InlinePool(objective(count=32)), budget=32)
    assert whole.round == 3
    state = tmp_path / "search.json"
    for save_every in (0.0, 1e9):  # after each score, or after the last finished stage only
        state.unlink(missing_ok=True)
        with pytest.raises(Killed):
            run_search(guided(), InlinePool(Dying(lives)), budget=32, state=state, save_every=save_every)
        resumed = guided()
        run_search(resumed, InlinePool(objective(count=32)), budget=32, state=state)
        assert resumed.state_dict() == whole.state_dict()


def test_the_predictor_is_judged_on_scores_that_it_has_not_learned() -> None:
    evolution, error = (
        guided(EvolutionConfig(num_random=6, num_seeds=12, batch=10, counts=(8, 32))),
        objective(),
    )
    seen: list[Progress] = []
    run_search(evolution, InlinePool(error), budget=18, report=seen.append)
    assert evolution.taus == [None]
    assert seen[-1].tau is None
    learned = len(evolution.scores)
    asked = evolution.ask()
    schedules = [SPACE.schedule(c.genes) for c in asked]
    old = [SPACE.schedule(genes) for genes in evolution.archive[:learned]]
    guess = predictor_train(FIT)(old, [evolution.scores[n] for n in range(learned)])
    evolution.tell({c.number: error(s, c.count) for c, s in zip(asked, schedules, strict=True)})
    expected = kendall_tau(guess(schedules)[0], [error(s, 8).value for s in schedules])
    assert evolution.taus == [None, pytest.approx(expected)]


def test_stages_spend_less_and_find_the_winner_of_full_scores_where_ranks_agree() -> None:
    full = Evolution(SPACE, EvolutionConfig(num_random=0, num_seeds=24))
    staged = Evolution(SPACE, EvolutionConfig(num_random=0, num_seeds=24, counts=(32, 128), survive=0.5))
    error = objective(count=128)
    for evolution in (full, staged):
        run_search(evolution, InlinePool(error), budget=24)
    assert staged.archive == full.archive
    first = [error(SPACE.schedule(genes), 32).value for genes in staged.archive]
    winner = full.ranked()[0]
    assert sorted(range(24), key=first.__getitem__).index(winner) < 12  # what the equality rests on
    assert staged.ranked()[0] == winner
    assert staged.best() == full.best()
    assert full.network_evaluations == 4 * 24 * 128
    assert staged.network_evaluations == 4 * (24 * 32 + 12 * 128)


def test_few_lucky_samples_do_not_win() -> None:
    evolution = Evolution(SPACE, EvolutionConfig(num_random=0, num_seeds=4, counts=(8, 32)))
    evolution.tell({c.number: Score(value=1.0 + c.number, noise=0.1, count=8) for c in evolution.ask()})
    evolution.tell({c.number: Score(value=9.0 + c.number, noise=0.1, count=32) for c in evolution.ask()})
    assert evolution.ranked() == [0, 1, 2, 3]
    assert evolution.best()[0][1].value == 9.0


def test_scores_that_come_twice_count_once() -> None:
    evolution = guided()
    score = Score(value=1.0, noise=0.1, count=8)
    evolution.tell({evolution.ask()[0].number: score})
    before = evolution.state_dict()
    evolution.tell({0: Score(value=0.5, noise=0.1, count=8)})
    assert evolution.state_dict() == before


def test_seeds_from_outside_are_all_taken() -> None:
    extra = [SPACE.random(np.random.default_rng(k)) for k in range(3)]
    evolution = Evolution(SPACE, CONFIG, seeds=extra)
    first: list[Genes] = [candidate.genes for candidate in evolution.ask()]
    assert first[:3] == extra
    assert len(first) == 3 + 12 + 4


def test_failures_are_infinite_to_the_predictor_and_bad_scores_equally_bad() -> None:
    scores = [Score(value=v, noise=0.1, count=8) for v in (1.0, 2.0, 3.0, 50.0, HOPELESS, HOPELESS / 2)]
    values, noise = training_scores(scores, worst=0.5)
    np.testing.assert_array_equal(values, [1.0, 2.0, 2.5, 2.5, np.inf, np.inf])
    assert np.isfinite(noise).all()
    with pytest.raises(ValueError, match="all 2 candidates failed"):
        training_scores(scores[-2:])
    schedules = [SPACE.schedule(genes) for genes in SPACE.seeds()[:6]]
    guess: Guess = predictor_train(FIT)(schedules, scores)
    assert np.isfinite(guess(schedules)).all()
    assert tau_of([1.0, 2.0], [3.0, 3.0]) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"counts": (64, 32)}, r"counts are \(64, 32\), allowed: rising"),
        ({"counts": (0, 32)}, r"counts are \(0, 32\)"),
        ({"survive": 0.0}, "survive is 0.0, allowed: above 0"),
    ],
)
def test_stages_that_are_none_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvolutionConfig(**options)
