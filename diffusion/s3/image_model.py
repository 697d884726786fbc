"""Samples, objective and examples of a pipeline of class-conditional or plain images.

Shapes: B samples, C channels, H = W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from thalweg.diffusion.draw import dtype_of, open_pipeline
from thalweg.diffusion.from_diffusers import network_of
from thalweg.diffusion.library import LibraryScheduler, run_library
from thalweg.diffusion.parameterization import Kind, to_data
from thalweg.diffusion.s3.examples import Denoiser as RefineDenoiser
from thalweg.diffusion.s3.examples import Examples
from thalweg.diffusion.s3.fit import Path as TeacherPath
from thalweg.diffusion.s3.fit import fit, record
from thalweg.diffusion.s3.genes import Genes, StepGenes
from thalweg.diffusion.s3.space import SearchSpace
from thalweg.diffusion.schedules import NoiseSchedule
from thalweg.diffusion.solvers.linear import Compilable, LinearSchedule
from thalweg.diffusion.solvers.sample import sample
from thalweg.diffusion.solvers.schedule import Node, SolverSchedule

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
        return to_data(self.network(x, label, self.labels), x, node.alpha, node.sigma, self.kind)

    def network(self, x: Tensor, label: Tensor, labels: Tensor | None) -> Tensor:
        """The network's answer (B, C, H, W) for classes (B,) or none, in the precision of the state."""
        inputs = x.to(self.pipeline.unet.dtype)
        if labels is None:
            output = self.pipeline.unet(inputs, label).sample[:, : x.shape[1]]
        else:
            output = self.pipeline.denoise(inputs, label, labels, self.guidance_scale)
        return output.to(x.dtype)


def load_pipeline(folder: str | Path, dtype: str = "float32") -> DiffusionPipeline:
    """A pipeline's folder; ours with classes, or DDPMPipeline.

    Raises:
        ValueError: If the folder holds another pipeline.
    """
    import json

    index = Path(folder) / "model_index.json"
    if not index.is_file():
        raise ValueError(f"{folder} is no pipeline's folder: it has no model_index.json")
    name = json.loads(index.read_text()).get("_class_name")
    if isinstance(name, list):  # [module, class] of code that travels with the folder
        name = name[-1]
    known = ("ClassImagePipeline", "DDPMPipeline")
    if name not in known:
        raise ValueError(f"{folder} holds a {name}, allowed: {', '.join(known)}")
    return open_pipeline(str(folder), dtype_of(dtype))


def teacher_schedule(noise: NoiseSchedule, steps: int = TEACHER_STEPS) -> SolverSchedule:
    """Many steps of third order with correctors, at equal distances of lambda."""
    space = SearchSpace(noise=noise, nfe=steps, min_gap=1e-3, t_end=(TEACHER_END, TEACHER_END))
    times = space.repair(space.grid("uniform_lambda", TEACHER_END))
    genes = Genes(times=times, steps=(StepGenes(order=3, corrector=True),) * steps)
    return space.schedule(genes)


