"""The linear codec: exact on pictures of ShapesWorld, unit variance, round trips, use in diffusers."""

from pathlib import Path
from typing import Any

import pytest
import torch

from thalweg.checkpoints.tensors import save
from thalweg.diffusion.metrics.geneval import score_image
from thalweg.diffusion.shapes.codec import LinearCodec, cells_of, fit, standard_codec
from thalweg.diffusion.shapes.dataset import ShapesDataset
from thalweg.diffusion.shapes.detect import detect
from thalweg.diffusion.shapes.vae import ShapesVAE

CODEC = standard_codec()


def images(count: int, seed: int = 5) -> torch.Tensor:
    data = ShapesDataset(size=count, seed=seed, split="all")
    return torch.stack([data[i]["image"] for i in range(count)]) * 2 - 1


def test_pictures_become_16_latent_pixels_of_unit_variance_and_come_back() -> None:
    x = images(600)
    z = CODEC.encode(x)
    assert z.shape == (600, 12, 4, 4)
    assert (CODEC.decode(z) - x).abs().max() < 1e-5
    spread = z.transpose(0, 1).flatten(1)
    assert spread.std(dim=1) == pytest.approx(torch.ones(12).numpy(), abs=0.2)
    assert spread.mean(dim=1).abs().max() < 0.1


def test_decoded_pictures_are_understood_as_well_as_drawn_ones() -> None:
    data = ShapesDataset(size=200, seed=9, split="all")
    decoded = CODEC.decode(CODEC.encode(images(200, seed=9)))
    pixels = ((decoded + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    assert all(score_image(data[i]["metadata"], detect(pixels[i])).strict for i in range(200))


def test_cells_span_exactly_twelve_dimensions() -> None:
    with pytest.raises(ValueError, match="span 12 dimensions, needed: 13"):
        fit(images(500), rank=13)
    fewer = fit(images(500), rank=6)
    x = images(20)
    assert (fewer.decode(fewer.encode(x)) - x).abs().max() > 0.01


def test_the_codec_is_the_same_every_time_and_after_a_file(tmp_path: Path) -> None:
    again = standard_codec()
    CODEC.save(tmp_path / "codec.safetensors")
    loaded = LinearCodec.load(tmp_path / "codec.safetensors")
    for name in ("mean", "encoder", "decoder"):
        assert torch.equal(getattr(again, name), getattr(CODEC, name))
        assert torch.equal(getattr(loaded, name), getattr(CODEC, name))
    save({"mean": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="needed: decoder, encoder, mean"):
        LinearCodec.load(tmp_path / "other.safetensors")


def test_pictures_need_whole_cells() -> None:
    with pytest.raises(ValueError, match=r"\(1, 3, 32, 30\)"):
        cells_of(torch.zeros(1, 3, 32, 30))
    with pytest.raises(ValueError, match=r"\(1, 1, 32, 32\)"):
        CODEC.encode(torch.zeros(1, 1, 32, 32))


def test_as_an_autoencoder_of_diffusers_it_survives_a_folder(tmp_path: Path) -> None:
    vae = ShapesVAE.from_codec(CODEC)
    vae.save_pretrained(tmp_path)
    loaded = ShapesVAE.from_pretrained(tmp_path)
    x = images(8)
    z = loaded.encode(x).latent_dist.sample()
    assert torch.equal(z, CODEC.encode(x))
    assert torch.equal(loaded.decode(z, return_dict=False)[0], CODEC.decode(z))
    assert torch.equal(loaded.decode(z).sample, CODEC.decode(z))
    config = loaded.config
    assert (config.latent_channels, config.scaling_factor, config.shift_factor) == (12, 1.0, 0.0)
    assert 2 ** (len(config.block_out_channels) - 1) == 8
    assert not any(p.requires_grad for p in loaded.parameters())


def test_larger_pictures_have_more_cells() -> None:
    x = torch.cat([images(1), images(1, seed=6)], dim=3)
    z = CODEC.encode(x)
    assert z.shape == (1, 12, 4, 8)
    assert torch.allclose(CODEC.decode(z), x, atol=1e-5)


def test_a_pipeline_of_stable_diffusion_3_samples_with_it_and_loads_again(tmp_path: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    transformer = SD3Transformer2DModel(
        sample_size=4,
        patch_size=1,
        in_channels=12,
        out_channels=12,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
    )
    names = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
    parts = {"scheduler": FlowMatchEulerDiscreteScheduler(), "vae": ShapesVAE.from_codec(CODEC)}
    pipe = StableDiffusion3Pipeline(transformer=transformer, **parts, **dict.fromkeys(names))
    pipe.save_pretrained(tmp_path)
    again = StableDiffusion3Pipeline.from_pretrained(tmp_path, **dict.fromkeys(names))
    shown = [sample(p) for p in (pipe, again)]
    assert shown[0].shape == (2, 3, 32, 32)
    assert torch.equal(*shown)


def sample(pipe: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompt_embeds=torch.zeros(2, 10, 32),
        pooled_prompt_embeds=torch.zeros(2, 16),
        guidance_scale=1.0,
        num_inference_steps=2,
        output_type="pt",
        height=32,
        width=32,
        generator=torch.Generator().manual_seed(0),
    ).images
