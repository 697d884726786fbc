"""Free weights of the search space, and the Gaussian process that guides a search among them."""

import numpy as np
import pytest

from thalweg.diffusion.s3.genes import Genes, decode
from thalweg.diffusion.s3.objective import HOPELESS, Score
from thalweg.diffusion.s3.process import Process, ProcessConfig, numbers_of, process_train
from thalweg.diffusion.s3.space import SearchSpace
from thalweg.diffusion.schedules import Flow, VPLinear
from thalweg.diffusion.solvers.linear import LinearSchedule, totals

SPACE = SearchSpace(noise=VPLinear(), nfe=4, free_weights=0.5)
FIT = ProcessConfig(steps=20)


@pytest.mark.parametrize("noise", [VPLinear(), Flow()], ids=["vp", "flow"])
def test_shifted_weights_keep_their_sums_and_survive_json(noise: VPLinear | Flow) -> None:
    space = SearchSpace(noise=noise, nfe=5, free_weights=0.5)
    rng = np.random.default_rng(0)
    mother, father = (space.mutate(space.random(rng), rng) for _ in range(2))
    for genes in (mother, space.crossover(mother, father, rng), space.mutate(father, rng, width=2.0)):
        assert Genes.from_dict(genes.to_dict()) == genes
        schedule = space.schedule(genes)
        sums = schedule.compile().steps()[1].sum(1)
        np.testing.assert_allclose(sums, totals(schedule.nodes), atol=1e-9)
        assert space.is_valid(genes)


def test_a_shift_moves_the_cumulative_share_that_it_names() -> None:
    plain = SPACE.random(np.random.default_rng(1))
    shifts = ((), (0.0,), (0.25, 0.0), (0.0, 0.0, 0.0))
    moved = decode(Genes(times=plain.times, steps=plain.steps, shifts=shifts), SPACE.noise)
    assert isinstance(moved, LinearSchedule)
    change = numbers_of(moved) - numbers_of(SPACE.schedule(plain))
    expected = np.zeros(5 + 6)
    expected[5 + 1] = 0.25
    np.testing.assert_allclose(change, expected, atol=1e-9)
    none = Genes(times=plain.times, steps=plain.steps, shifts=((), (0.0,), (0.0, 0.0), (0.0, 0.0, 0.0)))
    assert SPACE.schedule(none) == SPACE.schedule(plain)


def test_a_process_goes_through_what_it_knows_and_doubts_what_is_far() -> None:
    x = np.random.default_rng(0).uniform(-1, 1, (40, 3))
    y = np.sin(2 * x[:, 0]) + x[:, 1]
    process = Process(x[:30], y[:30], ProcessConfig())
    mean, sd = process.predict(x)
    np.testing.assert_allclose(mean[:30], y[:30], atol=0.05)
    assert np.abs(mean[30:] - y[30:]).mean() < 0.3 * y.std()
    far = process.predict(x[:1] + 50.0)[1]
    assert far[0] > 3 * sd[:30].max()


def test_failures_do_not_stop_a_process() -> None:
    schedules = [SPACE.schedule(genes) for genes in SPACE.seeds()[:9]]
    scores = [Score(value=1.0 + i, noise=0.1, count=8) for i in range(8)]
    guess = process_train(FIT)(schedules, [*scores, Score(value=HOPELESS, noise=0.0, count=0)])
    assert np.isfinite(guess(schedules)).all()
    with pytest.raises(ValueError, match="all 1 candidates failed"):
        process_train(FIT)(schedules[:1], [Score(value=HOPELESS, noise=0.0, count=0)])
    with pytest.raises(ValueError, match="worst is 0"):
        ProcessConfig(worst=0.0)
