"""The official detector of GenEval, a checkpoint of mmdet 2.x, as a model of transformers.

mmdet has its own names, the queries, keys and values of an attention in one tensor, and merges patches in
another order: channel by channel (``nn.Unfold``), where Swin and transformers go position by position. Names
are those of ``mmdet/models/backbones/swin.py``, ``plugins/msdeformattn_pixel_decoder.py`` and
``dense_heads/mask2former_head.py`` of github.com/open-mmlab/mmdetection (Apache-2.0); nothing is copied.

Every tensor of the checkpoint has to find a place, and every tensor of the model a value. Agreement of
detections with those of mmdet was not measured: the official weights were not at hand.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from thalweg.checkpoints.keymap import KeyMap, Rename
from thalweg.checkpoints.strict import check_finite, load_strict
from thalweg.diffusion.nft.prompt_sets import CLASSES

FILE = "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth"
"""The official file, of https://download.openmmlab.com/mmdetection/v2.0/mask2former/; its licence is that of
mmdet, Apache-2.0, it was trained on COCO."""
HEADS = 8
"""Of the attentions beside Swin's, which no tensor tells."""
SWIN, PIXEL, DECODER = (
    "model.pixel_level_module.encoder.swin",
    "model.pixel_level_module.decoder",
    "model.transformer_module.decoder",
)
UNUSED = (f"{SWIN}.layernorm.weight", f"{SWIN}.layernorm.bias", "criterion.empty_weight")
"""Tensors of the model that its instances do not depend on, and that mmdet does not have."""
INDEX = "attn.w_msa.relative_position_index"
"""Tables that are computed; that they are the same ones is checked."""
ORDER = (0, 2, 1, 3)
"""Positions of a merged patch in mmdet's order, row by row, for those of transformers, column by column."""


def _rename(pattern: str, to: str) -> Rename:
    return Rename(pattern=f"^{pattern}", to=to)


