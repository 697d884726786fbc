"""Grids of nodes: golden grids, formulas, what stands at both ends, published tables and the DMN bound."""

import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden import golden_files
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from scipy.integrate import quad

from thalweg.diffusion.schedules import SCHEDULES, VE, Flow, NoiseSchedule, VPDiscrete, VPLinear
from thalweg.diffusion.solvers.dmn import error_bound, step_weights
from thalweg.diffusion.solvers.grids import AYS_LABELS, GRIDS, nodes
from thalweg.diffusion.solvers.schedule import Node
from thalweg.diffusion.toy import GaussianMixture

(TOY,) = golden_files("s3", "toy.json")
(CASES,) = golden_files("s3", "usf_cases.json")
PROBLEMS = json.loads(Path(TOY).read_text())["problems"]
SOURCE_GRIDS: dict[str, tuple[str, dict[str, float]]] = {
    "time_uniform": ("uniform_t", {}),
    "time_quadratic": ("quadratic_t", {}),
    "reverse_time_quadratic": ("reverse_t", {}),
    "reverse_1.5": ("reverse_t", {"power": 1.5}),
    "logSNR": ("uniform_lambda", {}),
}
NAMED_CASES = [c for c in json.loads(Path(CASES).read_text())["cases"] if c["grid"] in SOURCE_GRIDS]
SEARCHES = golden_files("s3", "search.json")
SEARCH_GRIDS = {"karras7": "karras", "shift3": "shift"}
SEARCH_ENDS = {"t_end": "append", "dropped": "replace"}


def options(name: str, schedule: NoiseSchedule) -> dict[str, Any]:
    """Options under which a grid serves a schedule."""
    return {"stretch": True} if name == "ays" and schedule.kind != "vp_discrete" else {}


def bound(lam: np.ndarray, order: int, error: Any) -> float:
    """Bound of the DMN grid."""
    return error_bound(torch.from_numpy(lam), order, error).item()


def lambdas(found: list[Node]) -> np.ndarray:
    """Lambda of nodes."""
    return np.array([node.lam for node in found])


@pytest.mark.parametrize("case", NAMED_CASES, ids=[c["id"] for c in NAMED_CASES])
def test_golden_grids(case: dict[str, Any]) -> None:
    schedule = NoiseSchedule.from_dict(PROBLEMS[case["problem"]]["schedule"])
    expected = case["nodes"]
    name, extra = SOURCE_GRIDS[case["grid"]]
    ends = {"t_start": expected[0]["t"], "t_end": expected[-1]["t"]}
    found = nodes(schedule, len(expected) - 1, name, **ends, end="keep", **extra)
    for node, golden in zip(found, expected, strict=True):
        assert node.t == pytest.approx(golden["t"], rel=1e-10)
        assert node.alpha == pytest.approx(golden["alpha"], rel=1e-10)
        assert node.sigma == pytest.approx(golden["sigma"], rel=1e-10)


def ddim(gm: GaussianMixture, x: torch.Tensor, found: list[Node]) -> torch.Tensor:
    """Result of first order steps."""
    for node, after in itertools.pairwise(found):
        ratio = after.sigma / node.sigma
        x = ratio * x + (after.alpha - ratio * node.alpha) * gm.data(x, node.alpha, node.sigma)
    return x


@pytest.mark.slow
@pytest.mark.skipif(not SEARCHES, reason="set THALWEG_ORACLES to a folder with s3/search.json")
@pytest.mark.parametrize("name", ["gm16_vp_linear", "gm16_flow"])
def test_golden_medians_of_ddim_on_every_grid(name: str) -> None:
    problem = json.loads(Path(SEARCHES[0]).read_text())["problems"][name]
    arrays = {**load_file(Path(SEARCHES[0]).with_suffix(".safetensors"))}
    toy = load_file(Path(TOY).with_suffix(".safetensors"))
    gm = GaussianMixture(*(toy[f"mix.gm16.{key}"] for key in ("weights", "means", "covariances")))
    schedule = NoiseSchedule.from_dict(problem["schedule"])
    x_T, exact = (arrays[key] for key in problem["test"])
    for nfe, entry in problem["nfe"].items():
        for row in entry["table"]:
            found = nodes(
                schedule,
                int(nfe),
                SEARCH_GRIDS.get(row["grid"], row["grid"]),
                t_end=None if row["t_end"] == schedule.t_end else row["t_end"],
                end=SEARCH_ENDS[row["last_node"]],  # type: ignore[arg-type]
            )
            errors = torch.linalg.vector_norm(ddim(gm, x_T, found) - exact, dim=1)
            assert np.median(errors.numpy()) == pytest.approx(row["median"]["ddim"], rel=1e-4)


# A time shift needs times of at most one.
PAIRS = [(kind, name) for kind in SCHEDULES for name in GRIDS if name != "shift" or kind not in ("ve", "edm")]