class ImageSampler:
    """End states of a pipeline's network on fixed noises and, in turn, all classes.

    Args:
        device: Where the network runs.
        folder: Folder of a ``DDPMPipeline`` or our ``ClassImagePipeline``.
        count: Samples.
        seed: Seed of the noises.
        guidance_scale: Of classifier-free guidance; 1 for none.
        batch: Samples at once.
        dtype: Precision of the network.

    Raises:
        ValueError: If the folder holds another pipeline, or a network of EDM.
    """

    def __init__(
        self,
        device: str,
        folder: str | Path,
        count: int = 64,
        seed: int = 0,
        guidance_scale: float = 1.0,
        batch: int = 64,
        dtype: str = "float32",
    ) -> None:
        pipeline = load_pipeline(folder, dtype).to(device)
        # Convolutions take half the time so on a CPU.
        pipeline.unet.requires_grad_(False).to(memory_format=torch.channels_last)
        self.noise, kind = network_of(pipeline.scheduler.config)
        if self.noise.data_scale != 1:
            raise ValueError(f"{folder} has a network of EDM; draw it through its pipeline (PipelineSampler)")
        config = pipeline.unet.config
        shape = (count, config.in_channels, config.sample_size, config.sample_size)
        self.x_T = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
        names = pipeline.config.get("class_names")
        self.labels = torch.arange(count, device=device) % len(names) if names else None
        self.denoiser = ImageDenoiser(pipeline, kind, self.labels, guidance_scale)
        self.batch = batch
        self._paths: dict[int, TeacherPath] = {}

    def __len__(self) -> int:
        """Number of noises."""
        return len(self.x_T)

    @property
    def shown(self) -> list[int | str | None]:
        """Label of each sample, None for a network without classes."""
        return [None] * len(self) if self.labels is None else list(self.labels.tolist())

    def teacher(self, steps: int = TEACHER_STEPS) -> SolverSchedule:
        """A schedule that leaves next to no error."""
        return teacher_schedule(self.noise, steps)

    def draw(self, schedule: Compilable, count: int | None = None) -> Tensor:
        """End states of the first ``count`` samples, (count, C, H, W), not clipped."""
        count = len(self) if count is None else min(count, len(self))
        parts = [slice(i, min(i + self.batch, count)) for i in range(0, count, self.batch)]
        with torch.no_grad():
            ends = [sample(schedule, self.denoiser.on(rows), self.x_T[rows])[-1] for rows in parts]
        return torch.cat(ends)

    @property
    def config(self) -> Mapping[str, Any]:
        """Configuration of the network's own scheduler."""
        return self.denoiser.pipeline.scheduler.config  # type: ignore[attr-defined]

    def draw_library(
        self, entry: LibraryScheduler, nfe: int, count: int | None = None, seed: int = 0
    ) -> Tensor:
        """End states of the first ``count`` samples with a scheduler of diffusers, (count, C, H, W).

        Args:
            entry: The scheduler.
            nfe: Network evaluations per sample.
            count: Samples; all by default.
            seed: Of the noise that stochastic schedulers add.

        Raises:
            ValueError: If it cannot do with so many evaluations.
            ArithmeticError: If a result is not finite.
        """
        of = self.denoiser
        options = {"nfe": nfe, "guidance_scale": of.guidance_scale, "seed": seed, "batch": self.batch}
        labels = None if self.labels is None else self.labels[:count]
        return run_library(entry, of.pipeline, self.x_T[:count], labels, **options)

    def fit(
        self, schedule: Compilable, count: int | None = None, steps: int = TEACHER_STEPS
    ) -> tuple[LinearSchedule, Tensor]:
        """The nodes of a schedule with the weights that follow the teacher best on the first samples.

        Args:
            schedule: Tells the nodes.
            count: Samples; all by default.
            steps: Evaluations of the teacher per sample; it runs once.

        Returns:
            The schedule and its end states, (count, C, H, W), not clipped.
        """
        count = len(self) if count is None else min(count, len(self))
        denoiser, path = self.denoiser.on(slice(0, count)), self.path(steps).first(count)
        return fit(schedule, denoiser, self.x_T[:count], path, batch=self.batch)

    def path(self, steps: int = TEACHER_STEPS) -> TeacherPath:
        """The teacher's path of all samples; it runs once."""
        if steps not in self._paths:
            self._paths[steps] = record(self.teacher(steps), self.denoiser, self.x_T, self.batch)
        return self._paths[steps]

    def images(self, states_BCHW: Tensor) -> Tensor:
        """End states as images from 0 to 1."""
        return (states_BCHW / 2 + 0.5).clamp(0, 1)


def image_examples(
    device: str,
    folder: str,
    count: int = 128,
    seed: int = 0,
    guidance_scale: float = 1.0,
    teacher_steps: int = TEACHER_STEPS,
    batch: int = 64,
) -> tuple[RefineDenoiser, Examples]:
    """What :func:`thalweg.diffusion.s3.refine.refine` learns from: a differentiable denoiser, and examples.

    Classes come in turn, so that any run of as many examples has all of them: ``examples.pick(slice(0, n))``
    to train and ``examples.pick(slice(n, None))`` to validate share no noise. Other seeds give other noises.

    Args:
        device: Where the network runs.
        folder: Folder of a ``DDPMPipeline`` or our ``ClassImagePipeline``.
        count: Examples.
        seed: Seed of the noises.
        guidance_scale: Of classifier-free guidance.
        teacher_steps: Evaluations of the teacher per example.
        batch: Examples at once, for the teacher.

    Returns:
        Data prediction of (x, alpha, sigma, label, classes), or without classes for a network that has none,
        that differentiates by all but the network's weights; and noises with their ends and classes.
    """
    sampler = ImageSampler(device, folder, count, seed, guidance_scale, batch)
    target = sampler.draw(sampler.teacher(teacher_steps))
    examples = Examples(x_T=sampler.x_T, target=target, condition=sampler.labels)
    of = sampler.denoiser

    def denoise(
        x: Tensor, alpha: Tensor, sigma: Tensor, label: Tensor | None, labels: Tensor | None = None
    ) -> Tensor:
        if label is None:
            raise ValueError("the network needs the labels of the nodes: give refine the noise_schedule")
        output = of.network(x, label.to(x), labels)
        return to_data(output, x, alpha.to(x), sigma.to(x), of.kind)

    return denoise, examples
