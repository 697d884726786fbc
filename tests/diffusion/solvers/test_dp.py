"""Grids by dynamic programming: best of all paths, better than plain grids, and as costly as they say."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from solver_runs import golden, mixture
from torch import Tensor

from thalweg.diffusion.s3.genes import Genes, StepGenes
from thalweg.diffusion.s3.space import SearchSpace
from thalweg.diffusion.schedules import VE, Flow, NoiseSchedule, VPLinear
from thalweg.diffusion.solvers import dp
from thalweg.diffusion.solvers.grids import nodes
from thalweg.diffusion.solvers.named import named
from thalweg.diffusion.solvers.sample import sample
from thalweg.diffusion.solvers.schedule import Node

SEARCHES = {"gits": dp.search_gits, "oss": dp.search_oss}
DENOISER = mixture("gm16")


def starts(count: int = 16, sigma: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return sigma * torch.randn(count, 16, generator=generator, dtype=torch.float64)


def small_teacher(steps: int = 8) -> dp.Teacher:
    return dp.trajectory(nodes(VPLinear(), steps, "uniform_lambda", t_end=0.02), DENOISER, starts())


def paths(last: int, n: int) -> list[tuple[int, ...]]:
    """All rising paths of n steps from 0 to last."""
    return [(0, *inner, last) for inner in itertools.combinations(range(1, last), n - 1)]


def cost_of(path: tuple[int, ...], costs: np.ndarray, gamma: float) -> float:
    return sum(gamma**k * costs[i, j] for k, (i, j) in enumerate(itertools.pairwise(path)))


@pytest.mark.parametrize("gamma", [0.8, 1.0, 1.15])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
def test_the_cheapest_path_is_the_cheapest_of_all(n: int, gamma: float) -> None:
    rng = np.random.default_rng(n)
    for costs in (
        dp.step_costs(small_teacher()),
        np.triu(rng.random((9, 9)), 1) + np.tril(np.full((9, 9), np.inf)),
    ):
        found = dp.cheapest_path(costs, n, gamma)
        assert found in paths(8, n)
        assert cost_of(found, costs, gamma) == pytest.approx(
            min(cost_of(p, costs, gamma) for p in paths(8, n))
        )


def test_costs_are_distances_of_one_step() -> None:
    teacher = small_teacher()
    costs = dp.step_costs(teacher)
    assert np.isinf(costs[np.tril_indices(9)]).all()
    assert costs[7, 8] == pytest.approx(0, abs=1e-12)  # the teacher's own last step is one of DDIM
    student = sample(named("ddim", [teacher.nodes[0], teacher.nodes[5]]), DENOISER, starts())[-1]
    expected = (student - teacher.states[5]).norm(dim=1).mean()
    assert costs[0, 5] == pytest.approx(float(expected), rel=1e-12)  # alpha^2 + sigma^2 is 1 here
    still = dp.trajectory(teacher.nodes, lambda x, node: torch.full_like(x, 0.3), starts())
    assert dp.step_costs(still)[np.triu_indices(9, 1)] == pytest.approx(0, abs=1e-12)


def test_a_grid_does_not_depend_on_the_scaling_of_states() -> None:
    fine = nodes(VPLinear(), 30, "uniform_lambda")
    unscaled = [Node(alpha=1, sigma=node.sigma / node.alpha) for node in fine]
    costs = dp.step_costs(dp.trajectory(fine, DENOISER, starts()))
    others = dp.step_costs(dp.trajectory(unscaled, DENOISER, starts() / fine[0].alpha))
    upper = np.triu_indices(31, 1)
    np.testing.assert_allclose(others[upper], costs[upper], rtol=1e-6, atol=1e-9)


def naive_path(teacher: dp.Teacher, n: int, b: int) -> tuple[int, ...]:
    """OSS of one sample, as it reads."""
    last = len(teacher.nodes) - 1
    best = {0: (teacher.states[0][b : b + 1], (0,))}
    for k in range(1, n + 1):
        tried: dict[int, list[tuple[float, Tensor, tuple[int, ...]]]] = {}
        for i, (x, path) in best.items():
            data = DENOISER(x, teacher.nodes[i])
            for j in range(i + 1, last + 1):
                if j <= last - n + k and (j == last) == (k == n):
                    end = dp.step(x, data, teacher.nodes[i], teacher.nodes[j])
                    off = float((end - teacher.states[j][b]).norm())
                    tried.setdefault(j, []).append((off, end, (*path, j)))
        best = {j: min(rows, key=lambda row: row[0])[1:] for j, rows in tried.items()}
    return best[last][1]


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_each_sample_has_the_path_of_oss(n: int) -> None:
    teacher = small_teacher()
    found, evaluations = dp.student_paths(teacher, DENOISER, n)
    assert [tuple(row) for row in found.tolist()] == [naive_path(teacher, n, b) for b in range(16)]
    assert evaluations == (n - 1) * (8 - n + 1)


@pytest.mark.parametrize("together", [False, True])
def test_two_steps_of_oss_end_nearest_to_the_teacher(together: bool) -> None:
    teacher = small_teacher()
    ends = {}
    for path in paths(8, 2):
        schedule = named("ddim", [teacher.nodes[i] for i in path])
        off = sample(schedule, DENOISER, starts())[-1] - teacher.states[-1]
        ends[path] = off.norm(dim=1)
    found, _ = dp.student_paths(teacher, DENOISER, 2, together=together)
    if together:
        best = min(ends, key=lambda path: float(ends[path].mean()))
        assert {tuple(row) for row in found.tolist()} == {best}
    else:
        expected = [min(ends, key=lambda path: float(ends[path][b])) for b in range(16)]
        assert [tuple(row) for row in found.tolist()] == expected


@pytest.mark.parametrize("problem", ["gm16_vp_linear", "gm16_flow"])
@pytest.mark.parametrize("name", [*SEARCHES, "oss mean"])
@pytest.mark.parametrize("n", [4, 5, 6, 8])
def test_the_found_grid_beats_plain_ones_on_unseen_starts(problem: str, name: str, n: int) -> None:
    values, arrays = golden("search")
    noise = NoiseSchedule.from_dict(values["problems"][problem]["schedule"])
    x_T, exact = (arrays[key] for key in values["problems"][problem]["test"])
    options = {"vote": "mean"} if name == "oss mean" else {}
    found = SEARCHES[name.split()[0]](noise, DENOISER, starts(64), n, **options).nodes

    def error(grid: list[Node], solver: str, **extra: Any) -> float:
        end = sample(named(solver, grid, **extra), DENOISER, x_T)[-1]
        return float((end - exact).norm(dim=1).median())

    for plain in ("uniform_t", "uniform_lambda"):
        grid = nodes(noise, n, plain)
        assert error(found, "ddim") < error(grid, "ddim")  # what it is made for
        if n > 4:
            assert error(found, "dpmpp", order=2) < 0.9 * error(grid, "dpmpp", order=2)


@pytest.mark.parametrize("noise", [VPLinear(), Flow(), VE()], ids=lambda noise: noise.kind)
@pytest.mark.parametrize("name", SEARCHES)
def test_nodes_fall_from_end_to_end_at_the_stated_cost(name: str, noise: NoiseSchedule) -> None:
    calls = []

    def counting(x: Tensor, node: Node) -> Tensor:
        calls.append(len(x))
        return DENOISER(x, node)

    for n, end in ((1, "append"), (4, "append"), (4, "keep")):
        calls.clear()
        x_T = starts(8, float(noise.sigma(noise.t_start)))
        found = SEARCHES[name](noise, counting, x_T, n, teacher_steps=20, end=end)
        assert calls == [8] * found.evaluations
        assert found.evaluations == (20 if name == "gits" else 20 + (n - 1) * (20 - n + 1))
        sigma = [node.sigma for node in found.nodes]
        assert len(sigma) == n + 1
        assert all(a > b for a, b in itertools.pairwise(sigma))
        assert found.nodes[0].t == noise.t_start
        assert found.nodes[-1].t == (0 if end == "append" else pytest.approx(noise.t_end))
        assert (found.path[0], found.path[-1]) == (0, 20)
    assert (
        dp.gits(noise, DENOISER, x_T, 3, teacher_steps=12)
        == dp.search_gits(noise, DENOISER, x_T, 3, teacher_steps=12).nodes
    )
    assert len(dp.oss(noise, DENOISER, x_T, 3, teacher_steps=12)) == 4


@pytest.mark.parametrize(("space_end", "end"), [("zero", "append"), ("free", "keep")])
def test_times_are_seeds_of_a_search(space_end: Any, end: Any) -> None:
    space = SearchSpace(noise=VPLinear(), nfe=5, t_end=(1e-3, 0.2), end=space_end)
    found = dp.gits(VPLinear(), DENOISER, starts(), 5, end=end)
    times = dp.times(found)
    assert len(times) == space.num_times
    repaired = space.repair(times)
    assert repaired == pytest.approx(times, rel=1e-9)
    assert space.is_valid(Genes(times=repaired, steps=(StepGenes(order=2),) * 5))


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="evaluations are 9, allowed: 1 to 8, the steps of the teacher"):
        dp.gits(VPLinear(), DENOISER, starts(), 9, teacher_steps=8)
    with pytest.raises(ValueError, match="gamma is 0, allowed: above 0"):
        dp.gits(VPLinear(), DENOISER, starts(), 3, gamma=0)
    with pytest.raises(ValueError, match="vote is 'mode', allowed: median, mean"):
        dp.oss(VPLinear(), DENOISER, starts(), 3, vote="mode")
    with pytest.raises(ValueError, match=r"nodes \[1\] have no time"):
        dp.times([Node(alpha=0, sigma=1, t=1.0), Node(alpha=1, sigma=0.1)])
