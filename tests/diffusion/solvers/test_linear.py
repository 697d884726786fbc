"""Schedules given by weights: checks, round trips, the scheduler, and the part from a later node on."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from thalweg.diffusion.schedules import Flow, VPDiscrete, VPLinear
from thalweg.diffusion.solvers.grids import nodes
from thalweg.diffusion.solvers.linear import LinearSchedule, totals
from thalweg.diffusion.solvers.named import named
from thalweg.diffusion.solvers.sample import sample
from thalweg.diffusion.solvers.schedule import Node, SolverSchedule
from thalweg.diffusion.solvers.scheduler import SearchedScheduler
from thalweg.diffusion.solvers.tail import from_node
from thalweg.diffusion.toy import GaussianMixture

VP = VPLinear()
SOLVERS = [("unipc", {"order": 3}), ("dpm", {"order": 3}), ("dpmpp_singlestep", {"order": 2}), ("heun", {})]
SOLVERS += [("ipndm", {"order": 4}), ("plms", {})]


def mixture(dim: int = 3) -> GaussianMixture:
    means = torch.linspace(-2, 2, 2 * dim, dtype=torch.float64).reshape(2, dim)
    return GaussianMixture([0.4, 0.6], means, 0.1 * torch.eye(dim, dtype=torch.float64).expand(2, dim, dim))


def data(x: torch.Tensor, node: Node) -> torch.Tensor:
    return mixture(x[0].numel()).data(x, node.alpha, node.sigma)


def known(name: str, options: dict[str, object], count: int = 6) -> LinearSchedule:
    return LinearSchedule.of(named(name, nodes(VP, count, "quadratic_t"), **options))


@pytest.mark.parametrize(("name", "options"), SOLVERS)
def test_any_known_solver_is_the_same_sampler_as_weights(name: str, options: dict[str, object]) -> None:
    original = named(name, nodes(VP, 6, "quadratic_t"), **options)
    found, expected = LinearSchedule.of(original).compile(), original.compile()
    np.testing.assert_allclose(found.A_pred, expected.A_pred, atol=1e-12)
    np.testing.assert_allclose(found.C_pred, expected.C_pred, atol=1e-11)


@pytest.mark.parametrize(("name", "options"), SOLVERS)
def test_json_gives_the_same_schedule(name: str, options: dict[str, object], tmp_path: Path) -> None:
    schedule = known(name, options)
    written = json.loads(json.dumps(schedule.to_dict(), allow_nan=False))
    assert LinearSchedule.from_dict(written) == schedule == SolverSchedule.from_dict(written)
    schedule.save(tmp_path / "s.json")
    assert LinearSchedule.load(tmp_path / "s.json") == schedule == SolverSchedule.load(tmp_path / "s.json")


def test_load_says_when_a_file_has_steps(tmp_path: Path) -> None:
    named("ddim", nodes(VP, 4, "uniform_t")).save(tmp_path / "s.json")  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"s\.json has steps in place of weights"):
        LinearSchedule.load(tmp_path / "s.json")


@pytest.mark.parametrize("noise", [VPDiscrete(), Flow(shift=3.0)])
def test_the_scheduler_gives_the_plain_samplers_result(noise: VPDiscrete | Flow, tmp_path: Path) -> None:
    kind = "flow_prediction" if noise.kind == "flow" else "sample"
    schedule = LinearSchedule.of(named("adams", nodes(noise, 6, "shift"), order=3, prediction="data"))
    SearchedScheduler.from_schedules([schedule], prediction_type=kind).save_pretrained(tmp_path)
    scheduler = SearchedScheduler.from_pretrained(tmp_path)
    scheduler.set_timesteps(6)
    x = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = sample(schedule, data, x)[-1]
    for label, node in zip(scheduler.timesteps, schedule.nodes):
        x0 = data(x, node)
        output = (x - node.alpha * x0) / node.sigma - x0 if kind == "flow_prediction" else x0
        x = scheduler.step(output, label, x).prev_sample
    torch.testing.assert_close(x, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("name", "options"), SOLVERS[:2])
def test_from_a_later_node_sums_stay_and_columns_go(name: str, options: dict[str, object]) -> None:
    schedule = known(name, options)
    rest = from_node(schedule, 2)
    assert rest.nfe == 4
    assert rest.nodes == schedule.nodes[2:]
    np.testing.assert_allclose([sum(row) for row in rest.weights], totals(rest.nodes), atol=1e-12)
    np.testing.assert_allclose(rest.weights[3][1:], schedule.weights[5][3:], rtol=0, atol=0)
    # A denoiser that always says the same reaches it from everywhere.
    x = torch.ones(1, 3, dtype=torch.float64)
    assert torch.allclose(sample(rest, lambda x, node: 0 * x + 0.7, x)[-1], 0.7 * x)


def test_faults_are_named() -> None:
    good = known("dpmpp", {"order": 2}, 4)
    cases = [
        ({"weights": (*good.weights[:3], (0.1, 0.2, 0.3, float("nan")))}, "step 3: weights are"),
        ({"weights": (*good.weights[:3], (1.0,))}, "step 3: 1 weights, needed: 4"),
        (
            {"weights": (*good.weights[:3], (0.0, 0.0, 0.0, 1.1))},
            r"step 3: weights sum to 1\.1, .* for 1",
        ),
        ({"weights": good.weights[:3]}, "3 rows of weights need 4 nodes, found 5"),
        ({"nodes": (good.nodes[0], *good.nodes[2:0:-1], *good.nodes[3:])}, "noise must fall"),
        ({"first": "none"}, "first is 'none', allowed: network, zero, mean"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            replace(good, **change)
    values = good.to_dict()
    for change, message in [
        ({"weights": [[0.1], "x"]}, "step 1: weights are 'x', not a list"),
        ({"weights": [["x"]]}, "step 0: weight 0 is 'x', not a finite number"),
        ({"nfe": 9}, "nfe is 9 but its steps evaluate the network 4 times"),
        ({"code": 1}, "unknown entry 'code'"),
    ]:
        with pytest.raises(ValueError, match=message):
            SolverSchedule.from_dict(values | change)
