"""Networks with the preconditioning of EDM in pipelines: the images of diffusers' schedulers for them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    SchedulerMixin,
)
from pipeline_schedules import STEPS, searched, wrapped
from tiny_pipelines import build, inputs

from thalweg.diffusion.draw import check_network, choose_scheduler, set_scheduler
from thalweg.diffusion.from_diffusers import network_of
from thalweg.diffusion.s3.pipeline_model import PipelineSampler
from thalweg.diffusion.solvers.named import named
from thalweg.diffusion.solvers.schedule import Node
from thalweg.diffusion.solvers.scheduler import SearchedScheduler

RANGE = {"sigma_min": 0.02, "sigma_max": 20.0}
CONTINUOUS = {
    "timestep_type": "continuous", "use_karras_sigmas": True, "prediction_type": "v_prediction",
    "timestep_spacing": "leading",  # only then does Euler start from unit variance
}  # fmt: skip
CASES: dict[str, tuple[SchedulerMixin, str, dict[str, Any]]] = {
    "euler": (EDMEulerScheduler(**RANGE, sigma_data=0.6), "euler", {}),
    "euler-v": (EDMEulerScheduler(**RANGE, prediction_type="v_prediction"), "euler", {}),
    "euler-to-sigma-min": (EDMEulerScheduler(**RANGE, final_sigmas_type="sigma_min"), "euler", {}),
    "dpmpp": (EDMDPMSolverMultistepScheduler(**RANGE), "dpmpp", {"order": 2}),
    "dpmpp-v": (
        EDMDPMSolverMultistepScheduler(**RANGE, prediction_type="v_prediction", sigma_data=1.0),
        "dpmpp",
        {"order": 2},
    ),
    "continuous": (EulerDiscreteScheduler(**RANGE, **CONTINUOUS), "euler", {}),
}
"""A scheduler of diffusers, and our solver."""


def nodes_of(theirs: SchedulerMixin) -> list[Node]:
    noise, _ = network_of(theirs.config)
    levels, labels = theirs.sigmas.double().tolist(), [*theirs.timesteps.tolist(), None]
    if levels[-1] == levels[-2]:  # their last step then goes nowhere
        levels, labels = levels[:-1], labels[:-1]
    found = [
        Node(alpha=float(noise.alpha(t)), sigma=float(noise.sigma(t)), label=label)
        for t, label in zip(levels, labels)
    ]
    return found if found[-1].sigma else [*found[:-1], Node(alpha=1.0, sigma=0.0)]


def inputs_of(name: str) -> dict[str, Any]:
    return {key: value for key, value in inputs(name).items() if key != "output_type"}


@pytest.mark.parametrize("name", ["sd", "sdxl"])
@pytest.mark.parametrize("case", CASES)
def test_solvers_on_their_nodes_draw_what_diffusers_draws(case: str, name: str, tmp_path: Path) -> None:
    pipe = build(name, tmp_path)
    theirs, solver, options = CASES[case]
    pipe.scheduler = theirs
    run = {"num_inference_steps": STEPS, "output_type": "latent"}
    expected = pipe(**inputs_of(name), **run).images.numpy()
    theirs.set_timesteps(STEPS)
    ours = wrapped(named(solver, nodes_of(theirs), **options), theirs)
    check_network(ours, dict(theirs.config))
    pipe.scheduler = ours
    run["num_inference_steps"] = next(iter(ours.schedules))
    found = pipe(**inputs_of(name), **run).images.numpy()
    assert expected.std() > 0.02
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_searched_schedules_are_saved_and_loaded_in_its_pipelines(tmp_path: Path) -> None:
    pipe = build("sd", tmp_path)
    pipe.scheduler = EDMEulerScheduler(**RANGE)
    searched(pipe.scheduler).save_pretrained(tmp_path / "scheduler")
    loaded = choose_scheduler(pipe, str(tmp_path / "scheduler"))
    assert isinstance(loaded, SearchedScheduler)
    assert loaded.config.prediction_type == "edm"
    set_scheduler(pipe, loaded)
    images = pipe(**inputs("sd"), num_inference_steps=STEPS).images
    assert np.isfinite(images).all()


def test_noise_is_added_in_the_units_of_the_network() -> None:
    """x = x0 + t e, of which the network is given c_in x."""
    theirs = EDMEulerScheduler(**RANGE)
    theirs.set_timesteps(STEPS)
    ours = wrapped(named("euler", nodes_of(theirs)), theirs)
    x0, noise = torch.randn(2, 2, 4, 8, 8, dtype=torch.float64)
    t = float(theirs.sigmas[2])
    found = ours.add_noise(x0, noise, ours.timesteps[2:3])
    torch.testing.assert_close(found, (x0 + t * noise) / (t**2 + 0.25) ** 0.5)


def test_black_boxes_of_edm_are_fitted_in_the_units_of_their_data(tmp_path: Path) -> None:
    pipe = build("sd", tmp_path)
    pipe.scheduler = EDMEulerScheduler(**RANGE)
    pipe.save_pretrained(tmp_path / "pipe")
    sampler = PipelineSampler("cpu", str(tmp_path / "pipe"), count=2, prompts=["a fox"], guidance_scale=2.0)
    fine = sampler.draw(sampler.teacher(40))
    plain = searched(pipe.scheduler, 6).schedules[6]
    fitted, ends = sampler.fit(plain, steps=40)
    torch.testing.assert_close(sampler.draw(fitted), ends, rtol=0, atol=2e-4)
    assert (ends - fine).norm() < 0.5 * (sampler.draw(plain) - fine).norm()


def test_networks_of_another_kind_are_refused(tmp_path: Path) -> None:
    pipe = build("sd", tmp_path)
    made = searched(EDMEulerScheduler(**RANGE))
    with pytest.raises(
        ValueError, match="the schedule is for networks of edm, but the pipeline's gives epsilon"
    ):
        check_network(made, pipe.scheduler.config)
    with pytest.raises(ValueError, match="prediction_type edm needs the noise_schedule of its network"):
        SearchedScheduler.from_schedules(list(made.schedules.values()), prediction_type="edm")
    other = EDMEulerScheduler(**RANGE, sigma_data=0.7)
    with pytest.raises(ValueError, match="is for another noise schedule: at node 0"):
        check_network(made, dict(other.config))
