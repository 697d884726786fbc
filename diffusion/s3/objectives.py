"""What a search can minimise, by name: distances to a teacher, distances of distributions, and rewards.

Each function here makes an objective for a worker (see :class:`thalweg.diffusion.s3.pool.ObjectiveRef`) of
its own options and those of :func:`thalweg.diffusion.s3.samplers.open_sampler`. All of them judge by the
first ``count`` of the same noises and classes or prompts, take schedules of both kinds, run pixel pipelines
directly and all others as a black box, and never differentiate.

Shapes: B samples, C channels, H = W pixels.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from thalweg.diffusion.metrics.distance import frechet, gaussian, jackknife, polynomial_mmd
from thalweg.diffusion.metrics.features import embed, extractor
from thalweg.diffusion.metrics.quality import real_images
from thalweg.diffusion.s3.image_model import TEACHER_STEPS
from thalweg.diffusion.s3.objective import Score, summarise
from thalweg.diffusion.s3.samplers import SampleObjective, Sampler, finite, hopeless, open_sampler

OBJECTIVES: dict[str, str] = {
    name: f"{__name__}:{name}" for name in ("teacher", "multiscale", "features", "fid", "kid", "reward")
}
"""Functions that make objectives, as ``module:function``, by name."""

LEVELS = 4
"""Most levels of the pyramid of :func:`multiscale`."""


def teacher(device: str, folder: str, teacher_steps: int = TEACHER_STEPS, **sampling: Any) -> SampleObjective:
    """Median L2 distance to the teacher, of latents where there are some.

    Args:
        device: Where the network runs.
        folder: Folder of a pipeline, or its name on the Hub.
        teacher_steps: Evaluations of the teacher per sample.
        sampling: Of :func:`open_sampler`.
    """
    return _to_teacher(device, folder, teacher_steps, l2_distance, sampling)


def multiscale(
    device: str, folder: str, teacher_steps: int = TEACHER_STEPS, **sampling: Any
) -> SampleObjective:
    """Median of :func:`pyramid_distance` to the teacher, of latents where there are some.

    Args:
        device: Where the network runs.
        folder: Folder of a pipeline, or its name on the Hub.
        teacher_steps: Evaluations of the teacher per sample.
        sampling: Of :func:`open_sampler`.
    """
    return _to_teacher(device, folder, teacher_steps, pyramid_distance, sampling)


def features(
    device: str,
    folder: str,
    teacher_steps: int = TEACHER_STEPS,
    features: str = "classifier",
    images: str = "mnist5k",
    weights: str | None = None,
    **sampling: Any,
) -> SampleObjective:
    """Median distance to the teacher's images in a space of features.

    Args:
        device: Where the networks run.
        folder: Folder of a pipeline, or its name on the Hub.
        teacher_steps: Evaluations of the teacher per sample.
        features: Extractor, see :func:`thalweg.diffusion.metrics.features.extractor`.
        images: What a classifier is trained on.
        weights: File of the extractor's weights.
        sampling: Of :func:`open_sampler`.
    """
    sampler = open_sampler(device, folder, **sampling, output="image")
    states = sampler.draw(sampler.teacher(teacher_steps))
    space = _Space(sampler, states, features, images, weights, device)
    target = space(states)

    def judge(found: Tensor) -> Score:
        return summarise((space(found) - target[: len(found)]).norm(dim=1))

    return SampleObjective(sampler, finite(judge))


def fid(device: str, folder: str, **options: Any) -> SampleObjective:
    """Frechet distance of the samples' features to those of real images, or of the teacher's samples.

    It falls with the number of samples; only scores on equal numbers can be compared.

    Args:
        device: Where the networks run.
        folder: Folder of a pipeline, or its name on the Hub.
        options: Of :func:`distribution`.
    """
    return distribution("fid", device, folder, **options)


def kid(device: str, folder: str, **options: Any) -> SampleObjective:
    """Kernel distance (KID) of the samples' features, without bias.

    Args:
        device: Where the networks run.
        folder: Folder of a pipeline, or its name on the Hub.
        options: Of :func:`distribution`.
    """
    return distribution("kid", device, folder, **options)


def distribution(
    kind: Literal["fid", "kid"],
    device: str,
    folder: str,
    reference: str = "mnist5k",
    teacher_steps: int = TEACHER_STEPS,
    features: str = "classifier",
    images: str | None = None,
    weights: str | None = None,
    **sampling: Any,
) -> SampleObjective:
    """Distance of the distribution of the samples' features; its noise is from a jackknife.

    That is the error of the distance itself. Two schedules on the same noises share most of it, so that their
    difference is known better than the noises of both say.

    Args:
        kind: ``fid`` or ``kid``.
        device: Where the networks run.
        folder: Folder of a pipeline, or its name on the Hub.
        reference: Packaged image set, folder of images, or ``teacher`` for what it makes of the same noises.
        teacher_steps: Evaluations of the teacher per sample.
        features: Extractor, see :func:`thalweg.diffusion.metrics.features.extractor`.
        images: What a classifier is trained on; the reference by default, mnist5k for the teacher.
        weights: File of the extractor's weights.
        sampling: Of :func:`open_sampler`; ``count`` should be some hundreds.
    """
    sampler = open_sampler(device, folder, **sampling, output="image")
    paired = reference == "teacher"
    # Without the teacher's samples, one is enough to know channels and size.
    states = sampler.draw(sampler.teacher(teacher_steps if paired else 2), None if paired else 1)
    trained_on = images or ("mnist5k" if paired else reference)
    space = _Space(sampler, states, features, trained_on, weights, device)
    if paired:
        real = space(states)
    else:
        real = embed(space.network, real_images(reference, size=space.size, channels=space.channels)[0])
    everything = gaussian(real)

    def distance(found: Tensor, rows: Tensor) -> float:
        of = real[rows] if paired else real  # pairs from the same noise, so that chance cancels
        if kind == "kid":
            return polynomial_mmd(found[rows], of, paired=paired)
        return frechet(gaussian(found[rows]), gaussian(of) if paired else everything)

    def judge(states: Tensor) -> Score:
        found = space(states)
        value = distance(found, torch.arange(len(found)))
        error = jackknife(lambda rows: distance(found, rows), len(found))
        return Score(value=value, noise=error, count=len(found))

    return SampleObjective(sampler, finite(judge))


def reward(device: str, folder: str, function: str, **sampling: Any) -> SampleObjective:
    """Minus the mean of a reward that images get.

    Args:
        device: Where the network runs.
        folder: Folder of a pipeline, or its name on the Hub.
        function: ``module:function`` from images (B, C, H, W), floats from 0 to 1, to scores (B,), more is
            better; one with two arguments is also given the list of what they show, classes or prompts.
        sampling: Of :func:`open_sampler`.

    Raises:
        ValueError: If the function cannot be imported, or does not give one score for each image.
    """
    module, _, name = function.partition(":")
    try:
        call = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"reward {function!r} is not module:function: {error}") from error
    with_content = len(inspect.signature(call).parameters) > 1
    sampler = open_sampler(device, folder, **sampling, output="image")

    def judge(found: Tensor) -> Score:
        images = sampler.images(found)
        with torch.no_grad():
            scores = call(images, sampler.shown[: len(images)]) if with_content else call(images)
        values = torch.as_tensor(scores).detach().double().cpu()
        if values.shape != (len(images),):
            raise ValueError(
                f"reward {function!r} gave {tuple(values.shape)} scores for {len(images)} images"
            )
        if not torch.isfinite(values).all():
            return hopeless(len(values))
        error = float(values.std()) / len(values) ** 0.5 if len(values) > 1 else float("inf")
        return Score(value=-float(values.mean()), noise=error, count=len(values))

    return SampleObjective(sampler, finite(judge))


def l2_distance(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distance of each sample, (B,)."""
    return (a - b).flatten(1).norm(dim=1)


