"""What is read from the configuration of a scheduler of diffusers."""

import numpy as np
import pytest
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler

from thalweg.diffusion.from_diffusers import network_of


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


def test_what_is_not_understood_is_refused() -> None:
    with pytest.raises(ValueError, match="rescale_betas_zero_snr"):
        network_of(LCMScheduler(rescale_betas_zero_snr=True).config)
    with pytest.raises(ValueError, match="prediction_type 'velocity' is not understood"):
        network_of({"prediction_type": "velocity", "beta_start": 0.1})
