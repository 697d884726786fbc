"""Networks whose noise schedule starts without signal: DDIM's images, and schedules of a search."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import DDIMScheduler
from pipeline_schedules import STEPS, same, searched
from tiny_pipelines import build, inputs


def draw(pipe: Any) -> np.ndarray:
    return pipe(**inputs("sd"), num_inference_steps=STEPS).images


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_ddim_from_pure_noise_is_that_of_diffusers(prediction: str, tmp_path: Path) -> None:
    pipe = build("sd", tmp_path)
    theirs = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        timestep_spacing="trailing", rescale_betas_zero_snr=True, prediction_type=prediction,
    )  # fmt: skip
    pipe.scheduler = theirs
    expected = draw(pipe)
    ours = same(theirs)
    assert ours.schedules[STEPS].nodes[0].alpha == 0.0
    pipe.scheduler = ours
    assert expected.std() > 0.02
    np.testing.assert_allclose(draw(pipe), expected, rtol=0, atol=1e-4)
    pipe.scheduler = searched(theirs)
    assert pipe.scheduler.schedules[STEPS].nodes[0].alpha == 0.0
    assert np.isfinite(draw(pipe)).all()
