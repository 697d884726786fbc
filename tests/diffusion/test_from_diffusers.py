"""What is read from the configuration of a scheduler of diffusers."""

import math
from typing import Any

import numpy as np
import pytest
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
)

from thalweg.diffusion.from_diffusers import network_of
from thalweg.diffusion.library import library_schedulers, like
from thalweg.diffusion.schedules import EDM


def test_alphas_are_those_of_the_scheduler_at_its_labels() -> None:
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    noise, kind = network_of(scheduler.config)
    labels = np.array([0.0, 13.0, 500.0, 999.0])
    alphas = noise.alpha(noise.t_of_label(labels)) ** 2
    assert kind == "noise"
    assert alphas == pytest.approx(scheduler.alphas_cumprod[labels.astype(int)].double().numpy(), rel=1e-5)


@pytest.mark.parametrize(("given", "kind"), [("epsilon", "noise"), ("sample", "data"), ("v_prediction", "v")])
def test_the_prediction_is_read(given: str, kind: str) -> None:
    assert network_of(DDIMScheduler(prediction_type=given).config)[1] == kind


def test_a_flow_keeps_its_shift() -> None:
    noise, kind = network_of(FlowMatchEulerDiscreteScheduler(shift=3.0).config)
    assert (kind, noise.shift) == ("flow", 3.0)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_dynamic_shifting_is_that_of_the_picture(kind: str) -> None:
    """A shift that such a scheduler has as well is not used, neither by diffusers nor here."""
    options: dict[str, Any] = {"base_shift": 0.6, "max_shift": 1.2, "max_image_seq_len": 8192}
    theirs = FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, time_shift_type=kind, **options
    )
    sigmas, tokens = np.array([1.0, 0.75, 0.5, 0.25]), 1024
    theirs.set_timesteps(sigmas=sigmas.tolist(), mu=0.6 + (1.2 - 0.6) * (tokens - 256) / (8192 - 256))
    flow, _ = network_of(theirs.config, tokens=tokens)
    np.testing.assert_allclose(flow.sigma(sigmas), theirs.sigmas.numpy()[:-1], rtol=1e-6)
    np.testing.assert_allclose(flow.label(sigmas), theirs.timesteps.numpy(), rtol=1e-6)
    largest, _ = network_of(theirs.config)
    assert largest.shift == pytest.approx(math.exp(1.2) if kind == "exponential" else 1.2)


@pytest.mark.parametrize("family", [EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
@pytest.mark.parametrize(("given", "kind"), [("epsilon", "edm"), ("v_prediction", "v")])
def test_edm_networks_are_read_and_made_again(family: type, given: str, kind: str) -> None:
    scheduler = family(sigma_min=0.01, sigma_max=60.0, sigma_data=0.4, prediction_type=given)
    noise, found = network_of(scheduler.config)
    assert (noise, found) == (EDM(t_start=60.0, t_end=0.01, sigma_data=0.4), kind)
    assert like(scheduler.config, EDMEulerScheduler).config.prediction_type == given
    names = library_schedulers(scheduler.config)
    assert {entry.family for entry in names.values()} == {
        "EDMEulerScheduler",
        "EDMDPMSolverMultistepScheduler",
    }
    for entry in names.values():
        assert network_of(entry.make().config) == (noise, kind)
    with pytest.raises(ValueError, match="DDIMScheduler is not for networks of EDM; allowed: EDMEuler"):
        like(scheduler.config, DDIMScheduler)


def test_continuous_times_of_euler_are_those_of_edm() -> None:
    given = {"prediction_type": "v_prediction", "timestep_type": "continuous", "use_karras_sigmas": True}
    scheduler = EulerDiscreteScheduler(**given, sigma_min=0.002, sigma_max=700.0)
    noise, kind = network_of(scheduler.config)
    scheduler.set_timesteps(4)
    sigmas = scheduler.sigmas.double().numpy()[:-1]
    assert (noise, kind) == (EDM(t_start=700.0, t_end=0.002, sigma_data=1.0), "v")
    np.testing.assert_allclose(noise.label(sigmas), scheduler.timesteps.numpy(), rtol=1e-5)
    table, _ = network_of(EulerDiscreteScheduler(**given).config)
    assert table.t_start == pytest.approx(float(EulerDiscreteScheduler().sigmas.max()), rel=1e-4)


@pytest.mark.parametrize(("given", "kind"), [("v_prediction", "v"), ("sample", "data")])
def test_tables_without_signal_at_their_start_are_for_data_and_v(given: str, kind: str) -> None:
    scheduler = DDIMScheduler(rescale_betas_zero_snr=True, prediction_type=given)
    noise, found = network_of(scheduler.config)
    assert (found, float(noise.alpha(1.0))) == (kind, 0.0)
    families = {entry.family for entry in library_schedulers(scheduler.config).values()}
    assert "DDIMScheduler" in families
    assert "DEISMultistepScheduler" not in families  # it has no such option
    with pytest.raises(ValueError, match="DEISMultistepScheduler has no rescale_betas_zero_snr"):
        like(scheduler.config, DEISMultistepScheduler)


def test_what_is_not_understood_is_refused() -> None:
    with pytest.raises(ValueError, match="rescale_betas_zero_snr with prediction_type epsilon"):
        network_of(LCMScheduler(rescale_betas_zero_snr=True).config)
    with pytest.raises(ValueError, match="prediction_type 'velocity' is not understood"):
        network_of({"prediction_type": "velocity", "beta_start": 0.1})
    with pytest.raises(ValueError, match="scheduler without a name with prediction_type 'epsilon'"):
        network_of({"sigma_data": 1.0})
