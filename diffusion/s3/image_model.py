"""The objective of a search on a pipeline of class-conditional or plain images.

Shapes: B samples, C channels, H = W pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from thalweg.diffusion.from_diffusers import network_of
from thalweg.diffusion.parameterization import Kind, to_data
from thalweg.diffusion.s3.genes import Genes, StepGenes
from thalweg.diffusion.s3.objective import TeacherError
from thalweg.diffusion.s3.space import SearchSpace
from thalweg.diffusion.schedules import NoiseSchedule
from thalweg.diffusion.solvers.sample import Denoiser, sample
from thalweg.diffusion.solvers.schedule import Node

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

TEACHER_STEPS = 60
TEACHER_END = 2e-3


class ImageDenoiser:
    """Data prediction of a pipeline's network for fixed labels.

    Args:
        pipeline: ``DDPMPipeline`` or our ``ClassImagePipeline``.
        kind: What the network predicts.
        labels: Labels of the samples, shape (B,); None for a network without classes.
        guidance_scale: Of classifier-free guidance; 1 for none.
    """

    def __init__(
        self, pipeline: DiffusionPipeline, kind: Kind, labels: Tensor | None, guidance_scale: float = 1.0
    ) -> None:
        self.pipeline = pipeline
        self.kind = kind
        self.labels = labels
        self.guidance_scale = guidance_scale

    def on(self, rows: slice) -> ImageDenoiser:
        """The same for a part of the samples."""
        labels = None if self.labels is None else self.labels[rows]
        return ImageDenoiser(self.pipeline, self.kind, labels, self.guidance_scale)

    def __call__(self, x: Tensor, node: Node) -> Tensor:
        """Data prediction at a state (B, C, H, W) of a node, in the precision of the state."""
        label = torch.tensor(node.label, dtype=torch.float32, device=x.device)
        inputs = x.to(self.pipeline.unet.dtype)
        if self.labels is None:
            output = self.pipeline.unet(inputs, label).sample[:, : x.shape[1]]
        else:
            output = self.pipeline.denoise(inputs, label, self.labels, self.guidance_scale)
        return to_data(output.to(x.dtype), x, node.alpha, node.sigma, self.kind)


def load_pipeline(folder: str | Path) -> DiffusionPipeline:
    """A pipeline's folder; ours with classes, or DDPMPipeline.

    Raises:
        ValueError: If the folder holds another pipeline.
    """
    import json

    from diffusers import DDPMPipeline

    from thalweg.diffusion.pipeline import ClassImagePipeline

    index = Path(folder) / "model_index.json"
    if not index.is_file():
        raise ValueError(f"{folder} is no pipeline's folder: it has no model_index.json")
    name = json.loads(index.read_text()).get("_class_name")
    if isinstance(name, list):  # [module, class] of code that travels with the folder
        name = name[-1]
    known = {"ClassImagePipeline": ClassImagePipeline, "DDPMPipeline": DDPMPipeline}
    if name not in known:
        raise ValueError(f"{folder} holds a {name}, allowed: {', '.join(known)}")
    return known[name].from_pretrained(folder)


def scheduler_config(folder: str | Path) -> dict[str, Any]:
    """What a pipeline's scheduler says about its network.

    Raises:
        ValueError: If the folder holds no pipeline that is understood.
    """
    return dict(load_pipeline(folder).scheduler.config)


def teacher_end(noise: NoiseSchedule, denoiser: Denoiser, x_T: Tensor, steps: int = TEACHER_STEPS) -> Tensor:
    """End states of many steps of third order with correctors."""
    space = SearchSpace(noise=noise, nfe=steps, min_gap=1e-3, t_end=(TEACHER_END, TEACHER_END))
    times = space.repair(space.grid("uniform_lambda", TEACHER_END))
    genes = Genes(times=times, steps=(StepGenes(order=3, corrector=True),) * steps)
    with torch.no_grad():
        return sample(space.schedule(genes), denoiser, x_T)[-1]


def image_objective(
    device: str,
    folder: str,
    count: int = 64,
    seed: int = 0,
    guidance_scale: float = 1.0,
    teacher_steps: int = TEACHER_STEPS,
    batch: int = 64,
) -> TeacherError:
    """Distance to the teacher on fixed noises and, in turn, all classes.

    Args:
        device: Where the network runs.
        folder: Pipeline's folder.
        count: Samples.
        seed: Seed of the noises.
        guidance_scale: Of classifier-free guidance.
        teacher_steps: Evaluations of the teacher per sample.
        batch: Samples at once.
    """
    pipeline = load_pipeline(folder).to(device)
    noise, kind = network_of(pipeline.scheduler.config)
    config = pipeline.unet.config
    shape = (count, config.in_channels, config.sample_size, config.sample_size)
    x_T = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
    names = pipeline.config.get("class_names")
    labels = torch.arange(count, device=device) % len(names) if names else None
    denoiser = ImageDenoiser(pipeline, kind, labels, guidance_scale)
    parts = [slice(i, i + batch) for i in range(0, count, batch)]
    ends = [teacher_end(noise, denoiser.on(rows), x_T[rows], teacher_steps) for rows in parts]
    return TeacherError(denoiser, x_T, torch.cat(ends), batch=batch)
