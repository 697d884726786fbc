"""Networks that draw images train block by block as they do whole, without a change of their forward pass."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, SD3Transformer2DModel, UNet2DModel
from tiny_pipeline import tiny_unet
from torch import Tensor, nn

from thalweg.core_optim.mezo import MeZO
from thalweg.core_optim.zo2 import ZO2, SlotBackend, find_blocks
from thalweg.diffusion.captioned import CaptionedTransformer
from thalweg.diffusion.streaming import shared_parts

TRANSFORMER: dict[str, Any] = {
    "sample_size": 8, "in_channels": 1, "out_channels": 1, "num_layers": 3, "num_attention_heads": 2,
    "attention_head_dim": 8,
}  # fmt: skip


def unet() -> UNet2DModel:
    return tiny_unet(
        num_class_embeds=11,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def dit() -> DiTTransformer2DModel:
    return DiTTransformer2DModel(**TRANSFORMER, num_embeds_ada_norm=10)


def captioned() -> CaptionedTransformer:
    return CaptionedTransformer(vocab_size=12, length=5, in_channels=1, sample_size=8, patch_size=2, layers=3)


def sd3() -> SD3Transformer2DModel:
    joint = {"joint_attention_dim": 6, "caption_projection_dim": 16, "pooled_projection_dim": 7}
    return SD3Transformer2DModel(**TRANSFORMER, **joint, patch_size=2, pos_embed_max_size=4)


def answer(network: nn.Module, x: Tensor) -> Tensor:
    time = torch.full((2,), 300.0)
    if isinstance(network, SD3Transformer2DModel):
        return network(x, torch.ones(2, 3, 6), torch.ones(2, 7), time).sample
    labels = torch.ones(2, 5, dtype=torch.long) if isinstance(network, CaptionedTransformer) else [1, 2]
    return network(x, time.long(), class_labels=torch.as_tensor(labels)).sample


def make(kind: Callable[[], nn.Module]) -> nn.Module:
    """Weights that are not zero, where the networks' own are, so that every block matters."""
    torch.manual_seed(0)
    network = kind().eval()
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return network


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "unet": (unet, 7),  # two down, two up, and the parts of the middle
    "dit": (dit, 3),
    "captioned": (captioned, 9),  # two encoders of an embedding and two layers, three blocks
    "sd3": (sd3, 3),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_streamed_steps_equal_plain_ones_bitwise(name: str) -> None:
    kind, count = NETWORKS[name]
    plain, streamed = make(kind), make(kind)
    blocks = find_blocks(streamed)
    assert len(blocks) == count
    mezo, zo2 = MeZO(plain.parameters(), lr=1e-3), ZO2(streamed.parameters(), lr=1e-3)
    zo2.attach(streamed, resident=shared_parts(streamed), backend=SlotBackend("cpu"))
    inside = sum(p.numel() for block in zo2.streamed.blocks for p in _parameters(block))
    assert inside > 0.5 * sum(p.numel() for p in plain.parameters())
    for step in range(3):
        x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(step))
        mezo.step(lambda x=x: answer(plain, x).square().mean())
        zo2.step(lambda x=x: answer(streamed, x).square().mean())
        assert mezo.projected_gradients == zo2.projected_gradients
    zo2.flush()
    for a, b in zip(plain.parameters(), streamed.parameters(), strict=True):
        assert torch.equal(a, b)


def _parameters(block: Any) -> list[Tensor]:
    return [piece.parameter for piece in block.pieces]
