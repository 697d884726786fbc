"""Known solvers: equal to diffusers where it is right, to the papers where it is not, and of their order."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from solver_runs import StepByStep, golden, mixture
from torch import Tensor

from thalweg.diffusion.solvers.adams import step_orders
from thalweg.diffusion.solvers.classic import ADAMS, lagrange_means
from thalweg.diffusion.solvers.linear import LinearSchedule
from thalweg.diffusion.solvers.named import NAMED, named
from thalweg.diffusion.solvers.sample import sample
from thalweg.diffusion.solvers.schedule import Node, Scale, SolverSchedule
from thalweg.diffusion.solvers.singlestep import block_sizes

RUNS = {run["id"]: run for run in golden("baselines")[0]["runs"]}
DEFECT = "third_order_half_second_derivative"
HALVED = [key for key, run in RUNS.items() if DEFECT in run["known_defects"] and run["tolerance"] is None]
GROUPS = golden("convergence")[0]["groups"]


def vp_node(lam: float) -> Node:
    return Node(alpha=1 / math.sqrt(1 + math.exp(-2 * lam)), sigma=1 / math.sqrt(1 + math.exp(2 * lam)))


def vp_nodes(count: int, start: float = -4, end: float = 3, *, zero: bool = False) -> list[Node]:
    nodes = [vp_node(lam) for lam in np.linspace(start, end, count + 1).tolist()]
    return [*nodes[:-1], Node(alpha=1, sigma=0)] if zero else nodes


def flow_nodes(count: int, start: float = 1.0, end: float = 0.0) -> list[Node]:
    return [Node(alpha=1 - t, sigma=t) for t in np.linspace(start, end, count + 1).tolist()]


def build(name: str, nodes: list[Node], **options: Any) -> SolverSchedule | LinearSchedule:
    """A solver with what it needs beside its nodes."""
    if name == "pndm":
        pairs = pairwise(nodes[:4])
        options["middle"] = [
            Node(alpha=(a.alpha + b.alpha) / 2, sigma=(a.sigma + b.sigma) / 2) for a, b in pairs
        ]
    return named(name, nodes, **options)


# What diffusers calls its schedulers, as names and options.


def multistep_options(config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    name = "dpm" if config.get("algorithm_type") == "dpmsolver" else "dpmpp"
    return name, {"order": config["solver_order"], "solver_type": config.get("solver_type", "midpoint")}


def unipc_options(config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    prediction = "data" if config.get("predict_x0", True) else "noise"
    variant = config.get("solver_type", "bh2")
    return "unipc", {"order": config["solver_order"], "variant": variant, "prediction": prediction}


def singlestep_options(config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    name, options = multistep_options(config)
    return f"{name}_singlestep", {**options, "lower_order_final": config["lower_order_final"]}


SCHEDULERS: dict[str, Callable[[dict[str, Any]], tuple[str, dict[str, Any]]]] = {
    "DDIMScheduler": lambda _: ("ddim", {}),
    "EulerDiscreteScheduler": lambda _: ("euler", {}),
    "HeunDiscreteScheduler": lambda _: ("heun", {}),
    "DPMSolverMultistepScheduler": multistep_options,
    "DPMSolverSinglestepScheduler": singlestep_options,
    "UniPCMultistepScheduler": unipc_options,
    "DEISMultistepScheduler": lambda config: ("deis", {"order": config["solver_order"]}),
    "PNDMScheduler": lambda _: ("plms", {}),
    "FlowMatchEulerDiscreteScheduler": lambda _: ("flow_euler", {}),
}


def solver_of(run: dict[str, Any], **more: Any) -> SolverSchedule | LinearSchedule:
    nodes = [Node(**values) for values in run["nodes"]]
    if run["scheduler"] == "PNDMScheduler":  # node 1 is listed twice
        nodes = nodes[:1] + nodes[2:]
    name, options = SCHEDULERS[run["scheduler"]](run["config"])
    return named(name, nodes, **options, **more)


def states_of(run: dict[str, Any], solver: SolverSchedule | LinearSchedule) -> Tensor:
    """States on the golden mixture in the convention of the run."""
    nodes = solver.nodes
    x_T = golden("baselines")[1]["x_T"].double()
    if run["state_convention"] == "ve":
        x_T = x_T * run["init_noise_sigma"] * nodes[0].alpha
    states = torch.stack(sample(solver, mixture("gm16"), x_T))
    if run["state_convention"] == "ve":
        states = states / torch.tensor([node.alpha for node in nodes], dtype=torch.float64)[:, None, None]
    return states


def difference(states: Tensor, truth: Tensor) -> float:
    """Largest difference, relative to the largest state or 1."""
    finite = truth.isfinite().flatten(1).all(1)
    return float((states - truth)[finite].abs().max() / truth[finite].abs().max().clamp_min(1))


@pytest.mark.parametrize("key", [key for key, run in RUNS.items() if run["correct_steps"] is not None])
def test_schedules_are_the_recorded_ones(key: str) -> None:
    run, solver = RUNS[key], solver_of(RUNS[key])
    recorded = SolverSchedule.from_dict({"nodes": run["nodes"], "steps": run["correct_steps"]})
    if solver.info["solver"] == "flow_euler":  # velocity instead of data: the same coefficients
        ours, theirs = solver.compile(), recorded.compile()
        np.testing.assert_allclose(ours.A, theirs.A, rtol=0, atol=1e-14)
        np.testing.assert_allclose(ours.C, theirs.C, rtol=0, atol=1e-14)
    else:
        assert solver.steps == recorded.steps


@pytest.mark.parametrize("key", RUNS)
def test_states_are_those_of_the_method_and_of_the_library(key: str) -> None:
    run, arrays = RUNS[key], golden("baselines")[1]
    solver = solver_of(run)
    states = states_of(run, solver)
    assert solver.nfe == run["model_calls"]
    assert difference(states, arrays[f"{key}.correct_states"]) < 1e-10
    if run["tolerance"] is not None:
        assert difference(states, arrays[f"{key}.states"].double()) < run["tolerance"]


@pytest.mark.parametrize("key", HALVED)
def test_compatibility_reproduces_the_half_second_derivative(key: str) -> None:
    run, truth = RUNS[key], golden("baselines")[1][f"{key}.states"].double()
    assert difference(states_of(run, solver_of(run, compat="diffusers")), truth) < 2e-5
    assert difference(states_of(run, solver_of(run)), truth) > 2e-4


# Convergence


def convergence_method(key: str) -> tuple[dict[str, Any], float]:
    """Options of the general method, and the factor of the second derivative."""
    prediction, order, *words = key.split(".")
    options: dict[str, Any] = {"prediction": prediction, "order": int(order.removeprefix("order"))}
    text = ".".join(words)
    scales = {
        "scale_bh1": Scale(kind="bh1"),
        "scale_bh2": Scale(kind="bh2"),
        "scale_exp+": Scale(kind="exp", c=0.5),
        "scale_exp-": Scale(kind="exp", c=-0.5),
        "scale_linear0.3": Scale(kind="linear", c=0.3),
    }
    if scale := [scale for name, scale in scales.items() if text.startswith(name)]:
        options["scale"] = scale[0]
    options |= {"corrector": True} if "corrector" in words else {}
    options |= {"low_order": True} if "low_order_first_derivative" in words else {}
    return options, 0.5 if "half_second_derivative" in words else 1.0


def convergence_nodes(grid: str, n: int) -> list[Node]:
    if grid.startswith("flow"):
        return flow_nodes(n, 0.85, 0.05)
    arrays = golden("convergence")[1]
    pairs = zip(arrays[f"{grid}.N{n}.alpha"].tolist(), arrays[f"{grid}.N{n}.sigma"].tolist())
    return [Node(alpha=alpha, sigma=sigma) for alpha, sigma in pairs]


def error(result: Tensor, grid: str) -> float:
    end = golden("convergence")[1][f"{grid.split()[0]}.exact_end"]
    return float((result - end).square().mean().sqrt())


@pytest.mark.parametrize("key", GROUPS)
def test_errors_and_orders_are_the_recorded_ones(key: str) -> None:
    group = GROUPS[key]
    grid = group["grid"]
    options, second = convergence_method(key)
    errors = []
    for n in golden("convergence")[0]["N"]:
        exact = golden("convergence")[1][f"{grid.split()[0]}.N{n}.exact_first5"][: group["exact_start_nodes"]]
        schedule = named("adams", convergence_nodes(grid, n), **options)
        errors.append(error(StepByStep(schedule, mixture("gm16s"), second).run(exact), grid))
    np.testing.assert_allclose(errors, group["rms_error"], rtol=1e-6, atol=1e-12)
    assert abs(math.log2(errors[-2] / errors[-1]) - group["expected_slope"]) <= group["slope_tolerance"]


ORDERS: dict[tuple[str, tuple[tuple[str, Any], ...]], float] = {
    ("ddim", ()): 1,
    ("euler", ()): 1,
    ("dpm", (("order", 1),)): 1,
    ("dpm", ()): 2,
    ("dpmpp", ()): 2,
    ("dpmpp", (("solver_type", "heun"),)): 2,
    ("dpm_singlestep", ()): 2,
    ("dpm_singlestep", (("order", 3), ("solver_type", "heun"))): 3,
    ("dpmpp_singlestep", ()): 2,
    ("dpmpp_singlestep", (("order", 3),)): 3,
    ("deis", (("order", 2),)): 2,
    ("deis", ()): 2,
    ("unip", ()): 2,
    ("unipc", ()): 3,
    ("unipc", (("order", 1),)): 2,
    ("unipc", (("variant", "vary"), ("prediction", "noise"))): 3,
    ("adams", ()): 2,
    ("adams", (("corrector", True), ("prediction", "noise"))): 3,
    ("flow_euler", ()): 1,
    ("flow_adams", ()): 2,
    ("flow_singlestep", ()): 2,
    ("flow_singlestep", (("order", 3),)): 3,
    ("heun", ()): 2,
    ("flow_heun", ()): 2,
    ("lms", ()): 2,
    ("ipndm", ()): 2,
    ("plms", ()): 2,
    ("pndm", ()): 2,
}
"""Measured on nodes uniform in lambda (in t for flows); starts on lower orders cap multistep methods at 2."""


def test_every_solver_has_its_order_tested() -> None:
    assert {name for name, _ in ORDERS} == set(NAMED)


@pytest.mark.parametrize(("name", "options"), ORDERS, ids=lambda v: str(v) if v else "plain")
def test_solvers_have_their_order(name: str, options: tuple[tuple[str, Any], ...]) -> None:
    given = dict(options)
    if "lower_order_final" in NAMED[name].options:
        given["lower_order_final"] = False
    grid = "flow" if NAMED[name].flow else "uniform"
    start = golden("convergence")[1][f"{grid}.N8.exact_first5"][0]
    errors = []
    for n in (96, 192):  # whole blocks of two and of three
        nodes = flow_nodes(n, 0.85, 0.05) if NAMED[name].flow else vp_nodes(n, -1.5, 3)
        errors.append(error(sample(build(name, nodes, **given), mixture("gm16s"), start)[-1], grid))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(ORDERS[name, options], abs=0.2)


# What holds for every solver

GRIDS: dict[str, list[Node]] = {
    "data to the end": vp_nodes(8, zero=True),
    "noise at the end": vp_nodes(8),
    "many steps": vp_nodes(20, zero=True),
    "edm": [Node(alpha=1, sigma=rho) for rho in np.geomspace(80, 0.002, 9).tolist()],
    "flow": flow_nodes(8),
    "flow from alpha > 0": flow_nodes(8, 0.999, 0.01),
}
NEEDS_DATA = {"heun", "lms", "plms", "pndm"}
"""Solvers in rho = sigma / alpha, which is infinite at the start of a flow."""


def works_on(name: str, nodes: list[Node]) -> bool:
    flow = all(abs(node.alpha + node.sigma - 1) < 1e-9 for node in nodes)
    return (flow or not NAMED[name].flow) and not (name in NEEDS_DATA and nodes[0].alpha == 0)


CASES = [(name, grid) for name in NAMED for grid, nodes in GRIDS.items() if works_on(name, nodes)]


@pytest.mark.parametrize(("name", "grid"), CASES)
def test_every_solver_is_exact_for_constant_data_and_keeps_noise_in_proportion(name: str, grid: str) -> None:
    solver = build(name, GRIDS[grid])
    compiled, first = solver.compile(), solver.nodes[0]
    ratio = np.array([node.sigma for node in solver.nodes]) / first.sigma
    alpha = np.array([node.alpha for node in solver.nodes])
    assert np.array_equal(np.tril(compiled.C_pred, -1), compiled.C_pred)
    for a, c in ((compiled.A, compiled.C), (compiled.A_pred, compiled.C_pred)):
        np.testing.assert_allclose(a, ratio, rtol=0, atol=1e-12)
        np.testing.assert_allclose(c.sum(1), alpha - first.alpha * ratio, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("name", "grid"), CASES)
def test_every_solver_says_what_it_is(name: str, grid: str) -> None:
    solver = build(name, GRIDS[grid])
    assert isinstance(solver, SolverSchedule) == (NAMED[name].form == "schedule")
    assert solver.info["solver"] == name
    assert (solver.nodes[0], solver.nodes[-1]) == (GRIDS[grid][0], GRIDS[grid][-1])
    assert SolverSchedule.from_dict(solver.to_dict()) == solver
    if isinstance(solver, SolverSchedule):
        assert solver.nfe == len(GRIDS[grid]) - 1


@pytest.mark.parametrize(
    "name", [name for name in NAMED if NAMED[name].form == "schedule" and name[:4] != "flow"]
)
def test_steps_to_no_noise_are_data_predictions(name: str) -> None:
    last = named(name, vp_nodes(8, zero=True)).steps[-1]
    assert (last.start, last.prediction, last.order, last.corrector) == (7, "data", 1, None)


@pytest.mark.parametrize("name", [name for name in NAMED if works_on(name, flow_nodes(8))])
def test_solvers_begin_a_flow_with_its_first_prediction(name: str) -> None:
    compiled = named(name, flow_nodes(8)).compile()
    assert compiled.A_pred[1] == pytest.approx(7 / 8, abs=1e-15)
    assert compiled.C_pred[1, 0] == pytest.approx(1 / 8, abs=1e-15)


@pytest.mark.parametrize("name", ["heun", "flow_heun"])
def test_heun_takes_two_evaluations_a_step_but_the_last(name: str) -> None:
    flow = flow_nodes(5, 0.9, 0.0)
    assert named(name, flow).nfe == 9
    assert named(name, flow[:-1]).nfe == 8


def test_orders_rise_with_the_history_and_fall_at_the_end() -> None:
    assert step_orders(6, 3, lower_order_final=True) == [1, 2, 3, 3, 2, 1]
    assert step_orders(6, 3, lower_order_final=False) == [1, 2, 3, 3, 3, 3]
    assert step_orders(3, 3, lower_order_final=True) == [1, 2, 1]


def test_short_runs_of_dpm_solver_end_on_lower_orders_by_default() -> None:
    for name in ("dpm", "dpmpp", "deis"):
        assert [step.order for step in named(name, vp_nodes(14), order=3).steps[-2:]] == [2, 1]
        assert [step.order for step in named(name, vp_nodes(15), order=3).steps[-2:]] == [3, 3]


def test_blocks_are_cut_as_in_diffusers() -> None:
    assert block_sizes(9, 3, lower_order_final=True) == [3, 3, 2, 1]
    assert block_sizes(10, 3, lower_order_final=True) == [3, 3, 3, 1]
    assert block_sizes(8, 2, lower_order_final=True) == [2, 2, 2, 1, 1]
    assert block_sizes(9, 3, lower_order_final=False) == [3, 3, 3]
    assert block_sizes(4, 1, lower_order_final=True) == [1, 1, 1, 1]


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_linear_multistep_weights_are_those_of_adams_at_equal_distances(order: int) -> None:
    means = lagrange_means(-np.arange(order, dtype=float), 0.0, 1.0)
    np.testing.assert_allclose(means, ADAMS[order - 1], rtol=0, atol=1e-14)


def test_order_three_is_exact_for_quadratic_data_and_the_library_is_not() -> None:
    nodes = vp_nodes(6)
    data = np.array([1 + node.lam - node.lam**2 / 2 for node in nodes[:-1]])
    start, end = nodes[-2], nodes[-1]
    # x0 = 1 + l - l^2/2 in x' sigma / alpha: the exact step by quadrature.
    lam = np.linspace(start.lam, end.lam, 20001)
    integrand = np.exp(lam - end.lam) * (1 + lam - lam**2 / 2)
    exact = end.alpha * np.trapezoid(integrand, lam)
    weights = {
        compat: named("dpmpp", nodes, order=3, lower_order_final=False, compat=compat)
        .compile()
        .steps()[1][-1]
        for compat in (None, "diffusers")
    }
    assert weights[None] @ data == pytest.approx(exact, abs=1e-8)
    assert abs(weights["diffusers"] @ data - exact) > 1e-2


@pytest.mark.parametrize(
    ("name", "nodes", "options", "message"),
    [
        ("dpm3", vp_nodes(4), {}, "solver is 'dpm3', allowed: adams, ddim"),
        ("ddim", vp_nodes(4), {"order": 2}, "ddim has no option 'order'; allowed: none"),
        (
            "unipc",
            vp_nodes(4),
            {"compat": "diffusers"},
            "unipc has no option 'compat'; allowed: order, variant",
        ),
        ("dpmpp", vp_nodes(4), {"order": 4}, "order is 4, allowed: 1, 2, 3"),
        ("dpmpp", vp_nodes(4), {"solver_type": "bh1"}, "solver_type is 'bh1', allowed: midpoint, heun"),
        (
            "dpmpp",
            vp_nodes(4),
            {"compat": "k-diffusion"},
            "compat is 'k-diffusion', allowed: None, diffusers",
        ),
        ("adams", vp_nodes(4), {"order": True}, "order is True, allowed: 1, 2, 3, 4"),
        ("adams", vp_nodes(4), {"prediction": "v"}, "prediction is 'v', allowed: noise, data, velocity"),
        ("unipc", vp_nodes(4), {"variant": "bh3"}, "variant is 'bh3', allowed: bh1, bh2, vary"),
        ("heun", flow_nodes(4), {}, "heun works in rho = sigma / alpha, but alpha is 0 at node 0"),
        ("flow_heun", vp_nodes(4), {}, "needs a rectified flow"),
        ("flow_adams", vp_nodes(4), {}, "prediction velocity needs a rectified flow"),
        ("pndm", vp_nodes(6), {}, r"pndm needs 3 middle nodes .* found 0 and 7"),
        ("lms", vp_nodes(4)[::-1], {}, "noise must fall from node to node"),
        ("ddim", vp_nodes(4)[:1], {}, "a schedule needs at least one step"),
        ("dpmpp_singlestep", vp_nodes(4)[:1], {}, "a schedule needs two nodes or more, found 1"),
        ("ipndm", vp_nodes(4)[:1], {}, "ipndm needs two nodes or more, found 1"),
    ],
)
def test_what_cannot_be_is_refused(
    name: str, nodes: list[Node], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        named(name, nodes, **options)
