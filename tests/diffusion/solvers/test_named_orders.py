"""Orders of convergence of the known solvers, and the recorded errors of the general one."""

import math
from typing import Any

import numpy as np
import pytest
from solver_runs import StepByStep, build, flow_nodes, golden, mixture, vp_nodes
from torch import Tensor

from thalweg.diffusion.solvers.named import NAMED, named
from thalweg.diffusion.solvers.sample import sample
from thalweg.diffusion.solvers.schedule import Node, Scale

GROUPS = golden("convergence")[0]["groups"]


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
    ("dpmpp_singlestep", (("order", 3), ("solver_type", "dpmsolver"))): 3,
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