def pyramid_distance(a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
    """Root mean squares at several resolutions, halved by averaging, and mean absolute errors of gradients.

    sum_k rms(P_k (a - b)) + mean |d_x (a - b)| + mean |d_y (a - b)|, each for one sample, (B,). Errors of
    colour and shape count at all levels, those of single pixels at the first only.

    Raises:
        ValueError: If the samples are no images or latents of that layout.
    """
    if a_BCHW.ndim != 4:
        raise ValueError(f"samples have shape {tuple(a_BCHW.shape)}, needed: (B, C, H, W)")
    x = (a_BCHW - b_BCHW).float()
    edges = [(x.diff(dim=d)).abs().flatten(1).mean(dim=1) for d in (2, 3) if x.shape[d] > 1]
    total = sum(edges, torch.zeros(len(x), device=x.device))
    for _ in range(LEVELS):
        total = total + x.square().flatten(1).mean(dim=1).sqrt()
        if min(x.shape[2:]) < 2:
            break
        x = F.avg_pool2d(x, 2)
    return total


def _to_teacher(
    device: str,
    folder: str,
    steps: int,
    distance: Callable[[Tensor, Tensor], Tensor],
    sampling: dict[str, Any],
) -> SampleObjective:
    sampler = open_sampler(device, folder, **sampling, output="latent")
    target = sampler.draw(sampler.teacher(steps))
    return SampleObjective(sampler, lambda found: summarise(distance(found, target[: len(found)])), target)


class _Space:
    """Features of end states, as bytes, in double precision."""

    def __init__(
        self, sampler: Sampler, like: Tensor, name: str, images: str, weights: str | None, device: str
    ) -> None:
        self.sampler = sampler
        self.channels, self.size = like.shape[1], like.shape[-1]
        self.network = extractor(
            name, images=images, size=self.size, channels=self.channels, weights=weights, device=device
        )

    def __call__(self, states: Tensor) -> Tensor:
        return embed(self.network, as_bytes(self.sampler.images(states)))


def as_bytes(images_BCHW: Tensor) -> Tensor:
    """Floats from 0 to 1 as bytes, as image files hold them."""
    return (images_BCHW * 255).round().clamp(0, 255).to(torch.uint8)
