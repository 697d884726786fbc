"""The first time of a sampler is the one from which known solvers do best."""

import pytest

from thalweg.diffusion.s3.objective import Score
from thalweg.diffusion.s3.pool import InlinePool
from thalweg.diffusion.s3.space import SearchSpace
from thalweg.diffusion.s3.start import STARTS, choose_start
from thalweg.diffusion.schedules import VPLinear

SPACE = SearchSpace(noise=VPLinear(), nfe=5)


def distance_from(time: float) -> InlinePool:
    """Scores a schedule by how far it begins from a time."""
    return InlinePool(
        lambda schedule, count=None: Score(value=abs(schedule.nodes[0].t - time), noise=0.0, count=1)
    )


@pytest.mark.parametrize("part", STARTS)
def test_the_best_start_is_kept(part: float) -> None:
    space, found = choose_start(SPACE, distance_from(part), each=2)
    assert space.noise.t_start == pytest.approx(part)
    assert found.part == part
    assert set(found.errors) == {f"{p:g}" for p in STARTS}
    assert found.errors[f"{part:g}"] == pytest.approx(0.0)
    assert found.network_evaluations == len(STARTS) * 2 * SPACE.nfe
    assert found.apply(SPACE) == space


def test_a_schedule_that_begins_later_has_the_levels_of_its_time() -> None:
    found, _ = choose_start(SPACE, distance_from(0.8), each=1)
    first = found.schedule(found.seeds()[0]).nodes[0]
    assert first.alpha == pytest.approx(float(SPACE.noise.alpha(0.8)))
    assert first.label == pytest.approx(float(SPACE.noise.label(0.8)))
