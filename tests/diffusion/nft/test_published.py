"""Published architectures have the sizes of the published weights."""

import json
from pathlib import Path

import pytest
import torch
from golden import golden_files
from tiny_policy import pipeline

from thalweg.diffusion.nft.lora import LoraSpec, lora_shapes
from thalweg.diffusion.nft.published import PUBLISHED, Part, architecture, weight_bytes

MEDIUM = "stabilityai/stable-diffusion-3.5-medium"


@pytest.mark.parametrize("path", golden_files("nft", "lora*.json"))
def test_transformer_of_sd35_medium_is_the_golden_one(path: Path) -> None:
    golden = json.loads(path.read_text())["sd35_medium"]
    part = architecture(MEDIUM).parts["transformer"]
    config = dict(part.config)
    assert {name: config[name] for name in golden["config"]} == golden["config"]
    network = part.build()
    assert sum(value.numel() for value in network.parameters()) == golden["base_parameters"] == 2_243_171_520
    assert {value.device.type for value in network.parameters()} == {"meta"}
    shapes = lora_shapes(network, LoraSpec())
    assert len(shapes) == 2 * golden["adapted_modules"] == 382
    assert sum(a * b for a, b in shapes.values()) == golden["lora_parameters"] == 18_776_064


@pytest.mark.parametrize(
    ("model", "name", "parameters"),
    [
        # 8.06 billion; the model card says 8.1
        ("stabilityai/stable-diffusion-3.5-large", "transformer", 8_056_627_520),
        (MEDIUM, "vae", 83_819_683),
        (MEDIUM, "text_encoder", 123_650_304),
        # model.safetensors of SDXL's second encoder, the same network, has 2,778,702,264 bytes in float32
        (MEDIUM, "text_encoder_2", 694_659_840),
        # t5xxl_fp16.safetensors has 9.79 GB, with a second copy of the 131.6 M embeddings of tokens
        (MEDIUM, "text_encoder_3", 4_762_310_656),
    ],
)
def test_sizes(model: str, name: str, parameters: int) -> None:
    network = architecture(model).parts[name].build()
    assert sum(value.numel() for value in network.parameters()) == parameters


def test_t5_keeps_some_weights_in_float32_where_the_others_are_float16() -> None:
    part = architecture(MEDIUM).parts["text_encoder_3"]
    kept = {name for name, value in part.build(torch.float16).named_parameters() if value.itemsize == 4}
    assert kept
    assert {name.split(".")[-2] for name in kept} == {"wo"}
    assert all(value.itemsize == 2 for value in part.build(torch.bfloat16).parameters())


def test_a_folder_is_read_from_its_own_files(tmp_path: Path) -> None:
    pipe = pipeline(tmp_path)
    pipe.save_pretrained(tmp_path / "pipe")
    found = architecture(str(tmp_path / "pipe"))
    assert set(found.parts) == {"transformer", "vae", "text_encoder", "text_encoder_2"}
    for name, part in found.parts.items():
        real = getattr(pipe, name)
        assert type(part.build()) is type(real)
        shapes = {key: value.shape for key, value in part.build().named_parameters()}
        assert shapes == {key: value.shape for key, value in real.named_parameters()}
        assert weight_bytes(part.build(torch.bfloat16)) <= weight_bytes(part.build())
    assert found.latents(None, None) == (4, 8, 8)
    assert found.latents(32, 16) == (4, 16, 8)
    embeds, _, pooled, _ = pipe.encode_prompt(
        "a", None, None, do_classifier_free_guidance=False, max_sequence_length=7
    )
    condition = found.condition(1, 7, torch.float32)
    assert condition["encoder_hidden_states"].shape == embeds.shape
    assert condition["pooled_projections"].shape == pooled.shape


def test_unknown_models_and_broken_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'some/model' is no folder.*known: stabilityai/"):
        architecture("some/model")
    with pytest.raises(ValueError, match=r"no file .*model_index\.json"):
        architecture(str(tmp_path))
    index = tmp_path / "model_index.json"
    index.write_text("[1]")
    with pytest.raises(ValueError, match="holds a list"):
        architecture(str(tmp_path))
    index.write_text(json.dumps({"unet": ["diffusers", "UNet2DConditionModel"]}))
    with pytest.raises(ValueError, match="has no 'transformer'"):
        architecture(str(tmp_path))
    index.write_text("{")
    with pytest.raises(ValueError, match="no valid JSON"):
        architecture(str(tmp_path))
    with pytest.raises(ValueError, match="'os', allowed: diffusers, transformers, thalweg"):
        Part(library="os", kind="system", config={}).build()
    with pytest.raises(ValueError, match="no class 'Nothing'"):
        Part(library="diffusers", kind="Nothing", config={}).build()
    with pytest.raises(ValueError, match="height is 24, allowed: multiples of 16"):
        architecture(MEDIUM).latents(24, None)


def test_published_parts_are_complete() -> None:
    for parts in PUBLISHED.values():
        assert list(parts) == ["transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"]
