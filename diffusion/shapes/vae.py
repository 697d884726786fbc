"""The linear codec of ShapesWorld as an autoencoder of diffusers, for pipelines such as Stable Diffusion 3.

Importing this module needs diffusers, and ``from_pretrained`` of a pipeline that was saved with it needs this
module to be imported first: diffusers imports nothing only because a folder names it.

Shapes: B pictures, C = 3 channels, H x W pixels; latents (B, 12, H / 8, W / 8).
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor

from thalweg.diffusion.shapes.codec import CHANNELS, RANK, LinearCodec
from thalweg.diffusion.shapes.world import CELL


class Latents:
    """A distribution without variance, with the methods that pipelines ask for."""

    def __init__(self, mean_BzHW: Tensor) -> None:
        self.mean = mean_BzHW

    def mode(self) -> Tensor:
        """The latents."""
        return self.mean

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """The latents; nothing is random."""
        return self.mean


class EncoderOutput:
    """Result of :meth:`ShapesVAE.encode`."""

    def __init__(self, latent_dist: Latents) -> None:
        self.latent_dist = latent_dist


class ShapesVAE(ModelMixin, ConfigMixin):
    """Encodes and decodes by two matrices, frozen; latents have unit variance, so that they need no scaling.

    Args:
        latent_channels: Components that are kept.
        scaling_factor: What a pipeline multiplies latents with.
        shift_factor: What a pipeline subtracts before.
        block_out_channels: Of four entries, from which pipelines conclude that a latent is 8 x 8 pixels.
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = RANK,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
        block_out_channels: tuple[int, ...] = (1, 1, 1, 1),
    ) -> None:
        super().__init__()
        size = CHANNELS * CELL * CELL
        self.mean = torch.nn.Parameter(torch.zeros(size), requires_grad=False)
        self.encoder = torch.nn.Parameter(torch.zeros(size, latent_channels), requires_grad=False)
        self.decoder = torch.nn.Parameter(torch.zeros(latent_channels, size), requires_grad=False)

    @classmethod
    def from_codec(cls, codec: LinearCodec) -> ShapesVAE:
        """The autoencoder of a codec."""
        vae = cls(latent_channels=codec.rank)
        vae.load_state_dict({"mean": codec.mean, "encoder": codec.encoder, "decoder": codec.decoder})
        return vae

    @property
    def codec(self) -> LinearCodec:
        """The codec of these weights."""
        return LinearCodec(mean=self.mean, encoder=self.encoder, decoder=self.decoder)

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """Latents of pictures from -1 to 1."""
        latents = Latents(self.codec.encode(x))
        return EncoderOutput(latents) if return_dict else (latents,)

    def decode(self, z: Tensor, return_dict: bool = True, generator: Any = None) -> Any:
        """Pictures of latents, (B, C, H, W)."""
        image = self.codec.decode(z)
        return DecoderOutput(sample=image) if return_dict else (image,)
