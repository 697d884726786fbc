"""Noise schedules: closed forms, inverses, golden nodes, diffusers' tables, and what shifts do to lambda."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import golden_files
from hypothesis import given
from hypothesis import strategies as st

from thalweg.diffusion.parameterization import to_data
from thalweg.diffusion.schedules import (
    EDM,
    SCHEDULES,
    VE,
    Flow,
    NoiseSchedule,
    VPCosine,
    VPDiscrete,
    VPLinear,
    flow_mu,
)
from thalweg.diffusion.variance_preserving import BETA_SCHEDULES, VariancePreserving

(GOLDEN,) = golden_files("s3", "toy.json")
PROBLEMS = json.loads(Path(GOLDEN).read_text())["problems"]

VARIANTS: list[NoiseSchedule] = [
    *(cls() for cls in SCHEDULES.values()),
    VPLinear(beta_0=0.5, beta_1=0.5),
    VPDiscrete(beta_start=1e-4, beta_end=0.02, beta_schedule="linear"),
    VPDiscrete(beta_schedule="squaredcos_cap_v2"),
    VPDiscrete(n=3, betas=(0.1, 0.2, 0.4)),
    VPDiscrete(rescale_zero_snr=True),
    VPDiscrete(n=3, betas=(0.1, 0.2, 0.4), rescale_zero_snr=True),
    VE(label_kind="edm"),
    EDM(sigma_data=1.0, t_start=700.0),
    Flow(shift=3.0),
    Flow(shift=0.25, t_start=0.9),
]
ids = [f"{s.kind}-{k}" for k, s in enumerate(VARIANTS)]
fractions = st.floats(0.0, 1.0)


def times(schedule: NoiseSchedule, q: float) -> float:
    """A time of a schedule where lambda is finite."""
    start = schedule.t_start if np.isfinite(schedule.lam(schedule.t_start)) else 0.9999
    return schedule.t_end + q * (start - schedule.t_end)


@pytest.mark.parametrize("schedule", VARIANTS, ids=ids)
@given(q=fractions)
def test_time_of_lambda_undoes_lambda_of_time(schedule: NoiseSchedule, q: float) -> None:
    t = times(schedule, q)
    assert schedule.t_of_lam(schedule.lam(t)) == pytest.approx(t, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("schedule", VARIANTS, ids=ids)
@given(q=fractions, r=fractions)
def test_lambda_is_the_logarithm_of_the_ratio_and_falls_with_time(
    schedule: NoiseSchedule, q: float, r: float
) -> None:
    t = np.sort([times(schedule, q), times(schedule, r)])
    lam = schedule.lam(t)
    np.testing.assert_allclose(np.exp(lam), schedule.alpha(t) / schedule.sigma(t), rtol=1e-12)
    assert lam[0] >= lam[1]
    assert t[1] - t[0] < 1e-9 or lam[0] > lam[1]


@pytest.mark.parametrize("schedule", [s for s in VARIANTS if isinstance(s, VariancePreserving)])
@given(q=fractions)
def test_variance_is_preserved(schedule: VariancePreserving, q: float) -> None:
    t = times(schedule, q)
    assert schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2 == pytest.approx(1.0, abs=1e-15)


@given(shift=st.floats(0.1, 10.0), q=st.floats(0.001, 0.999))
def test_a_shift_of_time_translates_lambda(shift: float, q: float) -> None:
    assert Flow(shift=shift).lam(q) == pytest.approx(Flow().lam(q) - math.log(shift), abs=1e-10)
    assert Flow(shift=shift).alpha(q) + Flow(shift=shift).sigma(q) == pytest.approx(1.0, abs=1e-15)


@pytest.mark.parametrize("schedule", VARIANTS, ids=ids)
def test_numbers_and_arrays_agree(schedule: NoiseSchedule) -> None:
    t = np.linspace(schedule.t_end, schedule.t_start, 7).reshape(7, 1)
    for function in (schedule.alpha, schedule.sigma, schedule.lam, schedule.label):
        found = function(t)
        assert found.shape == t.shape
        assert found.dtype == np.float64
        for k in range(7):
            assert float(function(float(t[k, 0]))) == found[k, 0]


@pytest.mark.parametrize("schedule", VARIANTS, ids=ids)
def test_a_schedule_returns_from_json(schedule: NoiseSchedule) -> None:
    assert NoiseSchedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule


@pytest.mark.parametrize("name", PROBLEMS)
def test_golden_nodes(name: str) -> None:
    schedule = NoiseSchedule.from_dict(PROBLEMS[name]["schedule"])
    nodes = PROBLEMS[name]["exact"]["nodes"] + PROBLEMS[name]["prediction_check"]["nodes"]
    t, alpha, sigma = (np.array([node[key] for node in nodes]) for key in ("t", "alpha", "sigma"))
    np.testing.assert_allclose(schedule.alpha(t), alpha, atol=1e-13)
    np.testing.assert_allclose(schedule.sigma(t), sigma, atol=1e-13)


@pytest.mark.parametrize("schedule", [VPLinear(), VPCosine(), VPDiscrete(), Flow(), Flow(shift=3.0)])
def test_time_nought_is_data_and_lambda_infinite(schedule: NoiseSchedule) -> None:
    assert (schedule.alpha(0.0), schedule.sigma(0.0), schedule.lam(0.0)) == (1.0, 0.0, math.inf)
    assert schedule.t_of_lam(math.inf) == pytest.approx(0.0, abs=1e-5)


def test_a_table_without_signal_at_its_start_by_hand() -> None:
    plain, schedule = (
        VPDiscrete(n=3, betas=(0.2, 0.2, 0.4), rescale_zero_snr=zero) for zero in (False, True)
    )
    entries = plain.alpha(np.array([1, 2, 3]) / 3)
    expected = (entries - entries[2]) * entries[0] / (entries[0] - entries[2])
    np.testing.assert_allclose(schedule.alpha(np.array([1, 2, 3]) / 3), expected, atol=1e-15)
    assert (schedule.alpha(1.0), schedule.sigma(1.0), schedule.lam(1.0)) == (0.0, 1.0, -math.inf)
    assert schedule.t_of_lam(-math.inf) == 1.0
    assert schedule.alpha(2.5 / 3) == pytest.approx(expected[1] / 2, rel=1e-12)


@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_tables_without_signal_at_their_start_are_those_of_diffusers(name: str) -> None:
    from diffusers import DDIMScheduler

    other = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule=name, rescale_betas_zero_snr=True)
    schedule = VPDiscrete(beta_schedule=name, rescale_zero_snr=True)
    found = schedule.alpha(schedule.t_of_label(np.arange(1000)))
    np.testing.assert_allclose(found, other.alphas_cumprod.double().sqrt().numpy(), rtol=2e-4, atol=2e-5)


def test_edm_states_are_the_inputs_of_its_networks() -> None:
    """alpha x0 / sigma_data + sigma e = c_in (x0 + t e), and edm with c_skip and c_out is its denoiser."""
    schedule, t, x0, e, out = EDM(sigma_data=0.7), 3.1, 0.4, -1.3, 0.9
    alpha, sigma, c_in = schedule.alpha(t), schedule.sigma(t), 1 / math.sqrt(t**2 + 0.49)
    x = x0 + t * e
    assert alpha * x0 / schedule.data_scale + sigma * e == pytest.approx(c_in * x, rel=1e-14)
    denoised = 0.49 * c_in**2 * x + t * 0.7 * c_in * out
    o, state = torch.tensor(out, dtype=torch.float64), torch.tensor(c_in * x, dtype=torch.float64)
    found = to_data(o, state, float(alpha), float(sigma), "edm") * schedule.data_scale
    assert float(found) == pytest.approx(denoised, rel=1e-14)
    assert schedule.label(math.e**4) == pytest.approx(1.0)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_starts_at_pure_noise(shift: float) -> None:
    flow = Flow(shift=shift)
    assert (flow.alpha(1.0), flow.sigma(1.0), flow.lam(1.0)) == (0.0, 1.0, -math.inf)
    assert flow.t_of_lam(-math.inf) == 1.0


def test_cosine_keeps_its_digits_near_the_data() -> None:
    # 1 - alpha^2 = sin(2 b) a + cos(2 b) a^2 over cos(b)^2, to first orders in the angle a that t adds to b.
    t, b = 1e-9, 0.008 / 1.008 * math.pi / 2
    a = t * math.pi / 2 / 1.008
    expected = math.sqrt((math.sin(2 * b) * a + math.cos(2 * b) * a * a) / math.cos(b) ** 2)
    assert VPCosine().sigma(t) == pytest.approx(expected, rel=1e-12)


def test_discrete_table_by_hand() -> None:
    schedule = VPDiscrete(n=3, betas=(0.2, 0.2, 0.4))
    entries = np.sqrt([0.8, 0.8 * 0.8, 0.8 * 0.8 * 0.6])
    np.testing.assert_allclose(schedule.alpha(np.array([1, 2, 3]) / 3), entries, rtol=1e-14)
    assert schedule.alpha(0.5) == pytest.approx(math.sqrt(entries[0] * entries[1]), rel=1e-14)
    assert schedule.alpha(3.5 / 3) == pytest.approx(
        entries[2] * math.sqrt(entries[2] / entries[1]), rel=1e-14
    )
    assert schedule.alpha(0.5 / 3) == pytest.approx(
        entries[0] * math.sqrt(entries[0] / entries[1]), rel=1e-14
    )
    np.testing.assert_allclose(schedule.label(np.array([1, 2, 3]) / 3), [0, 1, 2], atol=1e-15)
    assert schedule.t_of_label(1) == pytest.approx(2 / 3)
    assert schedule.t_end == 1 / 3


@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_discrete_tables_are_those_of_diffusers(name: str) -> None:
    from diffusers import DDPMScheduler

    other = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule=name)
    schedule = VPDiscrete(beta_schedule=name)
    t = schedule.t_of_label(np.arange(1000))
    np.testing.assert_allclose(schedule.alpha(t) ** 2, other.alphas_cumprod.numpy(), rtol=3e-5, atol=3e-9)


def test_flow_grid_and_label_are_those_of_diffusers() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    sigmas = np.linspace(1.0, 0.1, 10)
    other = FlowMatchEulerDiscreteScheduler(shift=3.0)
    other.set_timesteps(sigmas=sigmas.tolist())
    flow = Flow(shift=3.0)
    np.testing.assert_allclose(flow.sigma(sigmas), other.sigmas.numpy()[:-1], rtol=1e-6)
    np.testing.assert_allclose(flow.label(sigmas), other.timesteps.numpy(), rtol=1e-6)


def test_dynamic_shift_is_that_of_diffusers() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    assert flow_mu(256) == 0.5
    assert flow_mu(4096) == pytest.approx(1.15)
    mu = flow_mu(1024)
    other = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    other.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=mu)
    flow = Flow().with_mu(mu)
    np.testing.assert_allclose(
        flow.sigma(np.array([1.0, 0.75, 0.5, 0.25])), other.sigmas.numpy()[:-1], rtol=1e-6
    )


def test_edm_label() -> None:
    assert VE(label_kind="edm").label(math.e**4) == pytest.approx(1.0)
    assert VE().label(7.5) == 7.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NoiseSchedule.from_dict({"kind": "vp_quartic"}), "'vp_quartic'.*vp_linear.*flow"),
        (lambda: NoiseSchedule.from_dict({"kind": "flow", "beta_0": 1}), "no beta_0; entries: .*shift"),
        (lambda: VPLinear(t_start=0.1, t_end=0.2), "0.1 and 0.2"),
        (lambda: VPLinear(beta_0=2.0, beta_1=1.0), "2.0 and 1.0"),
        (lambda: VPCosine(s=0.0), "positive, got 0.0"),
        (lambda: VPDiscrete(beta_schedule="sigmoid"), "'sigmoid'.*scaled_linear"),  # type: ignore[arg-type]
        (lambda: VPDiscrete(beta_end=1.5, beta_schedule="linear"), "to 1.5"),
        (lambda: VPDiscrete(betas=(0.1, 0.2)), "n is 1000, but there are 2"),
        (lambda: VPDiscrete(n=1), "got 1"),
        (lambda: VPDiscrete(n=2, betas=(0.1, 0.2), rescale_zero_snr=True), "n >= 3 entries, got 2"),
        (lambda: EDM(sigma_data=0.0), "sigma_data must be positive, got 0.0"),
        (lambda: VE(label_kind="log"), "sigma or edm, got 'log'"),  # type: ignore[arg-type]
        (lambda: Flow(shift=0.0), "positive, got 0.0"),
        (lambda: Flow(t_start=2.0), "at most 1, got t_start 2.0"),
    ],
)
def test_wrong_schedules_are_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]
