"""Rollouts: golden paths and log-probabilities, and what the steps must do to distributions."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_nft import arrays, case_names, cases
from torch import Tensor

from thalweg.diffusion.nft.samplers import OdeSolver
from thalweg.diffusion.nft.stochastic import GaussianStep, Velocity, gaussian_step, rollout
from thalweg.diffusion.nft.timesteps import flow_match_sigmas
from thalweg.diffusion.order import generator
from thalweg.diffusion.solvers.sample import sample
from thalweg.diffusion.solvers.schedule import Node
from thalweg.diffusion.toy import GaussianMixture, exact_states

GOLDEN = cases("sampler")
ODE = [(path, case) for path, case in GOLDEN if case["deterministic"]]
SDE = [(path, case) for path, case in GOLDEN if not case["deterministic"]]
GIVEN = cases("sampler", "given_sample")
KINDS: tuple[Any, ...] = ("flow", "dance", "ddim")


def golden_velocity(path: Path, field: str) -> Velocity:
    """Velocity of a golden field."""
    table = {k.split(".")[2]: v for k, v in arrays(path).items() if k.startswith(f"field.{field}.")}
    if field == "linear":
        a, b, c, d = (table[name] for name in "ABcd")
        return lambda x, node: (x.flatten(1) @ (a + node.sigma * b).T + c + node.sigma * d).view_as(x)
    eye = torch.eye(table["means"].shape[1], dtype=torch.float64)
    covariances = table["stds"][:, None, None].square() * eye
    exact = GaussianMixture(table["weights"], table["means"], covariances)
    return lambda x, node: exact.velocity(x, node.alpha, node.sigma)


def ode_states(solver: OdeSolver, velocity: Velocity, sigmas: list[float], x_T: Tensor) -> list[Tensor]:
    return sample(solver.schedule(sigmas), lambda x, node: x - node.sigma * velocity(x, node), x_T)


@pytest.mark.parametrize(("path", "case"), ODE, ids=case_names(ODE))
def test_golden_paths_are_solver_schedules(path: Path, case: dict[str, Any]) -> None:
    """Among them dpm2 = DPM-Solver++(2M) on the injected grid."""
    sigmas = arrays(path)[f"sigmas.{case['sigmas']}"].tolist()
    solver = OdeSolver(name=case["solver"], legacy_dpm2=True)
    velocity = golden_velocity(path, case["field"])
    states = ode_states(solver, velocity, sigmas, arrays(path)["x_init"])
    expected = arrays(path)[f"case.{case['case']}.x"]
    torch.testing.assert_close(torch.stack(states[1:]), expected, rtol=1e-8, atol=1e-10)
    if case["solver"] in KINDS:
        plain = rollout(
            velocity, sigmas, states[0], solver=case["solver"], eta=0.0, noise=lambda i: torch.empty(0)
        )
        torch.testing.assert_close(torch.stack(plain.states[1:]), expected, rtol=1e-8, atol=1e-10)
        assert plain.log_probs_NB.isnan().all()
        assert plain.noisy == ()


@pytest.mark.parametrize(("path", "case"), SDE, ids=case_names(SDE))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden_rollouts_with_noise(path: Path, case: dict[str, Any], dtype: torch.dtype) -> None:
    table = {name: arrays(path)[f"case.{case['case']}.{name}"] for name in ("x", "noise", "log_prob")}
    sigmas = arrays(path)[f"sigmas.{case['sigmas']}"].tolist()
    exact = golden_velocity(path, case["field"])
    found = rollout(
        lambda x, node: exact(x.double(), node).to(dtype),
        sigmas,
        arrays(path)["x_init"].to(dtype),
        solver=case["solver"],
        eta=case["eta"],
        noise=lambda i: table["noise"][i],
    )
    rtol = 1e-8 if dtype == torch.float64 else 3e-5
    states = torch.stack(found.states[1:])
    assert states.dtype == dtype
    torch.testing.assert_close(states.double(), table["x"], rtol=rtol, atol=rtol / 10)
    assert found.noisy == tuple(i for i, defined in enumerate(case["log_prob_defined"]) if defined)
    log_probs = found.log_probs_NB.double()
    torch.testing.assert_close(log_probs, table["log_prob"], rtol=rtol, atol=rtol / 10, equal_nan=True)


@pytest.mark.parametrize(("path", "case"), GIVEN, ids=case_names(GIVEN))
def test_golden_log_probability_of_a_given_sample(path: Path, case: dict[str, Any]) -> None:
    table = {k.split(".")[2]: v for k, v in arrays(path).items() if k.startswith(f"given.{case['case']}.")}
    sigmas = arrays(path)[f"sigmas.{case['sigmas']}"].tolist()
    step = gaussian_step(case["solver"], sigmas, case["index"], case["eta"])
    for velocity, expected in (("v", "log_prob"), ("v_new", "log_prob_new")):
        found = step.log_prob(table["prev"], step.mean(table["x"], table[velocity]))
        torch.testing.assert_close(found, table[expected], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_log_probability_is_that_of_the_normal_distribution(kind: Any) -> None:
    stream = generator(4)
    x, v, prev = (torch.randn(3, 2, 5, generator=stream, dtype=torch.float64) for _ in range(3))
    step = gaussian_step(kind, flow_match_sigmas(10), 4, 0.6)
    mean = step.mean(x, v)
    expected = torch.distributions.Normal(mean, step.std).log_prob(prev).mean((1, 2))
    if kind == "dance":
        expected = expected + math.log(step.std) + 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(step.log_prob(prev, mean), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_noise_keeps_the_marginals(kind: Any, eta: float) -> None:
    """For data N(0, d^2) variances follow a recursion, which ends right but for an error of first order.

    From noise 0.95: the noise of Flow-GRPO's SDE is infinite at 1, where its order is lower.
    """
    d = 0.5

    def error(count: int) -> float:
        sigmas = [0.95 + (0.05 - 0.95) * i / count for i in range(count + 1)]
        variance = (1 - sigmas[0]) ** 2 * d**2 + sigmas[0] ** 2
        for i, sigma in enumerate(sigmas[:-1]):
            total = (1 - sigma) ** 2 * d**2 + sigma**2
            slope = (sigma - (1 - sigma) * d**2) / total  # E[noise - x0 | x] = slope x
            step = gaussian_step(kind, sigmas, i, eta)
            variance = (step.x + step.v * slope) ** 2 * variance + step.std**2
        return abs(variance - ((1 - sigmas[-1]) ** 2 * d**2 + sigmas[-1] ** 2))

    errors = [error(count) for count in (200, 400, 800)]
    assert errors[0] < 0.02
    assert math.log2(errors[1] / errors[2]) == pytest.approx(1.0, abs=0.1)


def test_window_of_noise() -> None:
    sigmas = flow_match_sigmas(6)
    asked: list[int] = []

    def noise(i: int) -> Tensor:
        asked.append(i)
        return torch.ones(2, 3)

    found = rollout(lambda x, node: 0.5 * x, sigmas, torch.ones(2, 3), noisy=(2, 3), noise=noise)
    assert asked == [2, 3]
    assert found.noisy == (2, 3)
    assert found.log_probs_NB.isnan().all(1).tolist() == [True, True, False, False, True, True]
    assert len(found.states) == 7


def test_half_precision_velocities_give_float32_states() -> None:
    found = rollout(
        lambda x, node: x.to(torch.bfloat16),
        flow_match_sigmas(3),
        torch.ones(2, 3, dtype=torch.bfloat16),
        noise=lambda i: torch.zeros(2, 3, dtype=torch.bfloat16),
    )
    assert {state.dtype for state in found.states} == {found.log_probs_NB.dtype} == {torch.float32}


def ring(std: float) -> GaussianMixture:
    angles = torch.arange(8, dtype=torch.float64) * math.pi / 4
    means = 1.5 * torch.stack([angles.cos(), angles.sin()], 1)
    return GaussianMixture(torch.ones(8), means, std**2 * torch.eye(2).expand(8, 2, 2))


def rms_errors(mixture: GaussianMixture, count: int, *solvers: OdeSolver) -> list[float]:
    """Distance of the ends of paths to those of the exact flow."""
    x_T = torch.randn(300, mixture.dim, generator=generator(5), dtype=torch.float64)
    exact = exact_states(mixture, x_T, [0.0, 1.0], [1.0, 0.0], rtol=1e-8, atol=1e-9)[-1]

    def velocity(x: Tensor, node: Node) -> Tensor:
        return mixture.velocity(x, node.alpha, node.sigma)

    sigmas = flow_match_sigmas(count)
    ends = [ode_states(solver, velocity, sigmas, x_T)[-1] for solver in solvers]
    return [(end - exact).square().mean().sqrt().item() for end in ends]


@pytest.mark.parametrize("std", [0.05, 0.1, 0.2, 0.35])
@pytest.mark.parametrize("count", [10, 25])
def test_first_order_tail_halves_the_error_of_few_steps(std: float, count: int) -> None:
    """At 40 steps it is no longer sure: on the narrow rings both are alike, within what 300 starts can tell.

    Euler's method is the worse one at 10 steps, but the better one at 25 steps on the narrow rings.
    """
    ours, legacy, euler = rms_errors(
        ring(std), count, OdeSolver(), OdeSolver(legacy_dpm2=True), OdeSolver(name="flow")
    )
    assert ours < 0.5 * legacy
    if count == 10:
        assert ours < euler < legacy


def test_tail_is_the_only_difference() -> None:
    sigmas = flow_match_sigmas(10)
    ours, legacy = (OdeSolver(legacy_dpm2=legacy).schedule(sigmas) for legacy in (False, True))
    assert [step.order for step in legacy.steps] == [1, *[2] * 8, 1]
    assert [step.order for step in ours.steps] == [1, *[2] * 7, 1, 1]
    assert ours.steps[:8] == legacy.steps[:8]
    one = OdeSolver(final_first_order_steps=1).schedule(sigmas)
    assert one.steps == legacy.steps
    whole = OdeSolver(whole_timesteps=True).schedule(sigmas).nodes
    assert [node.label for node in whole[:-1]] == [1000, 960, 913, 857, 790, 707, 602, 464, 278, 8]


def test_second_step_from_pure_noise_is_of_first_order() -> None:
    """At noise 1 lambda is -infinity, so that the difference of predictions has no weight."""
    sigmas = flow_match_sigmas(4)
    compiled = OdeSolver(legacy_dpm2=True).schedule(sigmas).compile().steps()[1]
    assert compiled[1, 0] == 0
    assert np.count_nonzero(compiled[2, :3]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("euler", [1.0, 0.0], 0, 0.7), "solver is 'euler', allowed: flow, dance, ddim"),
        (("flow", [1.0, 0.5, 0.0], 2, 0.7), "step is 2, allowed: 0 to 1"),
        (("flow", [1.0, 0.5, 0.0], 0, -0.1), r"eta is -0\.1, allowed: 0 and more"),
        (("ddim", [1.0, 0.5, 0.0], 0, 1.1), r"eta is 1\.1, allowed: 0 to 1"),
        (("flow", [0.5, 0.5, 0.0], 0, 0.7), r"step 0 goes from noise 0\.5 to 0\.5"),
    ],
)
def test_wrong_steps(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gaussian_step(*arguments)


def test_wrong_solvers() -> None:
    with pytest.raises(ValueError, match="solver is 'dpm3', allowed: dpm1, dpm2, flow"):
        OdeSolver(name="dpm3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="final_first_order_steps is -1"):
        OdeSolver(final_first_order_steps=-1)
    with pytest.raises(ValueError, match="is 3, but legacy_dpm2 means 1"):
        OdeSolver(final_first_order_steps=3, legacy_dpm2=True)
    with pytest.raises(ValueError, match="without noise has no log-probability"):
        GaussianStep(x=1.0, v=-0.1, std=0.0).log_prob(torch.ones(2, 3), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"noisy has the steps \[7\], allowed: 0 to 2"):
        rollout(lambda x, node: x, flow_match_sigmas(3), torch.ones(2, 3), noisy=[7], noise=torch.empty)
