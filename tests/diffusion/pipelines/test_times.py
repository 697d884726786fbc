"""Times of a schedule in pipelines of flows that shift theirs, or pass sigmas: they stay its own."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from pipeline_schedules import STEPS, nodes_of, searched, wrapped
from tiny_pipelines import build, inputs, vae

from thalweg.diffusion.draw import choose_scheduler, scheduler_of
from thalweg.diffusion.from_diffusers import network_of
from thalweg.diffusion.solvers.named import named

DYNAMIC = {"use_dynamic_shifting": True, "shift": 3.0, "base_shift": 0.5, "max_shift": 1.15}


def flux() -> tuple[FluxPipeline, dict[str, Any]]:
    """A pipeline that always passes sigmas and mu, and what it is called with."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
    ).eval()  # fmt: skip
    for parameter in transformer.proj_out.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # a new one answers zero
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**DYNAMIC), transformer=transformer, vae=vae(),
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    words, pooled = torch.randn(1, 3, 8, generator=generator), torch.randn(1, 8, generator=generator)
    given = {"prompt_embeds": words, "pooled_prompt_embeds": pooled, "height": 16, "width": 16}
    return pipe, {**given, "output_type": "latent", "num_inference_steps": STEPS}


def draw_flux(pipe: FluxPipeline, given: dict[str, Any], **options: Any) -> np.ndarray:
    return pipe(**given, **options, generator=torch.Generator().manual_seed(1)).images.numpy()


def test_flux_with_dynamic_shifting() -> None:
    pipe, given = flux()
    theirs = pipe.scheduler
    expected = draw_flux(pipe, given)
    ours = wrapped(named("flow_euler", nodes_of(theirs)), theirs)
    pipe.scheduler = ours
    found = draw_flux(pipe, given)
    assert expected.std() > 0.02
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)
    assert torch.equal(pipe.scheduler.timesteps, theirs.timesteps)
    pipe.scheduler = searched(theirs)
    own = [node.label for node in pipe.scheduler.schedules[STEPS].nodes[:-1]]
    assert np.isfinite(draw_flux(pipe, given)).all()
    np.testing.assert_allclose(pipe.scheduler.timesteps, own, rtol=1e-6)
    with pytest.raises(ValueError, match="times of its own"):
        draw_flux(pipe, given, sigmas=[1.0, 0.9, 0.5, 0.3, 0.1])


def test_stable_diffusion_3_with_dynamic_shifting(tmp_path: Path) -> None:
    pipe = build("sd3", tmp_path)
    pipe.scheduler = theirs = FlowMatchEulerDiscreteScheduler(**DYNAMIC)

    def draw(**options: Any) -> np.ndarray:
        return pipe(**inputs("sd3"), num_inference_steps=STEPS, **options).images

    expected = draw()
    flow, _ = network_of(theirs.config)
    assert (flow.shift, float(flow.sigma(1.0))) == (pytest.approx(np.exp(1.15)), 1.0)
    pipe.scheduler = wrapped(named("flow_euler", nodes_of(theirs)), theirs)
    np.testing.assert_allclose(draw(), expected, rtol=0, atol=2e-4)
    np.testing.assert_array_equal(draw(mu=0.2), draw())


def test_labels_that_were_moved_from_their_times_are_taken_and_others_are_not(tmp_path: Path) -> None:
    """Refinement with offsets tells the network other labels than those of the nodes."""
    pipe = build("sd", tmp_path)
    schedule = searched(pipe.scheduler).schedules[STEPS]
    moved = [node if i else replace(node, label=node.label - 9) for i, node in enumerate(schedule.nodes)]
    scheduler_of(pipe.scheduler.config, [replace(schedule, nodes=tuple(moved))])
    without = [replace(node, t=None) for node in moved]
    with pytest.raises(ValueError, match=r"is for another noise schedule: at node 0 \(label 990\)"):
        scheduler_of(pipe.scheduler.config, [replace(schedule, nodes=tuple(without))])


def test_a_broken_file_is_named_when_a_scheduler_is_chosen(tmp_path: Path) -> None:
    pipe = build("sd", tmp_path)
    file = tmp_path / "scheduler" / "scheduler_config.json"
    searched(pipe.scheduler).save_pretrained(file.parent)
    for text in (file.read_text()[:500], "[]", "{}"):
        file.write_text(text)
        with pytest.raises(ValueError, match=f"{file} is no scheduler's file"):
            choose_scheduler(pipe, str(tmp_path))
