"""Trained denoisers as folders that diffusers loads."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from thalweg.checkpoints.atomic import write_text
from thalweg.diffusion.networks import null_label
from thalweg.diffusion.schedules import EDM, Flow, NoiseSchedule, VPDiscrete

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin

PREDICTION_TYPES = {"noise": "epsilon", "data": "sample", "v": "v_prediction"}
"""Names of predictions in the schedulers of diffusers with betas."""
CODE = "pipeline.py"
"""File with the code of a pipeline, where diffusers looks for it."""


def scheduler_for(schedule: NoiseSchedule, prediction: str) -> SchedulerMixin:
    """The plain scheduler of diffusers for a network: DDIM for a table of betas, Euler for EDM and flows.

    Raises:
        ValueError: If diffusers has none for the noise schedule and the prediction.
    """
    from diffusers import DDIMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler

    if isinstance(schedule, Flow) and prediction == "flow" and schedule.label_scale == 1000:
        return FlowMatchEulerDiscreteScheduler(shift=schedule.shift)
    if isinstance(schedule, VPDiscrete) and prediction in PREDICTION_TYPES:
        return DDIMScheduler(
            num_train_timesteps=schedule.n,
            beta_start=schedule.beta_start,
            beta_end=schedule.beta_end,
            beta_schedule=schedule.beta_schedule,
            trained_betas=None if schedule.betas is None else list(schedule.betas),
            prediction_type=PREDICTION_TYPES[prediction],
            clip_sample=False,
            set_alpha_to_one=True,
            timestep_spacing="trailing",
            rescale_betas_zero_snr=schedule.rescale_zero_snr,
        )
    if isinstance(schedule, EDM) and prediction in ("edm", "v"):
        return EDMEulerScheduler(
            sigma_min=schedule.t_end,
            sigma_max=schedule.t_start,
            sigma_data=schedule.sigma_data,
            prediction_type="epsilon" if prediction == "edm" else "v_prediction",
        )
    raise ValueError(
        f"diffusers has no scheduler for a network that predicts {prediction!r} on the schedule"
        f" {schedule.kind!r} ({schedule}); allowed: vp_discrete with {', '.join(PREDICTION_TYPES)}, edm"
        " with edm and v, and flow with flow and label_scale 1000"
    )


def pipeline_for(
    network: nn.Module, schedule: NoiseSchedule, prediction: str, class_names: Sequence[str] = ()
) -> DiffusionPipeline:
    """A diffusers pipeline around a trained network: DDPMPipeline where it has no classes.

    Raises:
        ValueError: If diffusers has no scheduler for it.
    """
    from diffusers import DDPMPipeline

    from thalweg.diffusion.pipeline import ClassImagePipeline

    network.eval()
    scheduler = scheduler_for(schedule, prediction)
    null = null_label(network)
    if null is None:
        return DDPMPipeline(unet=network, scheduler=scheduler)
    return ClassImagePipeline(
        unet=network, scheduler=scheduler, class_names=list(class_names), null_label=null
    )


def save_pipeline(
    folder: str | Path,
    network: nn.Module,
    schedule: NoiseSchedule,
    prediction: str,
    class_names: Sequence[str] = (),
) -> None:
    """Write a pipeline's folder: ``model_index.json``, ``unet/``, ``scheduler/``.

    Networks without classes load with ``DiffusionPipeline.from_pretrained(folder)``, those with classes with
    ``ClassImagePipeline.from_pretrained(folder)``. The latter bring its code along for places where this
    package is not installed: ``DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder,
    trust_remote_code=True)``.

    Raises:
        ValueError: If diffusers has no scheduler for it.
    """
    from thalweg.diffusion import pipeline

    made = pipeline_for(network, schedule, prediction, class_names)
    made.save_pretrained(folder)
    if isinstance(made, pipeline.ClassImagePipeline):
        write_text(Path(folder) / CODE, inspect.getsource(pipeline))
