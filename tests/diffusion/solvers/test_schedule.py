"""Solver schedules: recorded coefficients, invariants, exactness on polynomials, JSON, bad input."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden import golden_files
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from thalweg.diffusion.solvers.phi import phi
from thalweg.diffusion.solvers.sample import sample
from thalweg.diffusion.solvers.schedule import (
    Corrector,
    Derivative,
    Node,
    Scale,
    SolverSchedule,
    Step,
    multistep,
)

GOLDEN = golden_files("s3", "usf_cases*.json")
CASES = [(path, case) for path in GOLDEN for case in json.loads(path.read_text())["cases"]]
ARRAYS = {path: load_file(path.with_suffix(".safetensors")) for path in GOLDEN}


def golden_schedule(case: dict[str, Any]) -> SolverSchedule:
    return SolverSchedule.from_dict({k: case[k] for k in ("nodes", "steps", "v3", "nfe") if k in case})


def vp_node(lam: float) -> Node:
    return Node(alpha=1 / math.sqrt(1 + math.exp(-2 * lam)), sigma=1 / math.sqrt(1 + math.exp(2 * lam)))


@pytest.mark.parametrize(("path", "case"), CASES, ids=[case["id"] for _, case in CASES])
def test_coefficients_equal_the_recorded_ones(path: Path, case: dict[str, Any]) -> None:
    compiled = golden_schedule(case).compile()
    for name in ("A", "C", "A_pred", "C_pred"):
        recorded = ARRAYS[path][f"{case['tensors_prefix']}.{name}"]
        np.testing.assert_allclose(getattr(compiled, name), recorded, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("path", "case"), CASES, ids=[case["id"] for _, case in CASES])
def test_states_equal_those_of_the_reference_sampler(path: Path, case: dict[str, Any]) -> None:
    arrays, prefix = ARRAYS[path], case["tensors_prefix"]
    schedule = golden_schedule(case)
    recorded = {id(node): torch.tensor(x) for node, x in zip(schedule.nodes, arrays[f"{prefix}.x0hat"])}
    states = sample(schedule, lambda _, node: recorded[id(node)], torch.tensor(arrays[f"{prefix}.x_T"]))
    truth = torch.tensor(arrays[f"{prefix}.states_predicted"])
    difference = (torch.stack(states) - truth).abs() / truth.abs().clamp_min(1)
    assert difference.max() < max(10 * case["tolerance"], 1e-11)


@pytest.mark.parametrize(("path", "case"), CASES, ids=[case["id"] for _, case in CASES])
def test_json_holds_everything(path: Path, case: dict[str, Any], tmp_path: Path) -> None:
    schedule = golden_schedule(case)
    schedule.save(tmp_path / "schedule.json")
    assert SolverSchedule.load(tmp_path / "schedule.json") == schedule
    assert SolverSchedule.from_dict(schedule.to_dict()) == schedule


@st.composite
def schedules(draw: st.DrawFn) -> SolverSchedule:
    """Noise and data prediction mixed, low orders, scalings, correctors, stages of singlestep methods."""
    count = draw(st.integers(1, 7))
    lam = np.cumsum([-4.0, *draw(st.lists(st.floats(0.1, 2), min_size=count, max_size=count))])
    nodes = tuple(vp_node(value) for value in lam)
    return SolverSchedule(nodes=nodes, steps=tuple(draw(steps(i, count)) for i in range(count)))


@st.composite
def steps(draw: st.DrawFn, i: int, count: int) -> Step:
    start = draw(st.integers(max(0, i - 2), i))

    def estimates(order: int, allowed: list[int]) -> tuple[Derivative, ...]:
        found = []
        for k in range(1, order):
            size = draw(st.integers(k, min(len(allowed), 3)))
            active = tuple(draw(st.permutations(allowed))[:size])
            kind = draw(st.sampled_from(["none", "linear", "bh1", "bh2", "exp"])) if k == 1 else "none"
            found.append(Derivative(k=k, nodes=active, scale=Scale(kind=kind, c=draw(st.floats(-0.5, 0.5)))))
        return tuple(found)

    others = [p for p in range(i + 1) if p != start]
    order = draw(st.integers(1, min(len(others) + 1, 4)))
    corrector = None
    if i < count - 1 and draw(st.booleans()):
        again = draw(st.integers(1, min(len(others) + 2, 4)))
        corrector = Corrector(order=again, derivatives=estimates(again, [*others, i + 1]))
    prediction = draw(st.sampled_from(["noise", "data"]))
    derivatives = estimates(order, others)
    return Step(start=start, prediction=prediction, order=order, derivatives=derivatives, corrector=corrector)


@settings(max_examples=150, deadline=None)
@given(schedules())
def test_pure_noise_and_pure_data_stay_what_they_are(schedule: SolverSchedule) -> None:
    """A_i = sigma_i / sigma_0 and sum_j C_ij = alpha_i - alpha_0 sigma_i / sigma_0 for all decisions."""
    compiled = schedule.compile()
    alpha, sigma = np.array([(node.alpha, node.sigma) for node in schedule.nodes]).T
    for factor, weights in ((compiled.A, compiled.C), (compiled.A_pred, compiled.C_pred)):
        size = np.abs(weights).sum(1).max() + 1
        np.testing.assert_allclose(factor, sigma / sigma[0], rtol=1e-9, atol=1e-12 * size)
        np.testing.assert_allclose(
            weights.sum(1), alpha - alpha[0] * sigma / sigma[0], rtol=0, atol=1e-11 * size
        )
        assert (np.triu(weights, 1 if factor is compiled.A else 0) == 0).all()


@settings(max_examples=50, deadline=None)
@given(schedules())
def test_step_form_and_closed_form_are_one_sampler(schedule: SolverSchedule) -> None:
    compiled = schedule.compile()
    ratio, weights = compiled.steps()
    factor, row = 1.0, np.zeros(len(schedule.steps))
    for i in range(len(schedule.steps)):
        factor, row = ratio[i] * factor, ratio[i] * row + weights[i]
        np.testing.assert_allclose(factor, compiled.A_pred[i + 1], rtol=1e-12)
        scale = 1 + np.abs(compiled.C_pred).max()
        np.testing.assert_allclose(row, compiled.C_pred[i + 1], rtol=0, atol=1e-11 * scale)


@pytest.mark.parametrize("prediction", ["noise", "data"])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_order_n_is_exact_for_polynomials_of_degree_n_minus_1(prediction: str, order: int) -> None:
    """With a prediction that is a polynomial in lambda and does not depend on the state."""
    lam = np.array([-1.0, -0.6, -0.1, 0.7, 1.1, 2.0])
    nodes = tuple(vp_node(value) for value in lam)
    path = np.polynomial.Polynomial(np.arange(1.0, order + 1))
    orders = [min(order, i + 1) for i in range(len(nodes) - 1)]
    steps = tuple(
        Step(start=i, prediction=prediction, order=n, derivatives=multistep(n, i))
        for i, n in enumerate(orders)
    )

    def denoise(x: torch.Tensor, node: Node) -> torch.Tensor:
        value = float(path(node.lam))
        return torch.full_like(x, value) if prediction == "data" else (x - node.sigma * value) / node.alpha

    start = torch.tensor([0.3], dtype=torch.float64)
    states = sample(SolverSchedule(nodes=nodes, steps=steps), denoise, start)
    for i in range(order - 1, len(steps)):
        truth = exact(path, lam[i], lam[i + 1], states[i].item(), prediction)
        assert states[i + 1].item() == pytest.approx(truth, abs=1e-11)


def exact(path: np.polynomial.Polynomial, lam_s: float, lam_t: float, x: float, prediction: str) -> float:
    """Solution at lam_t from x at lam_s by quadrature of the variation of constants."""
    points, weights = np.polynomial.legendre.leggauss(40)
    grid, weights = lam_s + (points + 1) / 2 * (lam_t - lam_s), weights / 2 * (lam_t - lam_s)
    start, end = vp_node(lam_s), vp_node(lam_t)
    if prediction == "data":
        return float(end.sigma / start.sigma * x + end.sigma * (weights * np.exp(grid) * path(grid)).sum())
    return float(end.alpha / start.alpha * x - end.alpha * (weights * np.exp(-grid) * path(grid)).sum())


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("z", [-30.0, -1.5, -0.999, -1e-3, 0.0, 1e-9, 0.4, 1.001, 5.0])
def test_phi_equals_its_integral(k: int, z: float) -> None:
    points, weights = np.polynomial.legendre.leggauss(60)
    tau = (points + 1) / 2
    integral = (weights / 2 * np.exp((1 - tau) * z) * tau ** (k - 1) / math.factorial(k - 1)).sum()
    assert phi(k, z) == pytest.approx(integral, rel=2e-13)


def test_velocity_of_first_order_is_ddim_on_a_flow() -> None:
    nodes = tuple(Node(alpha=1 - t, sigma=t) for t in (1.0, 0.7, 0.2, 0.0))
    flows, datas = (
        SolverSchedule(
            nodes=nodes, steps=tuple(Step(start=i, prediction=p, order=1) for i in range(3))
        ).compile()
        for p in ("velocity", "data")
    )
    np.testing.assert_allclose(flows.C, datas.C, atol=1e-15)
    np.testing.assert_allclose(flows.A, datas.A, atol=1e-15)


def test_a_first_step_without_the_network_costs_nothing() -> None:
    _, case = CASES[0]
    schedule = SolverSchedule.from_dict({"nodes": case["nodes"], "steps": case["steps"], "first": "zero"})
    assert schedule.nfe == case["nfe"] - 1
    seen = []
    sample(schedule, lambda x, node: seen.append(node) or x, torch.zeros(1))
    assert len(seen) == schedule.nfe
    assert SolverSchedule.from_dict(schedule.to_dict()) == schedule


def edited(path: tuple[Any, ...], value: object) -> dict[str, Any]:
    values = copy.deepcopy({key: CASES[0][1][key] for key in ("nodes", "steps")})
    place: Any = values
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return values


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("nodes", 2, "sigma"), 5.0, r"node 2: noise must fall"),
        (("nodes", 1, "alpha"), float("nan"), r"node 1: alpha is nan, not a finite number"),
        (("nodes", 1, "alpha"), "0.2", r"node 1: alpha is '0.2', not a finite number"),
        (("nodes", 1), [1, 2], r"node 1 is \[1, 2\], not an object"),
        (("nodes",), [], r"4 steps need 5 nodes, found 0"),
        (("nfe",), 7, r"nfe is 7 but its steps evaluate the network 4 times"),
        (
            ("steps", 1, "prediction"),
            "score",
            r"step 1: prediction is 'score', allowed: noise, data, velocity, v3",
        ),
        (("steps", 1, "prediction"), "velocity", r"step 1: prediction velocity needs a rectified flow"),
        (("steps", 1, "prediction"), "v3", r"step 1: prediction v3 needs the schedule's v3 constants"),
        (("steps", 1, "order"), 3, r"step 1: order 3 needs derivatives k = \[1, 2\], found \[1\]"),
        (("steps", 1, "order"), 1.5, r"step 1: order is 1.5, not an integer"),
        (("steps", 1, "start"), 2, r"step 1: start is 2, allowed: 0 to 1"),
        (("steps", 1, "derivatives", 0, "nodes"), [2], r"step 1: derivative 1 uses nodes \[2\], allowed"),
        (("steps", 1, "derivatives", 0, "scale"), {"kind": "bh3"}, r"step 1: scale is 'bh3', allowed: none"),
        (("steps", 1, "derivatives", 0, "scale"), {"kind": "linear"}, r"scale has no entry 'c'"),
        (("steps", 1, "ordr"), 2, r"step 1: unknown entry 'ordr'; known: .*order"),
        (("steps", 3, "corrector"), {"order": 1}, r"step 3: a corrector of the last step"),
        (("first",), "guess", r"first is 'guess', allowed: network, zero, mean"),
    ],
)
def test_a_fault_is_named_with_its_place(path: tuple[Any, ...], value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SolverSchedule.from_dict(edited(path, value))


def test_a_file_that_is_no_schedule_is_named(tmp_path: Path) -> None:
    path = tmp_path / "schedule.json"
    path.write_text("__import__('os').abort()")
    with pytest.raises(ValueError, match=r"schedule\.json is not JSON"):
        SolverSchedule.load(path)
    path.write_text('{"nodes": []}')
    with pytest.raises(ValueError, match=r"schedule\.json: schedule has no entry 'steps'"):
        SolverSchedule.load(path)
