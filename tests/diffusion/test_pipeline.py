"""Export: folders that diffusers loads, with equal answers, and the pipeline that draws from them."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDPMPipeline, DiffusionPipeline, DiTTransformer2DModel, UNet2DModel

from thalweg.diffusion.export import pipeline_for, save_pipeline, scheduler_for
from thalweg.diffusion.order import generator
from thalweg.diffusion.pipeline import ClassImagePipeline
from thalweg.diffusion.schedules import Flow, NoiseSchedule, VPCosine, VPDiscrete

SCHEDULE = VPDiscrete(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
NAMES = ["zero", "one", "two"]


def unet(classes: int | None = 4) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4, num_class_embeds=classes,
    )  # fmt: skip


def dit() -> DiTTransformer2DModel:
    torch.manual_seed(0)
    network = DiTTransformer2DModel(
        sample_size=8, in_channels=1, out_channels=2, num_layers=1, num_attention_heads=2,
        attention_head_dim=8, num_embeds_ada_norm=3,
    )  # fmt: skip
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)  # a new DiT answers zero
    return network


def draw(pipeline: DiffusionPipeline, **options: Any) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    given = {"generator": generator(1), "num_inference_steps": 3, "output_type": "pt"}
    return pipeline(**(given | options)).images


@pytest.mark.parametrize("make", [unet, dit])
@pytest.mark.parametrize(("schedule", "prediction"), [(SCHEDULE, "noise"), (SCHEDULE, "v"), (Flow(), "flow")])
def test_an_exported_folder_draws_the_same_images(
    make: Any, schedule: NoiseSchedule, prediction: str, tmp_path: Path
) -> None:
    network = make()
    save_pipeline(tmp_path, network, schedule, prediction, NAMES)
    options: dict[str, Any] = {"class_labels": ["two", "zero", 1], "guidance_scale": 2.0}
    expected = draw(pipeline_for(network, schedule, prediction, NAMES), **options)
    assert expected.std() > 0.05
    here = ClassImagePipeline.from_pretrained(tmp_path)
    assert torch.equal(draw(here, **options), expected)
    elsewhere = DiffusionPipeline.from_pretrained(
        tmp_path, custom_pipeline=str(tmp_path), trust_remote_code=True
    )
    assert type(elsewhere).__module__ != ClassImagePipeline.__module__
    assert torch.equal(draw(elsewhere, **options), expected)


def test_parts_of_the_folder_load_on_their_own(tmp_path: Path) -> None:
    network = unet()
    save_pipeline(tmp_path, network, SCHEDULE, "v", NAMES)
    x, t, labels = torch.randn(3, 1, 8, 8), torch.tensor([3.0, 500.0, 999.0]), torch.tensor([0, 1, 3])
    with torch.no_grad():
        expected = network(x, t, class_labels=labels).sample
        loaded = UNet2DModel.from_pretrained(tmp_path, subfolder="unet")
        assert torch.equal(loaded(x, t, class_labels=labels).sample, expected)
    scheduler = diffusers.UniPCMultistepScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert scheduler.config.prediction_type == "v_prediction"


def test_a_network_without_classes_becomes_a_stock_pipeline(tmp_path: Path) -> None:
    network = unet(classes=None)
    save_pipeline(tmp_path, network, SCHEDULE, "noise")
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded) is DDPMPipeline
    loaded.set_progress_bar_config(disable=True)
    first = loaded(batch_size=2, generator=generator(1), num_inference_steps=3, output_type="np").images
    ours = ClassImagePipeline(unet=network, scheduler=scheduler_for(SCHEDULE, "noise"))
    second = draw(ours, batch_size=2, output_type="np")
    assert abs(first - second).max() < 1e-6


def test_the_scheduler_has_the_noise_levels_of_training() -> None:
    scheduler = scheduler_for(SCHEDULE, "noise")
    steps = torch.arange(1000)
    t = (steps.double() + 1) / 1000
    alpha = torch.as_tensor(SCHEDULE.alpha(t.numpy()))
    torch.testing.assert_close(scheduler.alphas_cumprod.double().sqrt(), alpha, atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.as_tensor(SCHEDULE.label(t.numpy())), steps.double(), atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    "name",
    [
        "DDPMScheduler",
        "DDIMScheduler",
        "PNDMScheduler",
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "LMSDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "DEISMultistepScheduler",
        "UniPCMultistepScheduler",
    ],
)
def test_stock_schedulers_fit_in(name: str) -> None:
    pipeline = pipeline_for(unet(), SCHEDULE, "noise", NAMES)
    pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config)
    images = draw(pipeline, class_labels=[0, 1], num_inference_steps=8)
    assert images.shape == (2, 1, 8, 8)
    assert images.isfinite().all()


def test_guidance_moves_away_from_no_class() -> None:
    network, x, t = unet().eval(), torch.randn(2, 1, 8, 8), torch.tensor(500)
    pipeline = ClassImagePipeline(network, scheduler_for(SCHEDULE, "noise"), NAMES, null_label=3)
    labels = torch.tensor([0, 2])
    with torch.no_grad():
        with_class = network(x, t, class_labels=labels).sample
        without = network(x, t, class_labels=torch.tensor([3, 3])).sample
        guided = pipeline.denoise(x, t, labels, 3.0)
    torch.testing.assert_close(guided, without + 3.0 * (with_class - without))


def test_classes_are_names_or_labels() -> None:
    pipeline = pipeline_for(unet(), SCHEDULE, "noise", NAMES)
    assert isinstance(pipeline, ClassImagePipeline)
    assert pipeline.labels(["two", 0], 2).tolist() == [2, 0]
    assert pipeline.labels("one", 3).tolist() == [1, 1, 1]
    assert pipeline.labels(None, 2).tolist() == [3, 3]
    with pytest.raises(ValueError, match="class 'four' is unknown, allowed: zero, one, two"):
        pipeline.labels("four", 1)
    with pytest.raises(ValueError, match="class 4 is unknown"):
        pipeline.labels([4], 1)
    with pytest.raises(ValueError, match="2 class_labels for 3 images"):
        pipeline.labels([0, 1], 3)
    with pytest.raises(ValueError, match="latents have shape"):
        draw(pipeline, latents=torch.zeros(1, 1, 4, 4))


def test_what_diffusers_cannot_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="predicts 'flow' on the schedule 'vp_discrete'"):
        scheduler_for(SCHEDULE, "flow")
    with pytest.raises(ValueError, match="'vp_cosine'"):
        scheduler_for(VPCosine(), "noise")
