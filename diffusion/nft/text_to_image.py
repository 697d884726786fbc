"""The pipeline that is fine-tuned, taken apart: transformer, autoencoder, embeddings of prompts.

Text encoders are on the device only while they encode; every prompt is encoded once and kept on disk.

Shapes: B prompts, latents C x H x W.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from thalweg.diffusion.draw import dtype_of, open_pipeline
from thalweg.diffusion.nft.config import PipelineConfig, RolloutConfig
from thalweg.diffusion.nft.embeddings import (
    T5_LENGTH,
    PromptCache,
    free_text_encoders,
    sd3_encoder,
    text_identity,
)
from thalweg.diffusion.nft.rollout import Sampler, latent_shape, sampler_of, without_autocast


class TextToImage:
    """A pipeline like Stable Diffusion 3: the parts of it that fine-tuning needs.

    Args:
        config: Which one.

    Raises:
        ValueError: If there is none, or it is of another kind.
    """

    def __init__(self, config: PipelineConfig) -> None:
        from diffusers import StableDiffusion3Pipeline

        dtypes = {
            "transformer": dtype_of(config.dtype),
            "vae": dtype_of(config.vae_dtype),
            "default": dtype_of(config.text_dtype),
        }
        pipe: Any = open_pipeline(config.model, dtypes, revision=config.revision)
        if not isinstance(pipe, StableDiffusion3Pipeline):
            raise ValueError(
                f"{config.model} is a {type(pipe).__name__}, allowed: StableDiffusion3Pipeline,"
                " whose transformer answers velocities of a rectified flow"
            )
        self.config, self.pipe = config, pipe
        self.network: Any = pipe.transformer
        self.vae: Any = pipe.vae.requires_grad_(False).eval()
        if config.gradient_checkpointing:
            self.network.enable_gradient_checkpointing()
        if config.compile:
            for block in self.network.transformer_blocks:  # all alike: one of them costs time
                block.compile()
        self._samplers: dict[RolloutConfig, Sampler] = {}
        self.length = config.max_sequence_length
        if self.length is None:
            self.length = int(pipe.config.get("_max_sequence_length", T5_LENGTH))
        self.cache = PromptCache(config.cache, text_identity(pipe, self.length, config.revision), keep=1024)

    def encode(self, prompts: Sequence[str], device: torch.device) -> int:
        """Encode prompts that nobody has encoded before; the encoders go back to the CPU afterwards.

        Returns:
            How many were encoded.

        Raises:
            ValueError: If there are such prompts, but the encoders were freed.
        """
        if not (todo := self.cache.missing(prompts)):
            return 0
        encoders = [part for name, part in self.pipe.components.items() if name.startswith("text_encoder")]
        for part in filter(None, encoders):
            part.to(device)
        try:
            with without_autocast(device):
                return self.cache.fill(todo, sd3_encoder(self.pipe, self.length, device))
        finally:
            for part in filter(None, encoders):
                part.to("cpu")

    @property
    def has_encoders(self) -> bool:
        """Whether the text encoders are still there."""
        return self.pipe.text_encoder is not None

    def free_encoders(self) -> None:
        """Let go of the text encoders."""
        free_text_encoders(self.pipe)

    def condition(self, prompts: Sequence[str], device: torch.device) -> dict[str, Tensor]:
        """Embeddings of prompts that were encoded, a row for each."""
        return self.cache.condition(prompts, device)

    def latents(self, rollout: RolloutConfig) -> tuple[int, int, int]:
        """Shape (C, H, W) of latents.

        Raises:
            ValueError: If images of that size are no whole patches.
        """
        size = self.network.config.sample_size * self.pipe.vae_scale_factor
        return latent_shape(self.pipe, rollout.height or size, rollout.width or size)

    def sampler(self, rollout: RolloutConfig) -> Sampler:
        """The solver of rollouts; files are read once.

        Raises:
            ValueError: If there is none of that kind.
        """
        if rollout not in self._samplers:
            shift = rollout.shift
            if shift is None:
                shift = float(self.pipe.scheduler.config.get("shift", 1.0))
            self._samplers[rollout] = sampler_of(rollout.source(), rollout.steps, shift)
        return self._samplers[rollout]