BLOCK = rf"{SWIN}.encoder.layers.\1.blocks.\2"
NAMES = KeyMap(
    [
        _rename(r"backbone\.patch_embed\.projection\.", f"{SWIN}.embeddings.patch_embeddings.projection."),
        _rename(r"backbone\.patch_embed\.norm\.", f"{SWIN}.embeddings.norm."),
        _rename(r"backbone\.stages\.(\d+)\.blocks\.(\d+)\.norm1\.", f"{BLOCK}.layernorm_before."),
        _rename(r"backbone\.stages\.(\d+)\.blocks\.(\d+)\.norm2\.", f"{BLOCK}.layernorm_after."),
        _rename(
            r"backbone\.stages\.(\d+)\.blocks\.(\d+)\.attn\.w_msa\.relative_position_bias_table$",
            f"{BLOCK}.attention.relative_position_bias.relative_position_bias_table",
        ),
        _rename(
            r"backbone\.stages\.(\d+)\.blocks\.(\d+)\.attn\.w_msa\.([qkv])\.", rf"{BLOCK}.attention.\3_proj."
        ),
        _rename(r"backbone\.stages\.(\d+)\.blocks\.(\d+)\.attn\.w_msa\.proj\.", f"{BLOCK}.attention.o_proj."),
        _rename(r"backbone\.stages\.(\d+)\.blocks\.(\d+)\.ffn\.layers\.0\.0\.", f"{BLOCK}.mlp.fc1."),
        _rename(r"backbone\.stages\.(\d+)\.blocks\.(\d+)\.ffn\.layers\.1\.", f"{BLOCK}.mlp.fc2."),
        _rename(r"backbone\.stages\.(\d+)\.downsample\.", rf"{SWIN}.encoder.layers.\1.downsample."),
        *(
            _rename(
                rf"backbone\.norm{i}\.", f"{SWIN.removesuffix('.swin')}.hidden_states_norms.stage{i + 1}."
            )
            for i in range(4)
        ),
        _rename(r"panoptic_head\.pixel_decoder\.level_encoding\.weight$", f"{PIXEL}.level_embed"),
        _rename(
            r"panoptic_head\.pixel_decoder\.input_convs\.(\d+)\.conv\.", rf"{PIXEL}.input_projections.\1.0."
        ),
        _rename(
            r"panoptic_head\.pixel_decoder\.input_convs\.(\d+)\.gn\.", rf"{PIXEL}.input_projections.\1.1."
        ),
        _rename(
            r"panoptic_head\.pixel_decoder\.encoder\.layers\.(\d+)\.attentions\.0\.",
            rf"{PIXEL}.encoder.layers.\1.self_attn.",
        ),
        _rename(
            r"panoptic_head\.pixel_decoder\.encoder\.layers\.(\d+)\.norms\.0\.",
            rf"{PIXEL}.encoder.layers.\1.self_attn_layer_norm.",
        ),
        _rename(
            r"panoptic_head\.pixel_decoder\.encoder\.layers\.(\d+)\.norms\.1\.",
            rf"{PIXEL}.encoder.layers.\1.final_layer_norm.",
        ),
        _rename(
            r"panoptic_head\.pixel_decoder\.encoder\.layers\.(\d+)\.ffns\.0\.layers\.0\.0\.",
            rf"{PIXEL}.encoder.layers.\1.fc1.",
        ),
        _rename(
            r"panoptic_head\.pixel_decoder\.encoder\.layers\.(\d+)\.ffns\.0\.layers\.1\.",
            rf"{PIXEL}.encoder.layers.\1.fc2.",
        ),
        _rename(r"panoptic_head\.pixel_decoder\.lateral_convs\.0\.conv\.", f"{PIXEL}.adapter_1.0."),
        _rename(r"panoptic_head\.pixel_decoder\.lateral_convs\.0\.gn\.", f"{PIXEL}.adapter_1.1."),
        _rename(r"panoptic_head\.pixel_decoder\.output_convs\.0\.conv\.", f"{PIXEL}.layer_1.0."),
        _rename(r"panoptic_head\.pixel_decoder\.output_convs\.0\.gn\.", f"{PIXEL}.layer_1.1."),
        _rename(r"panoptic_head\.pixel_decoder\.mask_feature\.", f"{PIXEL}.mask_projection."),
        _rename(
            r"panoptic_head\.transformer_decoder\.layers\.(\d+)\.attentions\.0\.attn\.",
            rf"{DECODER}.layers.\1.cross_attn.",
        ),
        _rename(
            r"panoptic_head\.transformer_decoder\.layers\.(\d+)\.attentions\.1\.attn\.",
            rf"{DECODER}.layers.\1.self_attn.",
        ),
        _rename(
            r"panoptic_head\.transformer_decoder\.layers\.(\d+)\.norms\.0\.",
            rf"{DECODER}.layers.\1.cross_attn_layer_norm.",
        ),
        _rename(
            r"panoptic_head\.transformer_decoder\.layers\.(\d+)\.norms\.1\.",
            rf"{DECODER}.layers.\1.self_attn_layer_norm.",
        ),
        _rename(
            r"panoptic_head\.transformer_decoder\.layers\.(\d+)\.norms\.2\.",
            rf"{DECODER}.layers.\1.final_layer_norm.",
        ),
        _rename(
            r"panoptic_head\.transformer_decoder\.layers\.(\d+)\.ffns\.0\.layers\.0\.0\.",
            rf"{DECODER}.layers.\1.fc1.",
        ),
        _rename(
            r"panoptic_head\.transformer_decoder\.layers\.(\d+)\.ffns\.0\.layers\.1\.",
            rf"{DECODER}.layers.\1.fc2.",
        ),
        _rename(r"panoptic_head\.transformer_decoder\.post_norm\.", f"{DECODER}.layernorm."),
        _rename(r"panoptic_head\.query_embed\.", "model.transformer_module.queries_embedder."),
        _rename(r"panoptic_head\.query_feat\.", "model.transformer_module.queries_features."),
        _rename(r"panoptic_head\.level_embed\.", "model.transformer_module.level_embed."),
        _rename(r"panoptic_head\.cls_embed\.", "class_predictor."),
        *(
            _rename(
                rf"panoptic_head\.mask_embed\.{2 * i}\.", f"{DECODER}.mask_predictor.mask_embedder.{i}.0."
            )
            for i in range(3)
        ),
    ]
)
"""From mmdet to transformers, where one tensor is one tensor."""


def mask2former_from_mmdet(state: Mapping[str, Tensor], source: object = "the checkpoint") -> Any:
    """A Mask2FormerForUniversalSegmentation with the weights of one of mmdet, whose sizes are read off.

    Args:
        state: Tensors by name.
        source: Where they come from, for messages.

    Raises:
        ValueError: If tensors are missing, left over, of other shapes or not finite.
    """
    from transformers import Mask2FormerForUniversalSegmentation

    check_finite(state, source)
    try:
        config = _config(state)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{source} is no Mask2Former of mmdet with a Swin backbone: {error}") from None
    model = Mask2FormerForUniversalSegmentation(config).eval()
    _check_indices(state, config.backbone_config.window_size, source)
    own = model.state_dict()
    load_strict(model, {**converted(state), **{name: own[name] for name in UNUSED}}, source)
    return model


