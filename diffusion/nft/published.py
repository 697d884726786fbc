"""Architectures of text-to-image pipelines, so that memory can be estimated without weights or a network.

The configurations of published models are facts from the ``config.json`` files of their parts:
stabilityai/stable-diffusion-3.5-medium at revision b940f670, stabilityai/stable-diffusion-3.5-large at
ceddf0a7. A local pipeline is read from its own files.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from thalweg.checkpoints import hub
from thalweg.diffusion.loading import LENGTH_KEY
from thalweg.diffusion.nft.embeddings import T5_LENGTH

PACKAGES = ("diffusers", "transformers", "thalweg")
"""Where the classes of parts may come from: a configuration must not decide what is imported."""
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One network of a pipeline."""

    library: str
    """Module that has its class."""
    kind: str
    """Name of the class."""
    config: Mapping[str, Any]
    """Its configuration."""

    def build(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The network on the meta device: shapes without storage.

        Args:
            dtype: As it is loaded in; some weights of T5 stay in float32 then, as transformers wants it.

        Raises:
            ValueError: If its class is none, or from a package that is not trusted.
        """
        if self.library.split(".")[0] not in PACKAGES:
            raise ValueError(f"{self.kind} is from {self.library!r}, allowed: {', '.join(PACKAGES)}")
        found = getattr(importlib.import_module(self.library), self.kind, None)
        if not isinstance(found, type):
            raise ValueError(f"{self.library} has no class {self.kind!r}")
        config = {name: value for name, value in self.config.items() if not name.startswith("_")}
        with torch.device("meta"):
            if self.library == "transformers":
                network: Any = found(found.config_class(**config))  # type: ignore[attr-defined]
            else:
                network = found.from_config(config)  # type: ignore[attr-defined]
        assert isinstance(network, nn.Module)
        kept = getattr(network, "_keep_in_fp32_modules", None) or () if dtype == torch.float16 else ()
        for name, value in [*network.named_parameters(), *network.named_buffers()]:
            if value.is_floating_point() and not set(kept) & set(name.split(".")):
                value.data = value.data.to(dtype)
        return network.eval().requires_grad_(False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """The networks of a pipeline by name, without weights."""

    source: str
    """Where the configurations are from."""
    parts: Mapping[str, Part]
    """Transformer, vae and text encoders."""
    length: int = T5_LENGTH
    """Tokens of T5 where nothing else is said."""

    @property
    def encoders(self) -> dict[str, Part]:
        """Text encoders."""
        return {name: part for name, part in self.parts.items() if name in ENCODERS}

    @property
    def scale(self) -> int:
        """Pixels of an image for each value of its latent, along one side, as diffusers counts it."""
        vae = self.parts["vae"].config
        return int(2 ** (len(vae.get("block_out_channels", (1,))) - 1))

    def latents(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """Shape (C, H, W) of latents of images, by default of the size that the transformer names.

        Raises:
            ValueError: If images are no whole patches.
        """
        transformer = self.parts["transformer"].config
        step = self.scale * int(transformer.get("patch_size") or 1)
        for name, value in (("height", height), ("width", width)):
            if value is not None and (value < step or value % step):
                raise ValueError(f"{name} is {value}, allowed: multiples of {step}")
        side = int(transformer.get("sample_size", 128))
        size = [side if pixels is None else pixels // self.scale for pixels in (height, width)]
        return int(transformer.get("in_channels", 16)), size[0], size[1]

    def condition(self, batch: int, length: int | None, dtype: torch.dtype) -> dict[str, Tensor]:
        """Embeddings of prompts on the meta device: tokens of CLIP, then of T5 or zeros in their place."""
        config = self.parts["transformer"].config
        clip = int(self.parts["text_encoder"].config.get("max_position_embeddings", 77))
        shape = (
            batch,
            clip + (self.length if length is None else length),
            config.get("joint_attention_dim", 4096),
        )
        return {
            "encoder_hidden_states": torch.empty(shape, dtype=dtype, device="meta"),
            "pooled_projections": torch.empty(
                batch, config.get("pooled_projection_dim", 2048), dtype=dtype, device="meta"
            ),
        }


def weight_bytes(network: nn.Module) -> int:
    """Bytes of parameters and buffers; shared ones count once."""
    return sum(value.numel() * value.element_size() for value in [*network.parameters(), *network.buffers()])


def architecture(model: str) -> Architecture:
    """What a pipeline is made of.

    Args:
        model: Folder of a pipeline, one that is shipped, or the name of a published one that is known here.

    Raises:
        ValueError: If it is neither, or files of the folder are missing or broken.
    """
    folder = Path(model)
    if not folder.exists() and (shipped := hub.shipped(model)) is not None:
        folder = shipped
    if folder.is_dir():
        return _of_folder(folder)
    if model not in PUBLISHED:
        raise ValueError(
            f"{model!r} is no folder of a pipeline, and its architecture is not known without the network;"
            f" known: {', '.join(PUBLISHED)}"
        )
    return Architecture(source=model, parts=PUBLISHED[model])


def _of_folder(folder: Path) -> Architecture:
    index = _read(folder / "model_index.json")
    parts = {}
    for name in ("transformer", "vae", *ENCODERS):
        library, kind = index.get(name) or (None, None)
        if kind is not None:
            parts[name] = Part(library=library, kind=kind, config=_read(folder / name / "config.json"))
    for name in ("transformer", "vae", "text_encoder"):
        if name not in parts:
            raise ValueError(
                f"{folder / 'model_index.json'} has no {name!r}, needed: that of a pipeline like SD3"
            )
    length = int(index.get(LENGTH_KEY, T5_LENGTH))
    return Architecture(source=str(folder), parts=parts, length=length)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}, so the memory of its pipeline is not known") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, not an object with named values")
    return found


def _sd3(layers: int, heads: int, positions: int, dual: int) -> Part:
    config = {
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": layers,
        "num_attention_heads": heads,
        "attention_head_dim": 64,
        "caption_projection_dim": heads * 64,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": positions,
        "dual_attention_layers": list(range(dual)),
        "qk_norm": "rms_norm",
    }
    return Part(library="diffusers", kind="SD3Transformer2DModel", config=config)


_VAE = Part(
    library="diffusers",
    kind="AutoencoderKL",
    config={
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 16,
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "norm_num_groups": 32,
        "sample_size": 1024,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
)


def _clip(width: int, layers: int, heads: int, act: str) -> Part:
    config = {
        "vocab_size": 49408,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "projection_dim": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 77,
        "hidden_act": act,
        "eos_token_id": 2,
    }
    return Part(library="transformers", kind="CLIPTextModelWithProjection", config=config)


T5_XXL = Part(
    library="transformers",
    kind="T5EncoderModel",
    config={
        "vocab_size": 32128,
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_layers": 24,
        "num_heads": 64,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    },
)
_SD3_OTHERS = {
    "vae": _VAE,
    "text_encoder": _clip(768, 12, 12, "quick_gelu"),
    "text_encoder_2": _clip(1280, 32, 20, "gelu"),
    "text_encoder_3": T5_XXL,
}
PUBLISHED: dict[str, dict[str, Part]] = {
    "stabilityai/stable-diffusion-3.5-medium": {"transformer": _sd3(24, 24, 384, 13), **_SD3_OTHERS},
    "stabilityai/stable-diffusion-3.5-large": {"transformer": _sd3(38, 38, 192, 0), **_SD3_OTHERS},
}
"""Parts of published pipelines by their names on the Hub."""
