"""What holds for every pool, and candidates to see it with."""

from collections.abc import Sequence

from search_objectives import objective

from thalweg.diffusion.s3.evolution import Evolution, EvolutionConfig
from thalweg.diffusion.s3.genes import Genes, StepGenes
from thalweg.diffusion.s3.pool import InlinePool, Pool, Task
from thalweg.diffusion.s3.search import run_search
from thalweg.diffusion.s3.space import SearchSpace
from thalweg.diffusion.schedules import VPLinear
from thalweg.diffusion.solvers.linear import LinearSchedule

SPACE = SearchSpace(noise=VPLinear(), nfe=4)
CONFIG = EvolutionConfig(num_random=6, num_seeds=10, batch=8, parents=4)


def tasks(orders: Sequence[int]) -> list[Task]:
    """Candidates 10, 11, ... that differ in the order of the last step but one."""
    times = SPACE.repair(SPACE.grid("uniform_lambda", 5e-3))
    steps = [(StepGenes(order=2), StepGenes(order=2), StepGenes(order=n), StepGenes()) for n in orders]
    return [(10 + i, SPACE.schedule(Genes(times=times, steps=s))) for i, s in enumerate(steps)]


def check_search_ends_like_inline(pool: Pool) -> None:
    """The same scores, ranking and random state after several rounds."""
    here, there = Evolution(SPACE, CONFIG), Evolution(SPACE, CONFIG)
    run_search(here, InlinePool(objective()), budget=30)
    run_search(there, pool, budget=30)
    assert there.state_dict() == here.state_dict()
    assert there.best(10) == here.best(10)


def check_scores_on_the_first_samples(pool: Pool) -> None:
    """``count`` reaches the objective; schedules of weights are taken too."""
    todo = [*tasks((1, 2)), (20, LinearSchedule.of(tasks((3,))[0][1]))]
    judge = objective()
    expected = {number: judge(schedule, 24) for number, schedule in todo}
    assert {score.count for score in expected.values()} == {24}
    assert expected != {number: judge(schedule) for number, schedule in todo}
    assert dict(pool.scores(todo, 24)) == expected
