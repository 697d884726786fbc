"""LoRA on disk: golden names and shapes, equal pipelines after a round trip, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from golden import golden_files
from safetensors.torch import load_file, save_file
from tiny_pipelines import inputs
from tiny_policy import SPEC, move, pipeline, transformer

from thalweg.checkpoints.tensors import read_metadata
from thalweg.diffusion.nft.lora import (
    FILE,
    METADATA,
    TARGETS,
    LoraSpec,
    adapted,
    export_lora,
    export_peft,
    lora_shapes,
    read_lora,
)
from thalweg.diffusion.nft.policy import LoraPolicy

GOLDEN = golden_files("nft", "lora*.json")
MODELS = [(path, name) for path in GOLDEN for name in ("sd35_medium", "tiny")]


def golden(path: Path, name: str) -> tuple[dict[str, Any], Any, LoraSpec]:
    """Values, the transformer without weights, and settings."""
    values = json.loads(path.read_text())[name]
    with torch.device("meta"):
        network = SD3Transformer2DModel(**values["config"])
    return values, network, LoraSpec(r=values["rank"], alpha=values["alpha"])


def test_targets_are_golden() -> None:
    assert [list(TARGETS)] == [json.loads(path.read_text())["target_modules"] for path in GOLDEN][:1]


@pytest.mark.parametrize(("path", "name"), MODELS, ids=[f"{path.stem}-{name}" for path, name in MODELS])
def test_names_and_shapes_are_golden(path: Path, name: str) -> None:
    """382 tensors of 18.8 million numbers for SD3.5 Medium, none of them of a second attention."""
    values, network, spec = golden(path, name)
    shapes = lora_shapes(network, spec)
    assert sum(value.numel() for value in network.parameters()) == values["base_parameters"]
    assert len(adapted(network)) == values["adapted_modules"]
    assert len(shapes) == values["lora_tensors"]
    assert sum(a * b for a, b in shapes.values()) == values["lora_parameters"]
    per_target = {t: sum(n.endswith(f".{t}") for n in adapted(network)) for t in TARGETS}
    assert per_target == values["adapted_per_target"]
    for key, prefix in (("diffusers_keys", "transformer."), ("peft_keys", "base_model.model.")):
        if key in values:
            assert {prefix + n: list(shape) for n, shape in shapes.items()} == values[key]


@pytest.mark.parametrize("path", GOLDEN, ids=[path.stem for path in GOLDEN])
def test_exported_names_and_settings_are_golden(path: Path, tmp_path: Path) -> None:
    values, _, spec = golden(path, "tiny")
    policy = LoraPolicy(SD3Transformer2DModel(**values["config"]), spec)
    file = export_lora(tmp_path, policy.weights("ema"), spec)
    assert {k: list(v.shape) for k, v in load_file(file).items()} == values["diffusers_keys"]
    found = json.loads(read_metadata(file)[METADATA])
    assert found == values["diffusers_metadata"]
    folder = export_peft(tmp_path / "peft", policy.weights("ema"), spec)
    assert {k: list(v.shape) for k, v in load_file(folder / "adapter_model.safetensors").items()} == values[
        "peft_keys"
    ]


def test_a_pipeline_that_loads_the_export_draws_equal_images(tmp_path: Path) -> None:
    """The average is what is exported; its scale of 2 comes from the metadata."""
    pipe = pipeline(tmp_path)
    plain = pipe(**inputs("sd3"), num_inference_steps=3).images
    policy = LoraPolicy(pipe.transformer, SPEC)
    move(policy, size=0.3)
    policy.follow("ema", 0.5)
    with policy.using("ema"):
        expected = pipe(**inputs("sd3"), num_inference_steps=3).images
    export_lora(tmp_path / "lora", policy.weights("ema"), policy.spec)
    fresh = pipeline(tmp_path)
    fresh.load_lora_weights(tmp_path / "lora")
    assert abs(fresh(**inputs("sd3"), num_inference_steps=3).images - expected).max() == 0
    assert abs(plain - expected).max() > 0.01


def test_a_policy_goes_on_from_folders_of_peft_and_files_of_diffusers(tmp_path: Path) -> None:
    """Among them one as published: PEFT under ``lora``, with the sampling policy beside it."""
    from peft import get_peft_model

    network = get_peft_model(transformer(), SPEC.peft())
    with torch.no_grad():
        for name, value in network.named_parameters():
            if ".lora_" in name:
                torch.nn.init.normal_(value, std=0.2)
    network.add_adapter("old", SPEC.peft())
    network.save_pretrained(tmp_path / "published" / "lora")
    expected = {
        name.removeprefix("base_model.model.").replace(".default.", "."): value.detach()
        for name, value in network.named_parameters()
        if ".default." in name
    }
    export_lora(tmp_path / "diffusers", expected, SPEC)
    export_peft(tmp_path / "peft", expected, SPEC)
    for source in ("published", "published/lora", "diffusers", f"diffusers/{FILE}", "peft"):
        spec, state = read_lora(tmp_path / source)
        assert spec == SPEC
        policy = LoraPolicy(transformer(), spec)
        policy.start_from_lora(spec, state, source)
        assert policy.old_is_current()
        for who in ("current", "ema"):
            assert all(torch.equal(value, expected[n]) for n, value in policy.named(who).items())


def test_without_settings_a_file_has_the_scale_that_diffusers_gives_it(tmp_path: Path) -> None:
    policy = LoraPolicy(transformer(), SPEC)
    state = {f"transformer.{name}": value for name, value in policy.weights("current").items()}
    save_file(state, tmp_path / FILE)
    spec, found = read_lora(tmp_path)
    assert (spec.r, spec.alpha) == (4, 4.0)
    assert lora_shapes(transformer(), spec).keys() == found.keys() == policy.trainable().keys()


def test_mismatched_adapters_name_the_tensor() -> None:
    policy = LoraPolicy(transformer(), SPEC)
    before, state = policy.state_dict(), policy.weights("current")
    name = "transformer_blocks.1.attn.to_q.lora_A.weight"
    other = "transformer_blocks.0.attn2.to_q.lora_A.weight"
    wide = {**state, name: torch.zeros(4, 24)}
    rank = LoraPolicy(transformer(), LoraSpec(r=8, alpha=16)).weights("current")
    wrong = {
        f"{name}' of shape \\(4, 24\\), needed: \\(4, 16\\); its width differs": wide,
        "to_q.lora_A.weight' of shape \\(8, 16\\), needed: \\(4, 16\\); its rank differs": rank,
        f"{other}', but that layer is not adapted here": {**state, other: torch.zeros(4, 16)},
        f"lacks '{name}' and 0 more of 46": {k: v for k, v in state.items() if k != name},
        f"{name}' with values that are not finite": {**state, name: state[name] * torch.nan},
    }
    for message, values in wrong.items():
        with pytest.raises(ValueError, match=f"a file .*{message}"):
            policy.start_from(values, "a file")
    assert all(torch.equal(value, before[k]) for k, value in policy.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora is True, allowed: False"),
        ({"use_rslora": True}, "use_rslora is True, allowed: False"),
        ({"rank_pattern": {"to_q": 2}}, "rank_pattern is {'to_q': 2}, allowed: {}"),
        ({"target_modules": "all-linear"}, "needed are r and a list target_modules"),
    ],
)
def test_other_kinds_of_adapters_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    export_peft(tmp_path, LoraPolicy(transformer(), SPEC).weights("old"), SPEC)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        read_lora(tmp_path)


def test_broken_adapters_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no LoRA, allowed"):
        read_lora(tmp_path)
    export_peft(tmp_path, LoraPolicy(transformer(), SPEC).weights("old"), SPEC)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"but no adapter_model\.safetensors"):
        read_lora(tmp_path)
    save_file({"to_q.weight": torch.zeros(2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"has 'to_q.weight', allowed: base_model\.model"):
        read_lora(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config\.json is not JSON"):
        read_lora(tmp_path)


def test_bad_settings_are_refused() -> None:
    for change, message in (({"r": 0}, "r is 0"), ({"alpha": 0}, "alpha is 0"), ({"targets": ()}, "targets")):
        with pytest.raises(ValueError, match=message):
            LoraSpec(**{"r": 4, "alpha": 8, **change})  # type: ignore[arg-type]
