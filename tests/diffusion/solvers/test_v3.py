"""DPM-Solver-v3 with tables: closed forms, integrals, orders, exactness, channels, biases, JSON, errors."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from solver_runs import golden, mixture, vp_node, vp_nodes
from torch import Tensor

from thalweg.diffusion.schedules import VPLinear
from thalweg.diffusion.solvers.adams import adams
from thalweg.diffusion.solvers.ems import estimate_ems, with_tables
from thalweg.diffusion.solvers.linear import LinearSchedule
from thalweg.diffusion.solvers.sample import sample
from thalweg.diffusion.solvers.schedule import Node, SolverSchedule, Step
from thalweg.diffusion.solvers.scheduler import SearchedScheduler
from thalweg.diffusion.solvers.v3 import V3, V3Tables
from thalweg.diffusion.toy import GaussianMixture, exact_states

LAM = np.linspace(-2.0, 3.5, 23)
CURVES = {"l": 1 / (1 + np.exp(LAM)), "s": -0.5 - 0.4 * np.tanh(LAM), "b": 0.3 * np.sin(LAM)}
TABLES = V3Tables(lam=tuple(LAM.tolist()), **{name: tuple(row.tolist()) for name, row in CURVES.items()})
BY_CHANNEL = V3Tables(lam=TABLES.lam, l=(TABLES.l, TABLES.s), s=(TABLES.s, TABLES.s), b=(TABLES.b, TABLES.l))


def v3(schedule: SolverSchedule, tables: V3 | V3Tables) -> SolverSchedule:
    """The same orders and nodes, on v3."""
    return replace(
        schedule, steps=tuple(replace(step, prediction="v3") for step in schedule.steps), v3=tables
    )


def constant(l: float, s: float) -> V3Tables:  # noqa: E741
    return V3Tables(lam=(-2.0, 0.0, 3.5), l=(l,) * 3, s=(s,) * 3, b=(0.0,) * 3)


@pytest.mark.parametrize("form", [lambda linear, s: V3(l=linear, s=s), constant], ids=["constants", "tables"])
@pytest.mark.parametrize(("prediction", "l", "s"), [("data", 1.0, 0.0), ("noise", 0.0, -1.0)])
def test_data_and_noise_are_bitwise_special_cases(form: Any, prediction: str, l: float, s: float) -> None:  # noqa: E741
    plain = adams(vp_nodes(6, -1.9, 3.4), prediction=prediction, order=3, corrector=True)
    found, expected = v3(plain, form(l, s)).compile(), plain.compile()
    for name in ("A", "C", "A_pred", "C_pred"):
        assert np.array_equal(getattr(found, name), getattr(expected, name))
    assert found.B is None


def test_constant_tables_are_the_constants() -> None:
    plain = adams(vp_nodes(6, -1.9, 3.4), order=3, corrector=True)
    curved = replace(constant(0.4, -0.7), b=(0.0, 0.0, 1e-300))  # by quadrature, not simplified
    found, expected = v3(plain, curved).compile(), v3(plain, V3(l=0.4, s=-0.7)).compile()
    np.testing.assert_allclose(found.C_pred, expected.C_pred, rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.A, expected.A, rtol=1e-13)


def test_integrals_are_those_of_the_trapezoid_rule_on_a_fine_table() -> None:
    start, end, count = -1.13, 1.71, 20001
    grid = np.linspace(start, end, count)

    def running(values: np.ndarray) -> np.ndarray:
        steps = (values[1:] + values[:-1]) / 2 * np.diff(grid)
        return np.concatenate([[0.0], np.cumsum(steps)])

    l, s, b = (TABLES._curves[name](grid) for name in ("l", "s", "b"))  # noqa: E741
    L, S = running(l), running(s)
    beta = running(np.exp(-S) * b)
    terms, constant_term = TABLES.integrals(start, end, 4)
    for k, term in enumerate(terms):
        truth = running(np.exp(L + S) * (grid - start) ** k / math.factorial(k))[-1]
        assert term == pytest.approx(truth, rel=1e-7)
    assert constant_term == pytest.approx(running(np.exp(L + S) * beta)[-1], rel=1e-7)
    assert TABLES.exponents(start, end) == pytest.approx((L[-1], S[-1]), rel=1e-7)
    assert TABLES.bias(start, end) == pytest.approx(beta[-1], rel=1e-7)
    assert TABLES.bias(end, start) == pytest.approx(-math.exp(S[-1]) * beta[-1], rel=1e-7)


@pytest.fixture(scope="module")
def estimated() -> V3Tables:
    """Tables of the mixture that the recorded convergence is on."""
    arrays = golden("toy")[1]
    names = ("weights", "means", "covariances")
    exact = GaussianMixture.from_dict({name: arrays[f"mix.gm16s.{name}"].numpy() for name in names})
    data = exact.sample(64, torch.Generator().manual_seed(0))
    grid = np.linspace(-1.6, 3.1, 48).tolist()
    return estimate_ems(lambda x, alpha, sigma, _: exact.data(x, alpha, sigma), data, VPLinear(), lam=grid)


def end_error(schedule: SolverSchedule) -> float:
    arrays = golden("convergence")[1]
    end = sample(schedule, mixture("gm16s"), arrays["uniform.N8.exact_first5"][0])[-1]
    return float((end - arrays["uniform.exact_end"]).square().mean().sqrt())


@pytest.mark.parametrize(("order", "corrector", "slope"), [(1, False, 1), (2, False, 2), (1, True, 2)])
def test_estimated_tables_keep_the_order(
    order: int, corrector: bool, slope: int, estimated: V3Tables
) -> None:
    errors = [
        end_error(v3(adams(vp_nodes(n, -1.5, 3), order=order, corrector=corrector), estimated))
        for n in (96, 192)
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(slope, abs=0.15)


@pytest.mark.parametrize("order", [1, 2])
def test_estimated_tables_do_better_than_data_and_noise(order: int, estimated: V3Tables) -> None:
    nodes = vp_nodes(12, -1.5, 3)
    plain = [end_error(adams(nodes, order=order, prediction=kind)) for kind in ("data", "noise")]
    assert end_error(v3(adams(nodes, order=order), estimated)) < 0.7 * min(plain)


def test_first_order_is_exact_on_a_gaussian_with_its_tables() -> None:
    """g does not change along its trajectories; what is left is between the entries of the tables."""
    exact = GaussianMixture([1.0], [[0.5, -1.0]], [0.3 * np.eye(2)])
    noise, lam = VPLinear(), np.linspace(-3, 3, 61)
    data = exact.sample(32, torch.Generator().manual_seed(0))
    tables = estimate_ems(lambda x, a, s, _: exact.data(x, a, s), data, noise, lam=lam.tolist())
    np.testing.assert_allclose(tables.l, 1 / (1 + 0.3 * np.exp(2 * lam)), atol=1e-12)
    nodes = [vp_node(value) for value in (-3.0, 0.0, 1.0, 3.0)]
    truth = exact_states(exact, data, [n.alpha for n in nodes], [n.sigma for n in nodes])
    ddim = adams(nodes, order=1)
    distances = [
        float(
            (sample(schedule, lambda x, n: exact.data(x, n.alpha, n.sigma), data)[-1] - truth[-1]).abs().max()
        )
        for schedule in (v3(ddim, tables), ddim)
    ]
    assert distances[0] < 1e-5 < 0.1 < distances[1]


def test_tables_by_channel_know_their_channel() -> None:
    """Channels of different variance, whose l is alpha-weighted: sigma^2 / (alpha^2 c + sigma^2)."""
    variances, lam = torch.tensor([0.2, 1.5], dtype=torch.float64), np.linspace(-2, 2, 9)

    def network(x: Tensor, alpha: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        return sigma * x / (alpha**2 * variances.view(2, 1, 1) + sigma**2)

    data = torch.randn(4, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = estimate_ems(
        network, data, VPLinear(), kind="noise", lam=lam.tolist(), by_channel=True, batch=3, probes=2
    )
    assert found.channels == 2
    for row, variance in zip(found.l, variances.tolist(), strict=True):
        np.testing.assert_allclose(row, 1 / (1 + variance * np.exp(2 * lam)), atol=1e-12)
    whole = estimate_ems(network, data, VPLinear(), kind="noise", lam=lam.tolist())
    np.testing.assert_allclose(whole.l, np.mean(found.l, 0), atol=1e-12)


def test_a_real_network_is_differentiated_with_its_label_and_attention() -> None:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1, attention_head_dim=4,
    ).eval().requires_grad_(False)  # fmt: skip
    data = torch.rand(4, 1, 8, 8) * 2 - 1
    found = estimate_ems(
        lambda x, alpha, sigma, label: unet(x, label).sample,
        data, VPLinear(label_scale=999.0), kind="noise", lam=[-2.0, -1.0, 0.0, 1.0, 2.0],
    )  # fmt: skip
    assert np.isfinite([found.l, found.s, found.b]).all()
    assert max(map(abs, found.s)) > 0.01


def test_too_little_to_estimate_from_is_refused() -> None:
    data = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="1 samples, 1 probes, batch 64; allowed: 2 samples or more"):
        estimate_ems(lambda x, *_: x, data, VPLinear())
    with pytest.raises(ValueError, match="tables by channel need samples"):
        estimate_ems(lambda x, *_: x, torch.zeros(3, 2), VPLinear(), by_channel=True)
    with pytest.raises(ArithmeticError, match="are not finite"):
        estimate_ems(lambda x, *_: x / 0, torch.zeros(3, 2), VPLinear())


def denoise(x: Tensor, node: Node) -> Tensor:
    return 0.2 + 0.5 * node.alpha * x + 0.1 * torch.sin(x)


@pytest.mark.parametrize("tables", [TABLES, BY_CHANNEL], ids=["for_all", "by_channel"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_scheduler_carries_biases_and_channels(
    tables: V3Tables, dtype: torch.dtype, tmp_path: Path
) -> None:
    nodes = [replace(node, label=float(i)) for i, node in enumerate(vp_nodes(5, -1.9, 3.4))]
    schedule = v3(adams(nodes, order=3, corrector=True), tables)
    made = SearchedScheduler.from_schedules([schedule], prediction_type="sample")
    made.save_pretrained(tmp_path)
    scheduler = SearchedScheduler.from_pretrained(tmp_path)
    assert scheduler.schedules[5] == schedule
    state = torch.randn(3, 2, 4, 4, dtype=torch.float64).to(dtype)
    start, recorded = state.double(), []
    for t, node in zip(scheduler.timesteps, nodes):
        recorded.append(denoise(state, node))
        state = scheduler.step(recorded[-1], t, state).prev_sample
        assert state.dtype == dtype
    answers = iter(recorded)
    plain = sample(schedule, lambda *_: next(answers).double(), start)[-1]
    tolerance = 1e-11 if dtype == torch.float64 else 2.0**-7
    torch.testing.assert_close(state.double(), plain, rtol=tolerance, atol=tolerance)


def test_channels_are_sampled_as_if_each_were_alone() -> None:
    schedule = v3(adams(vp_nodes(4, -1.9, 3.4), order=2), BY_CHANNEL)
    x = torch.randn(2, 2, 3, dtype=torch.float64)
    both = sample(schedule, denoise, x)[-1]
    for k, part in enumerate(schedule.by_channel()):
        assert part.v3 == BY_CHANNEL.channel(k)
        torch.testing.assert_close(sample(part, denoise, x[:, k : k + 1])[-1], both[:, k : k + 1])
    with pytest.raises(ValueError, match=r"coefficients for 2 channels, the state \(1, 3, 2\)"):
        sample(schedule, denoise, torch.zeros(1, 3, 2))
    with pytest.raises(ValueError, match="2 channels have coefficients of their own"):
        schedule.compile()


def test_biases_are_no_weights() -> None:
    with pytest.raises(ValueError, match="biases of v3 are no weights"):
        LinearSchedule.of(v3(adams(vp_nodes(3, -1.9, 3.4), order=1), TABLES))


@pytest.mark.parametrize("tables", [TABLES, BY_CHANNEL], ids=["for_all", "by_channel"])
def test_json_holds_the_tables(tables: V3Tables, tmp_path: Path) -> None:
    schedule = v3(adams(vp_nodes(3, -1.9, 3.4), order=2), tables)
    schedule.save(tmp_path / "v3.json")
    assert SolverSchedule.load(tmp_path / "v3.json") == schedule
    assert json.loads((tmp_path / "v3.json").read_text())["v3"]["lambda"] == list(tables.lam)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"l": [1.0, 2.0]}, "v3: l has 2 entries, lambda 3"),
        ({"lambda": [0.0, 0.0, 1.0]}, "v3: lambda must rise, entry 1 is 0 after 0"),
        ({"lambda": [1.0]}, "v3: a table needs two values of lambda or more, found 1"),
        ({"s": [0.0, float("nan"), 0.0]}, "v3, s: entry 1 is nan, not a finite number"),
        ({"b": [0.0, "x", 0.0]}, "v3, b: entry 1 is 'x', not a finite number"),
        ({"b": 0.0}, r"v3: b is 0\.0, not a list"),
        ({"l": [[0.0] * 3] * 2}, "v3: l, s and b have different numbers of channels"),
        ({"l": [[0.0] * 3, 1.0]}, r"v3, l, channel 1: entries are 1\.0, not a list"),
        ({"lambda": [-1.0, 0.0, 3.5]}, r"step 0: the v3 tables run over lambda from -1 to 3\.5, but node 0"),
        ({"lambda": [-2.0, 0.0, 3.0]}, r"step 2: the v3 tables run over lambda from -2 to 3, but node 3"),
        ({"c": [1.0]}, "v3: unknown entry 'c'; known: lambda, l, s, b"),
    ],
)
def test_faulty_tables_are_one_clear_error(change: dict[str, Any], message: str) -> None:
    values = v3(adams(vp_nodes(3, -1.9, 3.4), order=1), constant(0.5, -0.5)).to_dict()
    values["v3"] |= change
    with pytest.raises(ValueError, match=message):
        SolverSchedule.from_dict(values)


def test_steps_take_tables_where_these_reach() -> None:
    """Not from pure noise, not to pure data, and not beyond the tables."""
    grid = [Node(alpha=0.0, sigma=1.0), *vp_nodes(4, -3.0, 3.0), Node(alpha=1.0, sigma=0.0)]
    made = with_tables(adams(grid, order=2), TABLES)
    assert [step.prediction for step in made.steps] == ["data", "data", "data", "v3", "v3", "data"]
    made.compile()
    inside = adams(vp_nodes(4, -1.9, 3.0), order=3, corrector=True)
    assert with_tables(inside, TABLES) == v3(inside, TABLES)


def test_v3_needs_finite_lambda() -> None:
    nodes = (Node(alpha=0.0, sigma=1.0), *vp_nodes(2, -1.0, 3.0))
    steps = tuple(Step(start=i, prediction="v3", order=1) for i in range(3))
    with pytest.raises(ValueError, match="step 0: prediction v3 over an infinite range of lambda"):
        SolverSchedule(nodes=nodes, steps=steps, v3=TABLES)
