"""Files of schedulers that are broken, cut off, or of something else: one error each, with the file."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.pipelines.flux.pipeline_flux import retrieve_timesteps

from thalweg.diffusion.schedules import Flow, VPDiscrete
from thalweg.diffusion.solvers.adams import adams
from thalweg.diffusion.solvers.grids import nodes
from thalweg.diffusion.solvers.scheduler import SearchedScheduler
from thalweg.diffusion.solvers.stored import plain_sigmas


def written(folder: Path) -> Path:
    """The file of a good scheduler."""
    schedule = adams(nodes(VPDiscrete(), 4, "uniform_t"), order=2)
    options = {"noise_schedule": VPDiscrete().to_dict(), "prediction_type": "v_prediction"}
    SearchedScheduler.from_schedules([schedule], **options).save_pretrained(folder)
    return folder / "scheduler_config.json"


def test_a_file_that_is_cut_off_is_named(tmp_path: Path) -> None:
    file = written(tmp_path)
    text = file.read_text()
    for length in (0, 1, len(text) // 2, len(text) - 2):
        file.write_text(text[:length])
        with pytest.raises(ValueError, match=rf"{file} is not JSON; it is cut off, or another file"):
            SearchedScheduler.from_pretrained(tmp_path)
    file.write_bytes(b"\xff\xfe\x00PK")
    with pytest.raises(ValueError, match=rf"{file} is not JSON"):
        SearchedScheduler.from_pretrained(tmp_path)


def test_a_file_of_something_else_is_named(tmp_path: Path) -> None:
    file = written(tmp_path)
    file.write_text("[1, 2]")
    with pytest.raises(ValueError, match=rf"{file}.* list"):
        SearchedScheduler.from_pretrained(tmp_path)
    DDIMScheduler().save_pretrained(tmp_path / "pipe" / "scheduler")
    place = tmp_path / "pipe" / "scheduler" / "scheduler_config.json"
    with pytest.raises(ValueError, match=rf"{place} is the configuration of DDIMScheduler, not of Searched"):
        SearchedScheduler.from_pretrained(tmp_path / "pipe", subfolder="scheduler")
    with pytest.raises(OSError, match="scheduler_config"):
        SearchedScheduler.from_pretrained(tmp_path / "pipe")


def edited(values: dict[str, Any], path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        values = values[key]
    values[path[-1]] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("schedules",), [1], "schedules are an object by number of evaluations, not list"),
        (("schedules", "many"), {}, "schedules are by number of evaluations, found 'many'"),
        (("schedules", "7"), {"nodes": []}, "the schedule for 7 evaluations: schedule has no entry 'steps'"),
        (("schedules", "4"), [1.0] * 999, "the schedule for 4 evaluations: schedule is .*not an object"),
        (("schedules", "4", "nodes", 1, "sigma"), 9.0, "for 4 evaluations: node 1: noise must fall"),
        (("schedules", "4", "nodes", 1, "sigma"), float("nan"), "node 1: sigma is nan, not a finite number"),
        (("schedules", "4", "nodes", 1, "sigma"), 10**400, "node 1: sigma is 1000.*, not a finite number"),
        (("schedules", "4", "nodes", 1, "sigma"), None, "node 1: sigma is None, not a finite number"),
        (("schedules", "4", "steps"), {"0": 1}, "schedule: steps is .*, not a list"),
        (("schedules", "4", "steps", 0, "start"), True, "step 0: start is True, not an integer"),
        (("schedules", "4", "steps", 0, "prediction"), ["data"], "step 0: prediction is .*allowed: noise"),
        (("schedules", "4", "nfe"), 5, "nfe is 5 but its steps evaluate the network 4 times"),
        (("noise_schedule",), "flow", "noise_schedule is an object, not str"),
        (("noise_schedule", "kind"), "vp_cubic", "noise schedule 'vp_cubic' is not known; kinds: "),
        (("noise_schedule", "kind"), ["flow"], "noise schedule .*not known"),
        (("noise_schedule", "n"), "many", "noise_schedule: "),
        (("prediction_type",), "velocity", "prediction_type is 'velocity', allowed: epsilon"),
    ],
)  # fmt: skip
def test_a_file_that_says_what_cannot_be_is_named(
    path: tuple[Any, ...], value: Any, message: str, tmp_path: Path
) -> None:
    file = written(tmp_path)
    values = json.loads(file.read_text())
    edited(values, path, value)
    file.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=rf"{file}: .*{message}") as caught:
        SearchedScheduler.from_pretrained(tmp_path)
    assert len(str(caught.value)) < 600


def test_pipelines_with_sigmas_and_mu_get_the_times_of_the_schedule() -> None:
    """FLUX passes the plain grid and mu, whatever the scheduler is."""
    made = adams(nodes(Flow(shift=3.0), 4, "uniform_t"), order=1)
    scheduler = SearchedScheduler.from_schedules([made], prediction_type="flow_prediction")
    expected = torch.tensor([node.label for node in made.nodes[:-1]])
    for sigmas in ([1.0, 0.75, 0.5, 0.25], torch.linspace(1, 0.25, 4)):
        found, steps = retrieve_timesteps(scheduler, 4, "cpu", sigmas=sigmas, mu=1.15)
        assert steps == 4
        torch.testing.assert_close(found, expected)
    found, _ = retrieve_timesteps(scheduler, 4, "cpu", mu=0.3)
    torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match="times of its own: give num_inference_steps, not sigmas"):
        retrieve_timesteps(scheduler, 4, "cpu", sigmas=[1.0, 0.8, 0.5, 0.25])
    with pytest.raises(ValueError, match="no schedule for 5 evaluations; there are: 4"):
        retrieve_timesteps(scheduler, 5, "cpu", sigmas=[1.0, 0.8, 0.6, 0.4, 0.2])
    with pytest.raises(ValueError, match="does not support custom"):
        retrieve_timesteps(scheduler, timesteps=[999, 500], device="cpu")


@pytest.mark.parametrize("sigmas", [[], [[1.0, 0.5]], [1.0, float("nan")], [0.5, 1.0]])
def test_only_the_plain_grid_is_taken(sigmas: list[Any]) -> None:
    with pytest.raises(ValueError, match="times of its own"):
        plain_sigmas(sigmas)
