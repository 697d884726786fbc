"""Known solvers: equal to diffusers where it is right, to the papers where it is not, and of their order."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from solver_runs import build, flow_nodes, golden, mixture, vp_nodes
from torch import Tensor

from thalweg.diffusion.solvers.adams import step_orders
from thalweg.diffusion.solvers.classic import ADAMS, lagrange_means
from thalweg.diffusion.solvers.linear import LinearSchedule
from thalweg.diffusion.solvers.named import NAMED, named
from thalweg.diffusion.solvers.sample import sample
from thalweg.diffusion.solvers.schedule import Node, SolverSchedule
from thalweg.diffusion.solvers.singlestep import block_sizes

RUNS = {run["id"]: run for run in golden("baselines")[0]["runs"]}
DEFECT = "third_order_half_second_derivative"
HALVED = [key for key, run in RUNS.items() if DEFECT in run["known_defects"] and run["tolerance"] is None]


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
    first = Node(alpha=1e-6, sigma=1 - 1e-6) if (name, grid) == ("unipc", "flow") else GRIDS[grid][0]
    assert (solver.nodes[0], solver.nodes[-1]) == (first, GRIDS[grid][-1])
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
    tolerance = 2e-6 if name == "unipc" else 1e-15
    assert compiled.A_pred[1] == pytest.approx(7 / 8, abs=tolerance)
    assert compiled.C_pred[1, 0] == pytest.approx(1 / 8, abs=tolerance)


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


def test_the_second_stage_of_three_is_scaled_by_diffusers_and_not_by_the_paper() -> None:
    kinds = {
        solver_type: [
            step.derivatives[0].scale.kind if step.derivatives else ""
            for step in named("dpmpp_singlestep", vp_nodes(5), order=3, solver_type=solver_type).steps
        ]
        for solver_type in ("midpoint", "dpmsolver", "heun")
    }
    assert kinds["midpoint"] == ["", "bh2", "none", "", "bh2"]
    assert kinds["dpmsolver"] == ["", "none", "none", "", "bh2"]
    assert kinds["heun"] == ["", "none", "none", "", "none"]


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
