"""A denoiser of captioned images with its own text encoders, of the classes of Stable Diffusion 3.

Its answer is that of the pipeline it is exported as: ``StableDiffusion3Pipeline`` without T5, called with
``max_sequence_length=0``, so that no rows of zeros follow the embeddings.

Shapes: B batch, L tokens, D and P widths of the embeddings, C latent channels, H = W latent pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from thalweg.diffusion.vocabulary import END, PAD, START, UNKNOWN

if TYPE_CHECKING:
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

MAX_SEQUENCE_LENGTH = 0
"""Rows of zeros in the place of T5 that an exported pipeline is to be called with."""


class CaptionedTransformer(nn.Module):
    """A small SD3 transformer and two small CLIP text encoders, trained together.

    Args:
        vocab_size: Words, special ones included; that of the data module.
        length: Tokens of a caption; that of the data module.
        sample_size: Latent pixels per side.
        in_channels: Latent channels.
        patch_size: Latent pixels per side of a patch.
        layers: Blocks of the transformer.
        heads: Attention heads of a block.
        head_dim: Channels of a head.
        text_layers: Layers of a text encoder; the last one is seen by the pooled embedding only.
        text_heads: Attention heads of a text encoder.
        text_width: Channels of a text encoder.

    Raises:
        ValueError: If a text encoder has less than two layers.
    """

    def __init__(
        self,
        vocab_size: int,
        length: int = 12,
        sample_size: int = 4,
        in_channels: int = 12,
        patch_size: int = 1,
        layers: int = 4,
        heads: int = 4,
        head_dim: int = 24,
        text_layers: int = 2,
        text_heads: int = 2,
        text_width: int = 32,
    ) -> None:
        super().__init__()
        if text_layers < 2:
            raise ValueError(f"text_layers is {text_layers}, allowed: 2 and more: the last but one is read")
        self.transformer = SD3Transformer2DModel(
            sample_size=sample_size,
            patch_size=patch_size,
            in_channels=in_channels,
            out_channels=in_channels,
            num_layers=layers,
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            joint_attention_dim=2 * text_width,
            caption_projection_dim=heads * head_dim,
            pooled_projection_dim=2 * text_width,
            pos_embed_max_size=sample_size // patch_size,
            qk_norm="rms_norm",
        )
        self.text_encoder, self.text_encoder_2 = (
            _text_encoder(vocab_size, length, text_layers, text_heads, text_width) for _ in range(2)
        )

    @property
    def config(self) -> Mapping[str, Any]:
        """Configuration of the transformer."""
        found: Mapping[str, Any] = self.transformer.config
        return found

    @property
    def vocab_size(self) -> int:
        """Words that the text encoders know."""
        return int(self.text_encoder.config.vocab_size)

    @property
    def length(self) -> int:
        """Tokens of a caption."""
        return int(self.text_encoder.config.max_position_embeddings)

    @property
    def empty_caption(self) -> list[int]:
        """Tokens of no caption."""
        return [START, END] + [PAD] * (self.length - 2)

    def embeddings(self, tokens_BL: Tensor) -> tuple[Tensor, Tensor]:
        """What ``StableDiffusion3Pipeline.encode_prompt`` makes of captions, (B, L, D) and (B, P)."""
        told = [
            encoder(tokens_BL, output_hidden_states=True)
            for encoder in (self.text_encoder, self.text_encoder_2)
        ]
        words = torch.cat([one.hidden_states[-2] for one in told], dim=-1)
        return words, torch.cat([one.text_embeds for one in told], dim=-1)

    def forward(self, x_BCHW: Tensor, label_B: Tensor, class_labels: Tensor) -> Transformer2DModelOutput:
        """The flow of noisy latents for captions as tokens (B, L), at labels from 0 to 1000."""
        words, pooled = self.embeddings(class_labels)
        return self.transformer(
            hidden_states=x_BCHW,
            timestep=label_B,
            encoder_hidden_states=words,
            pooled_projections=pooled,
        )


def _text_encoder(
    vocab_size: int, length: int, layers: int, heads: int, width: int
) -> CLIPTextModelWithProjection:
    """A new text encoder, whose words differ by as much as its layers expect, and an unknown one is nothing.

    CLIP's own initialisation of words (std 0.02) takes a long training to become anything else.
    """
    config = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=length,
        bos_token_id=START,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    encoder = CLIPTextModelWithProjection(config)
    with torch.no_grad():
        for name, table in encoder.named_parameters():
            if name.endswith(("token_embedding.weight", "position_embedding.weight")):
                nn.init.normal_(table, std=1.0 if "token" in name else 0.5)
            if name.endswith("token_embedding.weight"):
                table[UNKNOWN] = 0.0
    return encoder
