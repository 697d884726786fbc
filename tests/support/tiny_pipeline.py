"""A real pipeline that is small enough to search in seconds."""

from pathlib import Path
from typing import Any

import torch


def tiny_unet(**options: Any) -> Any:
    """A UNet2DModel for 8 x 8 grey images with random weights, always the same."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    given: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (8, 8),
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
    }
    return UNet2DModel(**{**given, **options}).eval()


def save_tiny_pipeline(folder: Path) -> None:
    """Write a DDPMPipeline around it."""
    from diffusers import DDIMScheduler, DDPMPipeline

    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    DDPMPipeline(tiny_unet(), scheduler).save_pretrained(folder)
