"""Schedules whose first step does without the network, in pipelines: as many calls as evaluations."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionImg2ImgPipeline, UNet2DModel
from tiny_pipelines import build, inputs
from torch import Tensor

from thalweg.diffusion.draw import check_network, network, scheduler_of
from thalweg.diffusion.from_diffusers import KINDS, network_of
from thalweg.diffusion.pipeline import ClassImagePipeline
from thalweg.diffusion.solvers.adams import adams
from thalweg.diffusion.solvers.grids import nodes
from thalweg.diffusion.solvers.sample import sample
from thalweg.diffusion.solvers.schedule import Node, SolverSchedule
from thalweg.diffusion.solvers.scheduler import SearchedScheduler
from thalweg.diffusion.solvers.tail import from_node

NFE = 4


def schedule_for(pipe: DiffusionPipeline, first: str, order: int = 1) -> SolverSchedule:
    noise = network_of(pipe.scheduler.config)[0]
    grid = nodes(noise, NFE + 1, "uniform_t")
    return replace(adams(grid, order=order, corrector=order > 1), first=first)


def scheduler(pipe: DiffusionPipeline, schedule: Any, mean: Any = None) -> SearchedScheduler:
    noise, kind = network_of(pipe.scheduler.config)
    names = {kind: name for name, kind in KINDS.items()}
    return SearchedScheduler.from_schedules(
        [schedule], prediction_type=names[kind], noise_schedule=noise.to_dict(), mean=mean
    )


@contextmanager
def counted(pipe: DiffusionPipeline) -> Iterator[list[float]]:
    """Labels that the network is asked for."""
    asked: list[float] = []

    def see(_: Any, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        label = given["timestep"] if "timestep" in given else args[1]
        asked.append(float(label.flatten()[0]))

    handle = network(pipe).register_forward_pre_hook(see, with_kwargs=True)
    try:
        yield asked
    finally:
        handle.remove()


def latents(pipe: DiffusionPipeline) -> Tensor:
    channels = network(pipe).config.in_channels
    return torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(("first", "mean"), [("zero", None), ("mean", [[[0.1]], [[-0.3]], [[0.2]], [[0.0]]])])
@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3"])
def test_the_network_is_asked_nfe_times_from_the_second_node_on(
    name: str, first: str, mean: Any, tmp_path: Path
) -> None:
    """With steps of first order what follows is the schedule from node 1 on."""
    pipe = build(name, tmp_path)
    schedule = schedule_for(pipe, first)
    ours, rest = scheduler(pipe, schedule, mean), scheduler(pipe, from_node(schedule, 1))
    noise = latents(pipe)
    entered = ours.prepare_latents(noise)
    data = torch.zeros(4, 1, 1) if mean is None else torch.tensor(mean)
    a, b = schedule.nodes[:2]
    weight = b.alpha - a.alpha * b.sigma / a.sigma
    torch.testing.assert_close(entered, b.sigma / a.sigma * noise + weight * data.expand_as(noise))
    pipe.scheduler = ours
    with counted(pipe) as asked:
        start = entered if name == "sd3" else noise
        found = [pipe(**inputs(name), num_inference_steps=NFE, latents=start).images for _ in range(2)]
    assert asked == pytest.approx([node.label for node in schedule.nodes[1:-1]] * 2)
    pipe.scheduler = rest
    expected = pipe(**inputs(name), num_inference_steps=NFE, latents=entered).images
    np.testing.assert_allclose(found[0], expected, rtol=0, atol=2e-5)
    np.testing.assert_array_equal(found[1], found[0])


def test_pipelines_that_keep_the_scaled_state_make_the_step_once(tmp_path: Path) -> None:
    pipe = build("dit", tmp_path)
    schedule = schedule_for(pipe, "zero")
    with counted(pipe) as asked:
        pipe.scheduler = scheduler(pipe, schedule)
        found = pipe(**inputs("dit"), num_inference_steps=NFE).images
        assert len(asked) == NFE
        pipe.scheduler = scheduler(pipe, schedule)
        pipe.scheduler.step = None  # nothing but the entry is asked of it
        entered = pipe.scheduler.scale_model_input(torch.ones(2, 4, 8, 8), pipe.scheduler.timesteps[0])
    assert torch.allclose(
        entered, torch.full_like(entered, schedule.nodes[1].sigma / schedule.nodes[0].sigma)
    )
    assert np.isfinite(found).all()


@pytest.mark.parametrize("first", ["zero", "mean"])
def test_later_steps_use_what_stands_for_the_first_prediction(first: str) -> None:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, layers_per_block=1,
    ).eval()  # fmt: skip
    pipe = ClassImagePipeline(unet=unet, scheduler=DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    schedule, mean = schedule_for(pipe, first, order=3), torch.full((1, 8, 8), 0.3)
    pipe.scheduler = scheduler(pipe, schedule, mean.tolist())
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with counted(pipe) as asked:
        found = pipe(latents=noise, num_inference_steps=NFE, output_type="pt").images
    assert len(asked) == schedule.nfe == NFE

    @torch.no_grad()
    def denoise(x: Tensor, node: Node) -> Tensor:
        return (x - node.sigma * unet(x, torch.tensor(node.label)).sample) / node.alpha

    truth = sample(schedule, denoise, noise, mean)[-1]
    torch.testing.assert_close(found, (truth / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-4)


def test_from_an_image_only_the_network_steps(tmp_path: Path) -> None:
    sd = build("sd", tmp_path)
    pipe = StableDiffusionImg2ImgPipeline(**sd.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    schedule = schedule_for(pipe, "zero")
    rest = from_node(schedule, 1)
    found = {}
    for strength in (0.5, 1.0):
        for key, made in (("first", schedule), ("rest", rest)):
            pipe.scheduler = scheduler(sd, made)
            given = {k: v for k, v in inputs("sd").items() if k not in ("height", "width")}
            with counted(pipe) as asked:
                found[key] = pipe(**given, image=image, strength=strength, num_inference_steps=NFE).images
            assert len(asked) == strength * NFE
        np.testing.assert_array_equal(found["first"], found["rest"])


def test_pipelines_that_cannot_be_given_latents_are_refused(tmp_path: Path) -> None:
    pipe = build("ddpm", tmp_path)
    pipe.scheduler = scheduler(pipe, schedule_for(pipe, "zero"))
    with pytest.raises(ValueError, match=r"without the network.*latents=scheduler\.prepare_latents\(noise\)"):
        pipe(**inputs("ddpm"), num_inference_steps=NFE)
    with pytest.raises(ValueError, match="starts from the mean of the data: give the scheduler mean"):
        scheduler(build("ddpm", tmp_path), schedule_for(pipe, "mean"))


def test_it_is_saved_with_its_mean_and_checked_against_its_network(tmp_path: Path) -> None:
    pipe = build("sd", tmp_path)
    schedule = schedule_for(pipe, "mean")
    config = dict(pipe.scheduler.config)
    made = scheduler(pipe, schedule, [[[0.1]]] * 4)
    check_network(made, config)
    made.save_pretrained(tmp_path / "scheduler")
    loaded = SearchedScheduler.from_pretrained(tmp_path / "scheduler")
    noise = latents(pipe)
    assert torch.equal(loaded.prepare_latents(noise, NFE), made.prepare_latents(noise))
    # Its first node may be anything, since nobody is asked there.
    bare = replace(
        schedule, first="zero", nodes=(replace(schedule.nodes[0], label=None, t=None), *schedule.nodes[1:])
    )
    assert len(scheduler_of(config, [bare]).timesteps) == NFE
