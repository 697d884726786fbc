"""A small transformer of Stable Diffusion 3 with a second attention, and policies of it."""

from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from tiny_pipelines import build
from torch import Tensor

from thalweg.diffusion.nft.lora import LoraSpec
from thalweg.diffusion.nft.policy import FullPolicy, LoraPolicy, Policy

CONFIG = {
    "sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 3, "attention_head_dim": 8,
    "num_attention_heads": 2, "joint_attention_dim": 16, "caption_projection_dim": 16,
    "pooled_projection_dim": 16, "out_channels": 4, "pos_embed_max_size": 8, "dual_attention_layers": [0],
    "qk_norm": "rms_norm",
}  # fmt: skip
SPEC = LoraSpec(r=4, alpha=8)


def transformer(dtype: torch.dtype = torch.float32) -> SD3Transformer2DModel:
    """One with fixed weights, none of which is zero."""
    torch.manual_seed(0)
    network = SD3Transformer2DModel(**CONFIG)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network.to(dtype)


def pipeline(folder: Path) -> Any:
    """A whole pipeline with that transformer; images have 16 x 16 pixels, latents 8 x 8."""
    pipe: Any = build("sd3", folder)
    pipe.register_modules(transformer=transformer().eval())
    return pipe


def policy(kind: str) -> Policy:
    return LoraPolicy(transformer(), SPEC) if kind == "lora" else FullPolicy(transformer())


def question(batch: int = 2) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """States, timesteps and embeddings."""
    g = torch.Generator().manual_seed(1)
    condition = {
        "encoder_hidden_states": torch.randn(batch, 5, 16, generator=g),
        "pooled_projections": torch.randn(batch, 16, generator=g),
    }
    return torch.randn(batch, 4, 8, 8, generator=g), torch.linspace(900, 100, batch), condition


def move(found: Policy, seed: int = 2, size: float = 0.1) -> None:
    """Change the current policy as an optimizer would."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in found.trainable().values():
            value.add_(size * torch.randn(value.shape, generator=g))
