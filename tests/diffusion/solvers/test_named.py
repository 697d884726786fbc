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

from thalweg.diffusion.solvers.coefficients import Coefficients
from thalweg.diffusion.solvers.named import NAMED, named
from thalweg.diffusion.solvers.sample import sample
from thalweg.diffusion.solvers.schedule import Node, Scale, SolverSchedule

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


def build(name: str, nodes: list[Node], **options: Any) -> SolverSchedule | Coefficients:
    """A solver with what it needs beside its nodes."""
    if name == "pndm":
        options["middle"] = [vp_node((a.lam + b.lam) / 2) for a, b in pairwise(nodes[:4])]
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


def solver_of(run: dict[str, Any], **more: Any) -> SolverSchedule | Coefficients:
    nodes = [Node(**values) for values in run["nodes"]]
    if run["scheduler"] == "PNDMScheduler":  # node 1 is listed twice
        nodes = nodes[:1] + nodes[2:]
    name, options = SCHEDULERS[run["scheduler"]](run["config"])
    return named(name, nodes, **options, **more)


def states_of(run: dict[str, Any], solver: SolverSchedule | Coefficients) -> Tensor:
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