@pytest.mark.parametrize(("kind", "name"), PAIRS)
@pytest.mark.parametrize("end", ["append", "replace", "keep"])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_every_grid_on_every_schedule(kind: str, name: str, end: Any, n: int) -> None:
    schedule = SCHEDULES[kind]()
    found = nodes(schedule, n, name, end=end, **options(name, schedule))
    assert len(found) == n + 1
    assert found[0].t == schedule.t_start
    assert all(a.lam < b.lam for a, b in itertools.pairwise(found))
    for node in found[: n + (end == "keep")]:
        assert node.label == float(schedule.label(node.t))
        assert (node.alpha, node.sigma) == (float(schedule.alpha(node.t)), float(schedule.sigma(node.t)))
    if end == "keep":
        assert found[-1].t == schedule.t_end
    else:
        assert (found[-1].alpha, found[-1].sigma, found[-1].t) == (1.0, 0.0, 0.0)
    if end == "append" and n > 1:
        assert found[-2].t == schedule.t_end


@pytest.mark.parametrize("kind", SCHEDULES)
def test_what_is_even_in_each_grid(kind: str) -> None:
    schedule = SCHEDULES[kind](**({"t_start": 0.99} if kind == "flow" else {}))

    def spread(name: str, of: Any, **extra: Any) -> float:
        steps = np.diff([of(node) for node in nodes(schedule, 6, name, end="keep", **extra)])
        return float(np.ptp(steps) / np.abs(steps).mean())

    assert spread("uniform_t", lambda node: node.t) < 1e-9
    assert spread("quadratic_t", lambda node: math.sqrt(node.t)) < 1e-9
    assert spread("quadratic_t", lambda node: node.t ** (1 / 3), power=3.0) < 1e-9
    assert spread("uniform_lambda", lambda node: node.lam) < 1e-8
    assert spread("karras", lambda node: (node.sigma / node.alpha) ** (1 / 7)) < 1e-8
    assert spread("karras", lambda node: (node.sigma / node.alpha) ** (1 / 5), rho=5.0) < 1e-8


@given(shift=st.floats(0.2, 8.0), n=st.integers(2, 12))
def test_the_shift_grid_is_the_even_grid_of_a_shifted_flow(shift: float, n: int) -> None:
    by_grid = nodes(Flow(), n, "shift", shift=shift, end="replace")
    by_schedule = nodes(Flow(shift=shift), n, "uniform_t", end="replace")
    for a, b in zip(by_grid, by_schedule):
        assert a.sigma == pytest.approx(b.sigma, abs=1e-12)
        assert a.label is None or a.label == pytest.approx(b.label, abs=1e-9)


@pytest.mark.parametrize("name", ["uniform_lambda", "karras", "dmn"])
def test_grids_in_lambda_start_a_flow_at_pure_noise(name: str) -> None:
    found = nodes(Flow(), 4, name, end="append")
    assert (found[0].alpha, found[0].sigma, found[0].lam, found[0].label) == (0.0, 1.0, -math.inf, 1000.0)
    later = nodes(Flow(), 4, name, t_start=0.999, end="append")
    assert found[1:] == later[1:]


def test_only_flow_runs_even_times_to_the_data() -> None:
    assert [n.t for n in nodes(Flow(), 4, "uniform_t", end="replace")] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert nodes(Flow(), 4, "uniform_t", end="replace", t_end=0.2)[3].t == pytest.approx(0.4)
    assert nodes(VPLinear(t_end=0.2), 4, "uniform_t", end="replace")[3].t == pytest.approx(0.4)


def test_ays_is_the_published_table() -> None:
    from diffusers.schedulers import AysSchedules

    tables = {"sd15": "StableDiffusion", "sdxl": "StableDiffusionXL"}
    assert set(tables) == set(AYS_LABELS)
    for table, name in tables.items():
        found = nodes(VPDiscrete(), 10, "ays", table=table)
        assert [node.label for node in found[:-1]] == AysSchedules[f"{name}Timesteps"]
        ratio = [node.sigma / node.alpha for node in found]
        np.testing.assert_allclose(ratio, AysSchedules[f"{name}Sigmas"], rtol=0.02)  # labels are rounded


def test_ays_halves_its_steps_in_the_logarithm_of_sigma() -> None:
    coarse = lambdas(nodes(VPDiscrete(), 10, "ays", end="keep"))
    fine = lambdas(nodes(VPDiscrete(), 20, "ays", end="keep"))
    np.testing.assert_allclose(fine[::2], coarse, atol=1e-9)
    np.testing.assert_allclose(fine[1::2], (coarse[1:] + coarse[:-1]) / 2, atol=1e-9)


