"""CLIP models in the layout of open_clip, as models of transformers; sizes are read off the tensors.

Licence: open_clip is MIT; only the names of its tensors are used.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from thalweg.diffusion.rewards.base import RewardError
from thalweg.diffusion.rewards.weights import needed

VISION_HEAD, TEXT_HEAD = 80, 64
"""Width of the heads of ViT-H-14."""

NAMES = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "logit_scale": "logit_scale",
}
TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
NORMS = {
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "ln_final": "text_model.final_layer_norm",
}
BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")
IN_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
IGNORED = {"attn_mask"}
"""Buffers that are computed."""


def clip_from_open_clip(
    state: Mapping[str, Tensor], *, vision_head: int = VISION_HEAD, text_head: int = TEXT_HEAD
) -> Any:
    """A CLIPModel with the weights of an open_clip model, in single precision.

    Args:
        state: Tensors by name.
        vision_head: Width of the heads that see.
        text_head: Width of the heads that read.

    Raises:
        RewardError: If tensors are missing, or there are unknown ones.
    """
    transformers = needed("transformers", "hpsv2", "pip install 'thalweg[diffusion]'")
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    try:
        config = _config(transformers, state, vision_head, text_head)
    except KeyError as error:
        raise RewardError(f"the weights have no tensor {error}, as those of open_clip's CLIP do") from None
    model = transformers.CLIPModel(config)
    found = model.load_state_dict(converted(state), strict=False)
    missing = [name for name in found.missing_keys if not name.endswith("position_ids")]
    if missing or found.unexpected_keys:
        raise RewardError(f"tensors missing from the weights: {missing}; unknown: {found.unexpected_keys}")
    return model


def converted(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names of transformers; queries, keys and values are three tensors there."""
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name in IGNORED:
            continue
        stem, _, kind = name.rpartition(".")
        if name in NAMES:
            result[NAMES[name]] = tensor
        elif name in TRANSPOSED:
            result[TRANSPOSED[name]] = tensor.T
        elif stem in NORMS:
            result[f"{NORMS[stem]}.{kind}"] = tensor
        elif block := BLOCK.fullmatch(name):
            visual, number, rest = block.groups()
            result |= _block(visual, number, rest, tensor)
        else:
            result[name] = tensor
    return {name: tensor.float() for name, tensor in result.items()}


def _block(visual: str | None, number: str, rest: str, tensor: Tensor) -> dict[str, Tensor]:
    layer = f"{'vision' if visual else 'text'}_model.encoder.layers.{number}"
    stem, _, kind = rest.rpartition(".")
    if rest.startswith("attn.in_proj_"):
        kind = rest.removeprefix("attn.in_proj_")
        parts = zip("qkv", tensor.chunk(3), strict=True)
        return {f"{layer}.self_attn.{letter}_proj.{kind}": part for letter, part in parts}
    return {f"{layer}.{IN_BLOCK.get(stem, stem)}.{kind}": tensor}


def _config(transformers: Any, state: Mapping[str, Tensor], vision_head: int, text_head: int) -> Any:
    conv, text = state["visual.conv1.weight"], state["token_embedding.weight"]
    width, patch = conv.shape[0], conv.shape[-1]
    side = round((len(state["visual.positional_embedding"]) - 1) ** 0.5)
    blocks = [match.groups() for match in map(BLOCK.fullmatch, state) if match]
    layers = {kind: 1 + max(int(n) for k, n, _ in blocks if bool(k) == kind) for kind in (True, False)}
    vision = {
        "hidden_size": width,
        "intermediate_size": len(state["visual.transformer.resblocks.0.mlp.c_fc.weight"]),
        "num_hidden_layers": layers[True],
        "num_attention_heads": width // vision_head,
        "image_size": side * patch,
        "patch_size": patch,
        "hidden_act": "gelu",
    }
    reading = {
        "vocab_size": text.shape[0],
        "hidden_size": text.shape[1],
        "intermediate_size": len(state["transformer.resblocks.0.mlp.c_fc.weight"]),
        "num_hidden_layers": layers[False],
        "num_attention_heads": text.shape[1] // text_head,
        "max_position_embeddings": len(state["positional_embedding"]),
        "hidden_act": "gelu",
        "eos_token_id": 2,  # transformers then takes the largest index for the end, as open_clip does
    }
    projection = state["visual.proj"].shape[1]
    return transformers.CLIPConfig(text_config=reading, vision_config=vision, projection_dim=projection)
