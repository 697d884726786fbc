"""Pipelines of diffusers with random weights of a few thousand parameters; nothing is downloaded."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

WIDTH = 8
END = "<|endoftext|>"
PROMPT, NEGATIVE = "a red fox", "blurry"


def tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer of single letters."""
    letters = [chr(c) for c in range(33, 127)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", END]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)


def text_encoder(words: CLIPTokenizer, kind: type = CLIPTextModel) -> Any:
    return kind(
        CLIPTextConfig(
            vocab_size=len(words), hidden_size=WIDTH, intermediate_size=WIDTH, projection_dim=WIDTH,
            num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=16,
            bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
        )
    ).eval()  # fmt: skip


def vae(**options: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4, 4), latent_channels=4, norm_num_groups=2, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **options,
    ).eval()  # fmt: skip


def conditional_unet(width: int, **options: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=2,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=width, **options,
    ).eval()  # fmt: skip


def betas() -> DDIMScheduler:
    """The scheduler of Stable Diffusion, on a grid that ends at the data."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        timestep_spacing="trailing", steps_offset=1,
    )  # fmt: skip


def stable_diffusion(folder: Path) -> StableDiffusionPipeline:
    words = tokenizer(folder)
    return StableDiffusionPipeline(
        vae=vae(), text_encoder=text_encoder(words), tokenizer=words, unet=conditional_unet(WIDTH),
        scheduler=betas(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def stable_diffusion_xl(folder: Path) -> StableDiffusionXLPipeline:
    words = tokenizer(folder)
    unet = conditional_unet(
        2 * WIDTH, addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + WIDTH,
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=vae(), text_encoder=text_encoder(words), tokenizer=words, unet=unet, scheduler=betas(),
        text_encoder_2=text_encoder(words, CLIPTextModelWithProjection), tokenizer_2=words,
        add_watermarker=False,
    )  # fmt: skip


def stable_diffusion_3(folder: Path) -> StableDiffusion3Pipeline:
    words = tokenizer(folder)
    first, second = (text_encoder(words, CLIPTextModelWithProjection) for _ in range(2))
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=1, attention_head_dim=8, out_channels=4,
        num_attention_heads=2, joint_attention_dim=2 * WIDTH, caption_projection_dim=16,
        pooled_projection_dim=2 * WIDTH, pos_embed_max_size=8,
    ).eval()  # fmt: skip
    for parameter in transformer.proj_out.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # a new one answers zero
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5),
        text_encoder=first, tokenizer=words, text_encoder_2=second, tokenizer_2=words,
        text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip


def ddpm(folder: Path) -> DDPMPipeline:
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    return DDPMPipeline(unet=unet.eval(), scheduler=scheduler)


def dit(folder: Path) -> DiTPipeline:
    """With a learned variance, in a second half of channels."""
    transformer = DiTTransformer2DModel(
        sample_size=8, in_channels=4, out_channels=8, num_layers=1, num_attention_heads=2,
        attention_head_dim=8, num_embeds_ada_norm=1000,
    ).eval()  # fmt: skip
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)  # a new one answers zero
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    return DiTPipeline(transformer=transformer, vae=vae(), scheduler=scheduler, id2label={"0": "fox, dog"})


PIPELINES = {
    "sd": stable_diffusion, "sdxl": stable_diffusion_xl, "sd3": stable_diffusion_3, "ddpm": ddpm, "dit": dit,
}  # fmt: skip


def build(name: str, folder: Path) -> DiffusionPipeline:
    """A pipeline with fixed weights, and without its progress bar."""
    torch.manual_seed(0)
    pipe = PIPELINES[name](folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def inputs(name: str) -> dict[str, Any]:
    """What the pipeline is called with: two images, guided where that is possible."""
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    common: dict[str, Any] = {"generator": generators, "output_type": "np"}
    if name == "ddpm":
        return {**common, "batch_size": 2}
    if name == "dit":
        return {**common, "class_labels": [0, 7], "guidance_scale": 4.0}
    return {
        **common, "prompt": [PROMPT] * 2, "negative_prompt": [NEGATIVE] * 2, "guidance_scale": 4.0,
        "height": 16, "width": 16,
    }  # fmt: skip
