"""Weights by least squares: what is recovered exactly, what holds whatever the data, and what is gained."""

import json
import math
from pathlib import Path as File

import numpy as np
import pytest
import torch
from search_objectives import denoise, objective
from torch import Tensor

from thalweg.diffusion.s3.evolution import Evolution, EvolutionConfig
from thalweg.diffusion.s3.fit import FitConfig, Path, WeightFit, fit, record
from thalweg.diffusion.s3.genes import Genes, StepGenes, with_weights
from thalweg.diffusion.s3.image_model import teacher_schedule
from thalweg.diffusion.s3.judge import rerank
from thalweg.diffusion.s3.objective import TeacherError
from thalweg.diffusion.s3.pool import InlinePool
from thalweg.diffusion.s3.search import run_search
from thalweg.diffusion.s3.space import SearchSpace
from thalweg.diffusion.schedules import VE, Flow, NoiseSchedule, VPCosine, VPLinear
from thalweg.diffusion.solvers.grids import nodes
from thalweg.diffusion.solvers.linear import LinearSchedule, totals
from thalweg.diffusion.solvers.named import named
from thalweg.diffusion.solvers.sample import sample
from thalweg.diffusion.solvers.schedule import Node

NOISES = pytest.mark.parametrize(
    "noise", [VPLinear(), VPCosine(), VE(), Flow(shift=3.0)], ids=lambda n: n.kind
)
TIMES = SearchSpace(noise=VPLinear(), nfe=5, only_times=True)