def test_ays_stretches_its_lambdas() -> None:
    made_for = lambdas(nodes(VPDiscrete(), 10, "ays", end="keep"))
    found = lambdas(nodes(VPLinear(), 10, "ays", end="keep", stretch=True))
    share, wanted = ((lam - lam[0]) / (lam[-1] - lam[0]) for lam in (found, made_for))
    np.testing.assert_allclose(share, wanted, atol=1e-9)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_step_weights_are_integrals_of_lagrange_polynomials(order: int) -> None:
    lam = np.array([-2.0, -0.7, -0.2, 0.5, 1.1, 2.5])
    w = step_weights(torch.from_numpy(lam), order).numpy()
    np.testing.assert_allclose(w.sum(1), np.diff(np.exp(lam)), rtol=1e-12)
    used = [2 - k for k in range(order)]
    for k, j in enumerate(used):

        def integrand(y: float, j: int = j) -> float:
            factors = [(y - lam[m]) / (lam[j] - lam[m]) for m in used if m != j]
            return math.exp(y) * math.prod(factors)

        assert w[2, k] == pytest.approx(quad(integrand, lam[2], lam[3])[0], rel=1e-11)
    assert np.count_nonzero(w[0]) == np.count_nonzero(w[-1]) == 1


def test_the_bound_of_first_order_by_hand() -> None:
    lam = np.array([-1.0, 0.0, 1.0])
    ratio, alpha = np.exp(-lam[:2]), 1 / np.sqrt(1 + np.exp(-2 * lam[:2]))
    sigma = ratio * alpha
    rise = np.diff(np.exp(lam))
    assert bound(lam, 1, "pixel") == pytest.approx(float(rise @ (sigma / alpha)))
    assert bound(lam, 1, "latent") == pytest.approx(float(rise @ (sigma**2 / alpha)))


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("error", ["latent", "pixel"])
def test_dmn_is_below_the_bound_of_the_other_grids_and_keeps_its_order(kind: str, error: Any) -> None:
    schedule = SCHEDULES[kind](**({"t_start": 0.999} if kind == "flow" else {}))
    for n in (4, 7):
        found = lambdas(nodes(schedule, n, "dmn", end="keep", error=error))
        assert np.diff(found).min() >= 0.02 - 1e-9
        for other in ("uniform_lambda", "uniform_t", "quadratic_t", "karras"):
            assert bound(found, 3, error) < bound(lambdas(nodes(schedule, n, other, end="keep")), 3, error)


def test_the_bound_adds_full_steps_before_it_takes_their_size() -> None:
    lam = np.array([-2.0, -0.7, -0.2, 0.5, 1.1, 2.5])
    w = step_weights(torch.from_numpy(lam), 2).numpy()
    full = np.array([w[1, 1], w[1, 0] + w[2, 1], w[2, 0] + w[3, 1], w[3, 0], 0.0])
    ends = np.array([w[0, 0], 0.0, 0.0, 0.0, w[4, 0]])
    assert bound(lam, 2, "pixel") == pytest.approx(float((abs(full) + ends) @ np.exp(-lam[:-1])))


def test_dmn_is_quick_and_the_same_each_time() -> None:
    begin = time.perf_counter()
    once = nodes(VPDiscrete(), 20, "dmn")
    assert time.perf_counter() - begin < 15
    assert nodes(VPDiscrete(), 20, "dmn") == once


@settings(max_examples=10, deadline=None)
@given(shift=st.floats(0.3, 5.0))
def test_a_shift_of_lambda_and_its_ends_keeps_the_first_order_pixel_grid(shift: float) -> None:
    # sigma / alpha = e^-lambda, so a translation changes no term of the bound.
    flow, moved = Flow(t_start=0.99), Flow(t_start=0.99, shift=shift)
    a, b = (lambdas(nodes(s, 5, "dmn", end="keep", error="pixel", order=1)) for s in (flow, moved))
    np.testing.assert_allclose(np.diff(a), np.diff(b), atol=1e-3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nodes(VPLinear(), 5, "even"), "'even'.*uniform_t.*dmn"),
        (lambda: nodes(VPLinear(), 5, "karras", power=2.0), "no power; options: rho"),
        (lambda: nodes(VPLinear(), 5, "uniform_t", rho=2.0), "no rho; options: none"),
        (lambda: nodes(VPLinear(), 0, "uniform_t"), "n >= 1 evaluations, got 0"),
        (lambda: nodes(VPLinear(), 5, "uniform_t", end="zero"), "'zero'.*append, replace, keep"),
        (lambda: nodes(VPLinear(), 5, "uniform_t", t_start=0.1, t_end=0.5), "0.1 and 0.5"),
        (lambda: nodes(Flow(), 5, "uniform_lambda", t_end=0.0), "infinite at t = 0.999 or 0.0"),
        (lambda: nodes(VPDiscrete(), 5, "ays", table="svd"), "'svd'.*sd15, sdxl"),
        (lambda: nodes(VPLinear(), 5, "ays"), "'sd15' is for lambda from .*stretch=True"),
        (lambda: nodes(VE(), 5, "shift"), "got shift 3.0 and time 80.0"),
        (lambda: nodes(Flow(), 5, "shift", shift=0.0), "got shift 0.0 and time 1.0"),
        (lambda: nodes(VPLinear(), 5, "dmn", error="audio"), "'audio'.*latent, pixel"),
        (lambda: nodes(VPLinear(), 5, "dmn", order=0), "at least 1, got 0"),
    ],
)
def test_wrong_grids_are_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
