"""Search space, objective and evolution: what every candidate keeps, and that a search is its state."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from search_objectives import denoise, objective

from thalweg.diffusion.s3.evolution import Evolution, EvolutionConfig
from thalweg.diffusion.s3.genes import Genes, StepGenes, decode, weight_of
from thalweg.diffusion.s3.objective import HOPELESS, Score, TeacherError, summarise
from thalweg.diffusion.s3.space import SearchSpace
from thalweg.diffusion.schedules import VE, Flow, VPCosine, VPDiscrete, VPLinear
from thalweg.diffusion.solvers.schedule import SolverSchedule

SPACES = {
    "vp": SearchSpace(noise=VPLinear(), nfe=6),
    "cosine, free end": SearchSpace(noise=VPCosine(), nfe=5, end="free"),
    "table": SearchSpace(noise=VPDiscrete(), nfe=8, max_order=4),
    "flow": SearchSpace(noise=Flow(shift=3.0), nfe=5, predictions=("noise", "data", "velocity")),
    "noise levels": SearchSpace(noise=VE(), nfe=5, t_end=(0.002, 0.02)),
}
ALL = pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)


def check(space: SearchSpace, genes: Genes) -> None:
    schedule = space.schedule(genes)
    assert schedule.nfe == space.nfe
    assert genes.times[0] == space.noise.t_start
    low, high = space.t_end
    assert low - 1e-9 <= genes.times[-1] <= high + 1e-6 or len(genes.times) == 1
    lam = np.array([node.lam for node in schedule.nodes])
    gaps = np.diff(lam[np.isfinite(lam)])
    assert (gaps > space.min_gap - 1e-6).all()
    compiled = schedule.compile()
    assert np.abs(compiled.C_pred).max() <= space.max_weight
    alpha, sigma = np.array([(node.alpha, node.sigma) for node in schedule.nodes]).T
    np.testing.assert_allclose(compiled.A_pred, sigma / sigma[0], atol=1e-9)
    np.testing.assert_allclose(compiled.C_pred.sum(1), alpha - alpha[0] * sigma / sigma[0], atol=1e-9)


@ALL
def test_seeds_are_valid_and_distinct(space: SearchSpace) -> None:
    seeds = space.seeds()
    assert len(set(seeds)) == len(seeds) > 20
    for genes in seeds[::7]:
        check(space, genes)


@ALL
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_random_candidates_and_their_offspring_are_valid(space: SearchSpace, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = space.random(rng), space.random(rng)
    child = space.crossover(a, b, rng)
    for genes in (a, b, child, space.mutate(child, rng), space.mutate(a, rng, width=2.0, rate=1.0)):
        check(space, genes)
    assert space.mutate(a, rng) != a


@ALL
def test_repair_changes_nothing_that_is_right_and_mends_the_rest(space: SearchSpace) -> None:
    good = space.random(np.random.default_rng(0)).times
    np.testing.assert_allclose(space.repair(good), good, rtol=1e-6)
    start = space.noise.t_start
    for times in ([start / 2] * space.num_times, [start] * space.num_times, sorted(good)):
        mended = space.repair(times)
        assert all(a > b for a, b in pairwise(mended))
        np.testing.assert_allclose(space.repair(mended), mended, rtol=1e-6)


def test_genes_that_do_not_fit_their_place_are_lowered() -> None:
    wild = StepGenes(prediction="noise", order=4, near=3, c=0.5, corrector=True)
    schedule = decode(Genes(times=(1.0, 0.6, 0.3, 0.1), steps=(wild,) * 4), Flow())
    assert [step.order for step in schedule.steps] == [1, 2, 3, 1]
    assert [step.corrector is not None for step in schedule.steps] == [True, True, True, False]
    assert schedule.steps[0].prediction == "data"
    assert schedule.steps[-1].prediction == "data"
    assert schedule.nodes[-1].sigma == 0
    assert weight_of(schedule) > 0


def test_genes_survive_json() -> None:
    genes = SPACES["flow"].random(np.random.default_rng(1))
    assert Genes.from_dict(genes.to_dict()) == genes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nfe": 0}, "nfe 0 and max_order 3 must be 1 or more"),
        ({"nfe": 4, "t_end": (0.1, 0.01)}, r"t_end is \(0\.1, 0\.01\)"),
        (
            {"nfe": 4, "predictions": ("score",)},
            r"predictions are \('score',\), allowed: noise, data, velocity",
        ),
        ({"nfe": 4, "predictions": ("velocity",)}, "velocity needs a rectified flow"),
        ({"nfe": 400}, "400 nodes at gaps of 0.05 do not fit"),
    ],
)
def test_spaces_without_schedules_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SearchSpace(noise=VPLinear(), **options)


def run(evolution: Evolution, error: TeacherError, rounds: int, path: Path | None = None) -> None:
    while evolution.round < rounds or len(evolution.scores) < len(evolution.archive):
        for candidate in evolution.ask():
            evolution.tell({candidate.number: error(evolution.space.schedule(candidate.genes))})
        if path is not None:
            evolution.save(path)


CONFIG = EvolutionConfig(num_random=10, num_seeds=20, batch=12, parents=6)


def test_a_search_finds_better_than_the_known_solvers() -> None:
    space, error = SearchSpace(noise=VPLinear(), nfe=5), objective()
    evolution = Evolution(space, CONFIG)
    known = min(error(space.schedule(genes)).value for genes in space.seeds())
    best = np.inf
    for rounds in (1, 5, 15):
        run(evolution, error, rounds)
        assert evolution.best()[0][1].value <= best
        best = evolution.best()[0][1].value
    assert best < 0.7 * known


def test_a_killed_search_ends_like_one_that_was_not(tmp_path: Path) -> None:
    space, error, path = SearchSpace(noise=VPLinear(), nfe=5), objective(), tmp_path / "search.json"
    whole = Evolution(space, CONFIG)
    run(whole, error, 4)
    killed = Evolution(space, CONFIG)
    run(killed, error, 2, path)
    half = killed.ask()
    killed.tell({c.number: error(space.schedule(c.genes)) for c in reversed(half[: len(half) // 2])})
    killed.save(path)
    resumed = Evolution(space, CONFIG)
    resumed.load(path)
    assert [c.number for c in resumed.ask()] == [c.number for c in half[len(half) // 2 :]]
    run(resumed, error, 4)
    assert resumed.state_dict() == whole.state_dict()


def test_a_predictor_that_knows_everything_saves_evaluations() -> None:
    space, error = SearchSpace(noise=VPLinear(), nfe=5), objective(count=32)

    def oracle(schedules: list[SolverSchedule], scores: list[Score]) -> object:
        assert len(schedules) == len(scores)
        return lambda found: (np.array([error(s).value for s in found]), np.zeros(len(found)))

    small = EvolutionConfig(
        num_random=10, num_seeds=20, batch=6, parents=6, guided_pool=4, guided_generations=3
    )
    plain, guided = Evolution(space, small), Evolution(space, small, train=oracle)
    for evolution in (plain, guided):
        run(evolution, error, 5)
    assert len(guided.scores) == len(plain.scores)
    assert guided.best()[0][1].value < plain.best()[0][1].value


def test_what_was_never_asked_cannot_be_told() -> None:
    with pytest.raises(ValueError, match="candidate 3 was never asked for; there are 0"):
        Evolution(SPACES["vp"], CONFIG).tell({3: Score(value=1.0, noise=0.1, count=4)})


def test_score_is_the_median_and_its_error() -> None:
    score = summarise(torch.randn(4001, generator=torch.Generator().manual_seed(0)).abs())
    assert score.value == pytest.approx(0.6745, abs=0.03)
    repeats = [summarise(torch.randn(400).abs()).value for _ in range(400)]
    assert summarise(torch.randn(400).abs()).noise == pytest.approx(np.std(repeats), rel=0.4)
    assert summarise(torch.tensor([1.0, float("nan"), float("inf")])).value == HOPELESS


def test_batches_do_not_change_errors_and_shapes_must_agree() -> None:
    error = objective()
    schedule = SPACES["vp"].schedule(SPACES["vp"].seeds()[0])
    parts = TeacherError(denoise, error.x_T, error.target, batch=7)
    torch.testing.assert_close(parts.errors(schedule), error.errors(schedule))
    assert len(parts.errors(schedule, 10)) == 10
    with pytest.raises(ValueError, match="differ in shape"):
        TeacherError(denoise, error.x_T, error.target[:3])