def starts(noise: NoiseSchedule, count: int = 64) -> Tensor:
    x = torch.randn(count, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return float(noise.sigma(noise.t_start)) * x


def ddim(noise: NoiseSchedule, count: int) -> LinearSchedule:
    grid, end = {"vp_linear": ("quadratic_t", 0.03), "flow": ("uniform_t", 0.05)}.get(
        noise.kind, ("karras", None)
    )
    return LinearSchedule.of(named("ddim", nodes(noise, count, grid, **({"t_end": end} if end else {}))))


def wild_weights(known: LinearSchedule, seed: int) -> LinearSchedule:
    """The nodes of a schedule with random weights."""
    rng, sums = np.random.default_rng(seed), totals(known.nodes)
    rows = []
    for i, total in enumerate(sums):
        v = rng.uniform(-1, 1, i)
        rows.append(tuple(total * np.diff([0.0, *v, 1.0])))
    return LinearSchedule(nodes=known.nodes, weights=tuple(rows))


@NOISES
def test_the_weights_of_a_sampler_are_recovered_from_its_states(noise: NoiseSchedule) -> None:
    target = wild_weights(ddim(noise, 4), seed=1)
    x_T, path = starts(noise), Path()
    states = sample(target, denoise, x_T)
    for node, state in zip(target.nodes[:-1], states, strict=False):
        path.see(node, state, denoise(state, node))
    path.end = states[-1]
    found, end = fit(ddim(noise, 4), denoise, x_T, path, FitConfig(ridge=1e-14))
    # Where predictions hardly differ little tells weights apart; but what they do is the same.
    torch.testing.assert_close(end, states[-1], rtol=1e-5, atol=1e-5)
    for row, known in zip(found.weights[:2], target.weights[:2], strict=True):
        np.testing.assert_allclose(row, known, rtol=1e-4, atol=1e-4 * abs(sum(known)))


@NOISES
def test_the_run_of_the_fit_is_the_run_of_the_fitted_schedule(noise: NoiseSchedule) -> None:
    x_T = starts(noise)
    path = record(teacher_schedule(noise, 40), denoise, x_T)
    found, end = fit(ddim(noise, 5), denoise, x_T, path)
    torch.testing.assert_close(sample(found, denoise, x_T)[-1], end, rtol=1e-9, atol=1e-9)
    batched, _ = fit(ddim(noise, 5), denoise, x_T, path, batch=7)
    for row, other in zip(batched.weights, found.weights, strict=True):
        np.testing.assert_allclose(row, other, rtol=1e-6, atol=1e-9)


@NOISES
def test_it_beats_the_solver_of_the_same_nodes_on_other_starts(noise: NoiseSchedule) -> None:
    x_T = starts(noise, 256)
    fine = teacher_schedule(noise, 60)
    found, _ = fit(ddim(noise, 5), denoise, x_T[:128], record(fine, denoise, x_T[:128]))
    other = x_T[128:]
    error = TeacherError(denoise, other, sample(fine, denoise, other)[-1])
    best = min(error(named(n, found.nodes, order=2)).value for n in ("dpmpp", "deis", "unipc"))
    assert error(found).value < 0.5 * best < 0.5 * error(ddim(noise, 5)).value


@NOISES
def test_a_path_between_its_nodes_converges_with_second_order(noise: NoiseSchedule) -> None:
    x_T = starts(noise)
    fine = record(teacher_schedule(noise, 480), denoise, x_T)
    inside = [node for node in fine.nodes[1:-1] if abs(node.lam) < 2][::7]
    worst = []
    for steps in (30, 60):
        path = record(teacher_schedule(noise, steps), denoise, x_T)
        worst.append(max(float((path.at(node) - fine.at(node)).abs().max() / node.sigma) for node in inside))
    assert math.log2(worst[0] / worst[1]) > 1.7
    assert torch.equal(path.at(path.nodes[9]), path.states[9])


def test_beyond_the_path_and_at_its_end() -> None:
    noise = VPLinear()
    path = record(teacher_schedule(noise, 40), denoise, starts(noise))
    clean = Node(alpha=1.0, sigma=0.0, t=0.0)
    assert path.end is not None
    assert torch.equal(path.at(clean), path.end)
    last = path.nodes[-1]
    below = Node(alpha=math.sqrt(1 - (last.sigma / 2) ** 2), sigma=last.sigma / 2)
    expected = path.states[-1] / 2 + (below.alpha - last.alpha / 2) * path.data[-1]
    torch.testing.assert_close(path.at(below), expected)


def test_far_starts_do_not_rule() -> None:
    """One start in sixteen is sent elsewhere: weights stay near those of the others."""
    noise = VPLinear()
    x_T = starts(noise)
    path = record(teacher_schedule(noise, 40), denoise, x_T)
    clean, _ = fit(ddim(noise, 4), denoise, x_T, path)
    for states in (*path.states[1:], path.end):
        assert states is not None
        states[::16] += 3.0
    moved = []
    for times in (0, 3):
        found, _ = fit(ddim(noise, 4), denoise, x_T, path, FitConfig(reweights=times))
        rows = zip(found.weights, clean.weights, strict=True)
        moved.append(max(float(np.abs(np.subtract(a, b)).max()) for a, b in rows))
    assert moved[1] < 0.5 * moved[0]


def test_weights_keep_their_bound_and_what_is_not_finite_gives_ddim() -> None:
    noise = VPLinear()
    x_T = starts(noise)
    path = record(teacher_schedule(noise, 40), denoise, x_T)
    found, _ = fit(ddim(noise, 8), denoise, x_T, path, FitConfig(ridge=1e-12, largest=0.5))
    for row, total in zip(found.weights, totals(found.nodes), strict=True):
        assert np.abs(np.cumsum(row)[:-1] / total).max(initial=0.0) <= 0.5
    plain, _ = fit(ddim(noise, 3), lambda x, node: x * math.nan, x_T, path)
    for row, known in zip(plain.weights, ddim(noise, 3).weights, strict=True):
        np.testing.assert_allclose(row, known)


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(ValueError, match="ridge 0"):
        FitConfig(ridge=0)
    known = ddim(VPLinear(), 3)
    first = LinearSchedule(nodes=known.nodes, weights=known.weights, first="zero")
    with pytest.raises(ValueError, match="first is 'zero'"):
        fit(first, denoise, starts(VPLinear()), Path())


def test_a_run_takes_its_states_as_they_are() -> None:
    """A pipeline may round them between steps: weights are found for the state that comes."""
    noise = VPLinear()
    x_T = starts(noise)
    path = record(teacher_schedule(noise, 40), denoise, x_T)
    run = WeightFit(ddim(noise, 4).nodes, path)
    state = x_T
    for node in run.nodes[:-1]:
        state = run.step(state.bfloat16().double(), denoise(state, node)).bfloat16().double()
    assert run.schedule().nfe == 4
    assert float((state - path.at(run.nodes[-1])).norm(dim=1).median()) < 0.3


def fitting(count: int = 64) -> TeacherError:
    plain = objective(count=count)
    path = record(teacher_schedule(VPLinear(), 60), denoise, plain.x_T)
    return TeacherError(denoise, plain.x_T, plain.target, path=path)


def test_a_search_of_times_keeps_the_weights_that_it_found(tmp_path: File) -> None:
    config = EvolutionConfig(num_random=4, batch=6, parents=4)
    evolution, state = Evolution(TIMES, config), tmp_path / "times.json"
    run_search(evolution, InlinePool(fitting()), 30, state=state)
    plain = objective()
    for number in evolution.ranked()[:5]:
        schedule, score = evolution.schedule(number), evolution.scores[number]
        assert plain(schedule).value == pytest.approx(score.value, rel=1e-9)
        assert {step for genes in evolution.archive for step in genes.steps} == {StepGenes()}
    again = Evolution(TIMES, config)
    again.load(state)
    assert json.dumps(again.state_dict()) == json.dumps(evolution.state_dict())
    assert again.schedule(again.ranked()[0]) == evolution.schedule(evolution.ranked()[0])
    known = min(plain(TIMES.schedule(genes)).value for genes in SearchSpace(noise=VPLinear(), nfe=5).seeds())
    assert evolution.best()[0][1].value < 0.5 * known


def test_a_search_of_weights_goes_on_from_them() -> None:
    times = Evolution(TIMES, EvolutionConfig(num_random=4, batch=6, parents=4))
    run_search(times, InlinePool(fitting()), 24)
    seeds = times.fitted(4)
    space = SearchSpace(noise=VPLinear(), nfe=5, free_weights=0.5)
    for genes, number in zip(seeds, times.ranked(), strict=False):
        found, known = space.schedule(genes), times.schedule(number)
        for row, other in zip(found.weights, known.weights, strict=True):
            np.testing.assert_allclose(row, other, rtol=1e-9, atol=1e-12)
    config = EvolutionConfig(num_random=4, num_seeds=8, batch=8, width=0.1)
    search = Evolution(space, config, seeds=seeds)
    run_search(search, InlinePool(objective()), 60)
    assert search.best()[0][1].value <= times.best()[0][1].value * (1 + 1e-9)
    winner, table = rerank(search, InlinePool(objective(count=96)))
    assert not winner.known
    assert sum(judged.known for judged in table) == 1


def test_genes_carry_any_weights() -> None:
    space = SearchSpace(noise=Flow(), nfe=4, free_weights=0.5)
    times = space.repair(space.grid("uniform_t", 0.05))
    genes = Genes(times=times, steps=(StepGenes(order=2),) * 4)
    wild = wild_weights(LinearSchedule.of(space.schedule(genes)), seed=5)
    found = space.schedule(with_weights(genes, wild))
    for row, known in zip(found.weights, wild.weights, strict=True):
        np.testing.assert_allclose(row, known, rtol=1e-12, atol=1e-12)
