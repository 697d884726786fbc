"""What keeps networks that draw images from being cut into blocks without exceptions."""

from __future__ import annotations

from diffusers import DiTTransformer2DModel
from torch import nn


def shared_parts(network: nn.Module) -> list[nn.Module]:
    """Parts of blocks that are used outside of them as well, for ``ZO2.attach(resident=...)``.

    A DiT embeds times and classes for its output with the embedding of its first block.
    """
    found: list[nn.Module] = []
    for part in network.modules():
        if isinstance(part, DiTTransformer2DModel):
            found.append(part.transformer_blocks[0].norm1.emb)
    return found
