"""A diffusers pipeline that draws images with classes, from any of its schedulers.

diffusers has ``DDPMPipeline`` for networks without classes and ``DiTPipeline`` for latent images; this one is
for pixels with classes. Exported folders carry a copy of this file, so it imports torch and diffusers only.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor


class ClassImagePipeline(DiffusionPipeline):
    """Draw images of given classes, optionally with classifier-free guidance (Ho and Salimans 2022).

    Args:
        unet: ``UNet2DModel`` or ``DiTTransformer2DModel``.
        scheduler: Any scheduler whose noise schedule and prediction type are the network's.
        class_names: Names of the classes in the order of their labels.
        null_label: Label that stands for no class; None for a network without classes.
    """

    model_cpu_offload_seq = "unet"

    def __init__(
        self,
        unet: ModelMixin,
        scheduler: SchedulerMixin,
        class_names: list[str] | None = None,
        null_label: int | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(class_names=list(class_names or ()), null_label=null_label)

    def labels(self, classes: int | str | Sequence[int | str] | None, count: int) -> Tensor | None:
        """Labels of `count` images; without classes the label for none.

        Raises:
            ValueError: For an unknown class, or a number of classes that does not fit.
        """
        null, names = self.config.null_label, list(self.config.class_names)
        if null is None:
            if classes is not None:
                raise ValueError("this network was trained without classes: leave class_labels out")
            return None
        if classes is None:
            return torch.full((count,), null)
        given = [classes] * count if isinstance(classes, int | str) else list(classes)
        if len(given) != count:
            raise ValueError(f"{len(given)} class_labels for {count} images")
        known = [names.index(c) if isinstance(c, str) and c in names else c for c in given]
        for label in known:
            if isinstance(label, str) or not 0 <= label <= null:
                allowed = ", ".join([*names, f"0 to {null - 1}", f"{null} for none"])
                raise ValueError(f"class {label!r} is unknown, allowed: {allowed}")
        return torch.tensor(known)

    def denoise(self, x_BCHW: Tensor, t: Tensor, labels_B: Tensor | None, guidance_scale: float) -> Tensor:
        """The network's answer; with guidance u + scale (c - u) of those with and without the class."""
        times = t.to(x_BCHW.device).expand(len(x_BCHW))
        channels = x_BCHW.shape[1]
        if labels_B is None or guidance_scale == 1.0:
            return self.unet(x_BCHW, times, class_labels=labels_B).sample[:, :channels]
        both = torch.cat([labels_B, torch.full_like(labels_B, self.config.null_label)])
        answer = self.unet(x_BCHW.repeat(2, 1, 1, 1), times.repeat(2), class_labels=both).sample
        with_class, without = answer[:, :channels].chunk(2)
        return without + guidance_scale * (with_class - without)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | None = None,
        batch_size: int | None = None,
        guidance_scale: float = 1.0,
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[object]:
        """Draw images.

        Args:
            class_labels: Labels or names, one for each image or one for all; none draws without a class.
            batch_size: Number of images; that of the labels or latents by default.
            guidance_scale: 1 for no guidance; more makes images more typical of their class.
            num_inference_steps: Steps of the scheduler.
            generator: Source of the noise, and of that of schedulers that add some; one, or one per image.
            latents: Starting noise (B, C, H, W) in place of a generator's.
            output_type: ``pil``, ``np`` for floats (B, H, W, C), or ``pt`` for a tensor (B, C, H, W).
            return_dict: Return an ``ImagePipelineOutput`` rather than a tuple.
        """
        if batch_size is None:
            many = class_labels is not None and not isinstance(class_labels, int | str)
            batch_size = len(latents) if latents is not None else len(class_labels) if many else 1
        labels = self.labels(class_labels, batch_size)
        labels = None if labels is None else labels.to(self._execution_device)
        x = self._start(batch_size, generator, latents)
        self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
        x = x * getattr(self.scheduler, "init_noise_sigma", 1.0)
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        options = {"generator": generator} if takes_generator else {}
        for t in self.progress_bar(self.scheduler.timesteps):
            scaled = (
                self.scheduler.scale_model_input(x, t) if hasattr(self.scheduler, "scale_model_input") else x
            )
            answer = self.denoise(scaled, t, labels, guidance_scale)
            x = self.scheduler.step(answer, t, x, return_dict=False, **options)[0]
        self.maybe_free_model_hooks()
        images: object = (x.float() / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.cpu().permute(0, 2, 3, 1).numpy()
            images = self.numpy_to_pil(images) if output_type == "pil" else images
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _start(
        self, count: int, generator: torch.Generator | list[torch.Generator] | None, latents: Tensor | None
    ) -> Tensor:
        """Starting noise of unit variance."""
        config = self.unet.config
        shape = (count, config.in_channels, config.sample_size, config.sample_size)
        if latents is None:
            return randn_tensor(
                shape, generator=generator, device=self._execution_device, dtype=self.unet.dtype
            )
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}, needed: {shape}")
        return latents.to(device=self._execution_device, dtype=self.unet.dtype)