def converted(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names of transformers, in its order; names that are unknown stay as they are."""
    split = {
        name: value
        for key, tensor in state.items()
        if not key.endswith(INDEX)
        for name, value in _apart(key, tensor).items()
    }
    found, _ = NAMES.apply(split)
    return found


def _apart(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Queries, keys and values as three tensors, and merged patches in the other order."""
    if name.startswith("backbone.") and ".w_msa.qkv." in name:
        return _three(tensor, lambda letter: name.replace(".qkv.", f".{letter}."))
    if match := re.fullmatch(
        r"(panoptic_head\.transformer_decoder.+\.attentions\.1\.attn)\.in_proj_(\w+)", name
    ):
        return _three(tensor, lambda letter: f"{match[1]}.{letter}_proj.{match[2]}")
    if re.fullmatch(r"backbone\.stages\.\d+\.downsample\.(reduction|norm)\.(weight|bias)", name):
        return {name: by_position(tensor)}
    return {name: tensor}


def _three(tensor: Tensor, name: Any) -> dict[str, Tensor]:
    return {name(letter): part for letter, part in zip("qkv", tensor.chunk(3), strict=True)}


def by_position(tensor: Tensor) -> Tensor:
    """The last dimension, C channels with 4 positions each, as 4 positions with C channels each."""
    parts = tensor.unflatten(-1, (-1, len(ORDER)))[..., list(ORDER)]
    return parts.transpose(-1, -2).flatten(-2)


def _check_indices(state: Mapping[str, Tensor], window: int, source: object) -> None:
    """Make sure that tables of relative positions are those which transformers computes."""
    place = torch.arange(window)
    y, x = (grid.flatten() for grid in torch.meshgrid(place, place, indexing="ij"))
    dy, dx = y[:, None] - y[None], x[:, None] - x[None]
    expected = (dy + window - 1) * (2 * window - 1) + dx + window - 1
    for name, table in state.items():
        if name.endswith(INDEX) and not torch.equal(table.long(), expected):
            raise ValueError(f"{source} has another order of relative positions in {name!r}")


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    found = {int(match[1]) for name in state if (match := re.match(pattern, name))}
    return max(found) + 1 if found else 0


def _config(state: Mapping[str, Tensor]) -> Any:
    """Sizes of a checkpoint.

    Raises:
        KeyError: If a tensor is missing that tells one.
    """
    from transformers import Mask2FormerConfig, SwinConfig

    pixel, decoder = "panoptic_head.pixel_decoder", "panoptic_head.transformer_decoder"
    stages = range(_count(state, r"backbone\.stages\.(\d+)\."))
    tables = [state[f"backbone.stages.{i}.blocks.0.attn.w_msa.relative_position_bias_table"] for i in stages]
    patch = state["backbone.patch_embed.projection.weight"]
    if len(tables) != 4:
        raise ValueError(f"its backbone has {len(tables)} stages, allowed: 4")
    backbone = SwinConfig(
        image_size=224,
        patch_size=patch.shape[-1],
        embed_dim=patch.shape[0],
        depths=[_count(state, rf"backbone\.stages\.{i}\.blocks\.(\d+)\.") for i in stages],
        num_heads=[table.shape[1] for table in tables],
        window_size=(round(len(tables[0]) ** 0.5) + 1) // 2,
        out_features=[f"stage{i + 1}" for i in stages],
    )
    classes = len(state["panoptic_head.cls_embed.bias"]) - 1
    names = CLASSES if classes == len(CLASSES) else [str(i) for i in range(classes)]
    width = state["panoptic_head.query_embed.weight"].shape
    return Mask2FormerConfig(
        backbone_config=backbone,
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
        num_queries=width[0],
        hidden_dim=width[1],
        feature_size=width[1],
        mask_feature_size=len(state[f"{pixel}.mask_feature.bias"]),
        encoder_layers=_count(state, rf"{re.escape(pixel)}\.encoder\.layers\.(\d+)\."),
        encoder_feedforward_dim=len(state[f"{pixel}.encoder.layers.0.ffns.0.layers.0.0.bias"]),
        decoder_layers=_count(state, rf"{re.escape(decoder)}\.layers\.(\d+)\.") + 1,
        dim_feedforward=len(state[f"{decoder}.layers.0.ffns.0.layers.0.0.bias"]),
        num_attention_heads=HEADS,
    )
