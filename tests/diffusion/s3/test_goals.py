"""What a refinement descends: distances, and those of distributions."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from thalweg.diffusion.metrics.distance import frechet, gaussian
from thalweg.diffusion.s3.descent import Settings
from thalweg.diffusion.s3.examples import Examples, evaluate
from thalweg.diffusion.s3.goals import Distance, Distribution
from thalweg.diffusion.s3.refine import refine
from thalweg.diffusion.schedules import VPLinear
from thalweg.diffusion.solvers.grids import nodes
from thalweg.diffusion.solvers.named import named

VARIANCE = torch.linspace(0.05, 0.5, 4, dtype=torch.float64)


def network(x: Tensor, alpha: Tensor, sigma: Tensor, label: Tensor | None) -> Tensor:
    """Data prediction of a Gaussian of mean 0.5, which is wrong: it has learnt a mean of 0.4."""
    return 0.4 + VARIANCE * alpha / (VARIANCE * alpha**2 + sigma**2) * (x - 0.5 * alpha)


def real() -> tuple[Tensor, Tensor]:
    return torch.full((4,), 0.5, dtype=torch.float64), torch.diag(VARIANCE)


def examples(count: int, seed: int) -> Examples:
    """Ends of a fine solver, whose distribution is not the real one since the network is wrong."""
    from thalweg.diffusion.solvers.sample import sample

    noise = VPLinear()
    fine = named("adams", nodes(noise, 40, "karras"), order=3, prediction="data")
    generator = torch.Generator().manual_seed(seed)
    x = fine.nodes[0].sigma * torch.randn(count, 4, generator=generator, dtype=torch.float64)
    end = sample(
        fine, lambda x, node: network(x, torch.tensor(node.alpha), torch.tensor(node.sigma), None), x
    )
    return Examples(x_T=x, target=end[-1])


def test_a_goal_is_the_frechet_distance_and_some_distance_to_the_teacher() -> None:
    these = examples(50, 0)
    end = these.target + 0.1
    goal = Distribution(lambda x: 2 * x, real(), weight=0.3)
    apart = frechet(real(), gaussian(2 * end))
    assert float(goal.loss(end, these.target)) == pytest.approx(apart + 0.3 * 0.2)
    assert goal.judge(end, these.target) == pytest.approx(apart + 0.3 * 0.2)
    assert Distance().judge(end, these.target) == pytest.approx(0.2)
    assert float(Distance("mse").loss(end, these.target)) == pytest.approx(0.04)


def test_descending_the_distribution_beats_the_fine_solver_where_the_network_is_wrong() -> None:
    noise = VPLinear()
    train, validation, other = (examples(count, seed) for seed, count in enumerate((200, 100, 400)))
    start = named("adams", nodes(noise, 4, "karras"), order=2, prediction="data")
    goal = Distribution(lambda x: x, real(), weight=0.05)
    settings = Settings(iterations=60, learning_rates=(0.03,), evaluate_every=10)
    found = refine(start, network, train, validation, noise_schedule=noise, settings=settings, goal=goal)

    def apart(end: Tensor, _: Tensor) -> float:
        return float(goal.frechet(end))

    reached = evaluate(found.schedule, network, other, judge=apart)
    assert found.error == evaluate(found.schedule, network, validation, judge=goal.judge)
    assert reached < 0.8 * evaluate(start, network, other, judge=apart)
    assert reached < apart(other.target, other.target)
    near = refine(start, network, train, validation, noise_schedule=noise, settings=settings)
    assert evaluate(near.schedule, network, other) < evaluate(found.schedule, network, other)


def test_results_that_are_not_finite_are_hopeless() -> None:
    these = examples(10, 0)
    start = named("adams", nodes(VPLinear(), 3, "karras"), order=1, prediction="data")
    broken = replace(these, x_T=these.x_T * float("nan"))
    assert evaluate(start, network, broken, judge=lambda end, target: 0.0) == float("inf")
