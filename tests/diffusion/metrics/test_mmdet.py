"""The detector of GenEval from a checkpoint of mmdet: names, orders, and that nothing is lost or left over.

The names below are written from the modules of mmdet 2.x, not from our map: backbones/swin.py (WindowMSA,
SwinBlock, PatchMerging), plugins/msdeformattn_pixel_decoder.py and dense_heads/mask2former_head.py, with
mmcv's FFN, MultiheadAttention and ConvModule.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from thalweg.apps.cli import main
from thalweg.diffusion.metrics.mmdet import UNUSED, by_position, converted, mask2former_from_mmdet
from thalweg.diffusion.nft.prompt_sets import CLASSES

WIDTHS, HEADS, DEPTHS, WINDOW = (12, 24, 48, 96), (1, 2, 3, 4), (1, 1, 2, 1), 3
FEATURES, ENCODER_FFN, DECODER_FFN, QUERIES = 32, 24, 40, 5
State = dict[str, Tensor]


def linear(name: str, outputs: int, inputs: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), **({f"{name}.bias": (outputs,)} if bias else {})}


def norm(name: str, size: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def conv(name: str, outputs: int, inputs: int, size: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs, size, size), **({f"{name}.bias": (outputs,)} if bias else {})}


def ffn(name: str, width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """FFN of mmcv: Sequential(Sequential(Linear, act, Dropout), Linear, Dropout)."""
    return {**linear(f"{name}.layers.0.0", hidden, width), **linear(f"{name}.layers.1", width, hidden)}


def backbone() -> dict[str, tuple[int, ...]]:
    shapes = {**conv("patch_embed.projection", WIDTHS[0], 3, 4), **norm("patch_embed.norm", WIDTHS[0])}
    for i, (width, heads, depth) in enumerate(zip(WIDTHS, HEADS, DEPTHS, strict=True)):
        for j in range(depth):
            block = f"stages.{i}.blocks.{j}"
            shapes |= norm(f"{block}.norm1", width)
            shapes |= {f"{block}.attn.w_msa.relative_position_bias_table": ((2 * WINDOW - 1) ** 2, heads)}
            shapes |= {f"{block}.attn.w_msa.relative_position_index": (WINDOW**2, WINDOW**2)}
            shapes |= linear(f"{block}.attn.w_msa.qkv", 3 * width, width)
            shapes |= linear(f"{block}.attn.w_msa.proj", width, width)
            shapes |= {**norm(f"{block}.norm2", width), **ffn(f"{block}.ffn", width, 4 * width)}
        if i < 3:
            shapes |= norm(f"stages.{i}.downsample.norm", 4 * width)
            shapes |= linear(f"stages.{i}.downsample.reduction", 2 * width, 4 * width, bias=False)
        shapes |= norm(f"norm{i}", width)
    return {f"backbone.{name}": shape for name, shape in shapes.items()}


def head() -> dict[str, tuple[int, ...]]:
    d = FEATURES
    shapes = {"pixel_decoder.level_encoding.weight": (3, d)}
    for i, width in enumerate(WIDTHS[:0:-1]):
        shapes |= {**conv(f"pixel_decoder.input_convs.{i}.conv", d, width, 1)}
        shapes |= norm(f"pixel_decoder.input_convs.{i}.gn", d)
    layer = "pixel_decoder.encoder.layers.0"
    for part, outputs in (("sampling_offsets", 8 * 3 * 4 * 2), ("attention_weights", 8 * 3 * 4)):
        shapes |= linear(f"{layer}.attentions.0.{part}", outputs, d)
    for part in ("value_proj", "output_proj"):
        shapes |= linear(f"{layer}.attentions.0.{part}", d, d)
    shapes |= {**ffn(f"{layer}.ffns.0", d, ENCODER_FFN)}
    shapes |= {**norm(f"{layer}.norms.0", d), **norm(f"{layer}.norms.1", d)}
    shapes |= conv("pixel_decoder.lateral_convs.0.conv", d, WIDTHS[0], 1, bias=False)
    shapes |= conv("pixel_decoder.output_convs.0.conv", d, d, 3, bias=False)
    shapes |= {**norm("pixel_decoder.lateral_convs.0.gn", d), **norm("pixel_decoder.output_convs.0.gn", d)}
    shapes |= conv("pixel_decoder.mask_feature", d, d, 1)
    for i in range(2):
        layer = f"transformer_decoder.layers.{i}"
        for k in range(2):
            shapes |= {f"{layer}.attentions.{k}.attn.in_proj_weight": (3 * d, d)}
            shapes |= {f"{layer}.attentions.{k}.attn.in_proj_bias": (3 * d,)}
            shapes |= linear(f"{layer}.attentions.{k}.attn.out_proj", d, d)
        shapes |= ffn(f"{layer}.ffns.0", d, DECODER_FFN)
        for k in range(3):
            shapes |= norm(f"{layer}.norms.{k}", d)
    shapes |= norm("transformer_decoder.post_norm", d)
    for part, rows in (("query_embed", QUERIES), ("query_feat", QUERIES), ("level_embed", 3)):
        shapes |= {f"{part}.weight": (rows, d)}
    shapes |= linear("cls_embed", len(CLASSES) + 1, d)
    for i in (0, 2, 4):
        shapes |= linear(f"mask_embed.{i}", d, d)
    return {f"panoptic_head.{name}": shape for name, shape in shapes.items()}


def index_table() -> Tensor:
    """mmdet's: sequences with two steps, added and flipped."""
    first, second = torch.arange(0, (2 * WINDOW - 1) * WINDOW, 2 * WINDOW - 1), torch.arange(WINDOW)
    coords = (first[:, None] + second[None]).reshape(1, -1)
    return (coords + coords.T).flip(1).contiguous()


@pytest.fixture(scope="module")
def state() -> State:
    g = torch.Generator().manual_seed(0)
    found = {name: 0.1 * torch.randn(shape, generator=g) for name, shape in {**backbone(), **head()}.items()}
    tables = {name: index_table() for name in found if name.endswith("relative_position_index")}
    return {**found, **tables}


@pytest.fixture(scope="module")
def model(state: State) -> Any:
    return mask2former_from_mmdet(state)


def test_every_tensor_finds_a_place_of_its_size_and_no_place_stays_empty(state: State, model: Any) -> None:
    own = model.state_dict()
    found = converted(state)
    assert set(found) | set(UNUSED) == set(own)
    assert not set(found) & set(UNUSED)
    indices = sum(value.numel() for name, value in state.items() if name.endswith("_index"))
    total = sum(value.numel() for value in state.values()) - indices
    assert total == sum(value.numel() for value in found.values())
    for name, value in found.items():
        assert torch.equal(value, own[name]), name
    config = model.config
    assert (config.num_queries, config.encoder_layers, config.decoder_layers) == (QUERIES, 1, 3)
    assert [config.id2label[i] for i in range(80)] == list(CLASSES)
    swin = config.backbone_config
    assert (swin.window_size, list(swin.depths), list(swin.num_heads)) == (WINDOW, [*DEPTHS], [*HEADS])


PLACES = {
    "backbone.patch_embed.norm.bias": "model.pixel_level_module.encoder.swin.embeddings.norm.bias",
    "backbone.stages.2.blocks.1.norm2.weight":
        "model.pixel_level_module.encoder.swin.encoder.layers.2.blocks.1.layernorm_after.weight",
    "backbone.stages.3.blocks.0.ffn.layers.1.bias":
        "model.pixel_level_module.encoder.swin.encoder.layers.3.blocks.0.mlp.fc2.bias",
    "backbone.norm3.bias": "model.pixel_level_module.encoder.hidden_states_norms.stage4.bias",
    "panoptic_head.pixel_decoder.input_convs.0.conv.weight":
        "model.pixel_level_module.decoder.input_projections.0.0.weight",
    "panoptic_head.pixel_decoder.encoder.layers.0.norms.0.bias":
        "model.pixel_level_module.decoder.encoder.layers.0.self_attn_layer_norm.bias",
    "panoptic_head.pixel_decoder.output_convs.0.conv.weight":
        "model.pixel_level_module.decoder.layer_1.0.weight",
    "panoptic_head.transformer_decoder.layers.1.attentions.0.attn.in_proj_weight":
        "model.transformer_module.decoder.layers.1.cross_attn.in_proj_weight",
    "panoptic_head.transformer_decoder.layers.1.norms.0.bias":
        "model.transformer_module.decoder.layers.1.cross_attn_layer_norm.bias",
    "panoptic_head.transformer_decoder.layers.0.norms.2.bias":
        "model.transformer_module.decoder.layers.0.final_layer_norm.bias",
    "panoptic_head.query_embed.weight": "model.transformer_module.queries_embedder.weight",
    "panoptic_head.query_feat.weight": "model.transformer_module.queries_features.weight",
    "panoptic_head.mask_embed.4.bias":
        "model.transformer_module.decoder.mask_predictor.mask_embedder.2.0.bias",
    "panoptic_head.cls_embed.bias": "class_predictor.bias",
}  # fmt: skip
"""By what the layers do in the two programs."""


@pytest.mark.parametrize("name", PLACES)
def test_tensors_go_where_the_layer_does_the_same(name: str, state: State, model: Any) -> None:
    assert torch.equal(model.state_dict()[PLACES[name]], state[name])


def test_merged_patches_give_the_same_numbers(state: State, model: Any) -> None:
    """mmdet unfolds channel by channel, transformers concatenates position by position."""
    x = torch.randn(2, 6 * 4, WIDTHS[0], generator=torch.Generator().manual_seed(1))
    rows = nn.Unfold(2, stride=2)(x.transpose(1, 2).unflatten(2, (6, 4))).transpose(1, 2)
    name = "backbone.stages.0.downsample"
    weight, bias = state[f"{name}.norm.weight"], state[f"{name}.norm.bias"]
    rows = nn.functional.layer_norm(rows, (4 * WIDTHS[0],), weight, bias)
    expected = rows @ state[f"{name}.reduction.weight"].T
    layer = model.model.pixel_level_module.encoder.swin.encoder.layers[0].downsample
    assert torch.allclose(layer(x, (6, 4)), expected, atol=1e-5)
    assert not torch.equal(by_position(weight), weight)


def test_windows_attend_the_same(state: State, model: Any) -> None:
    """Attention of one window as mmdet's WindowMSA has it: qkv in one tensor, a bias by its own index."""
    i, width, heads = 1, WIDTHS[1], HEADS[1]
    name = f"backbone.stages.{i}.blocks.0.attn.w_msa"
    x = torch.randn(1, WINDOW**2, width, generator=torch.Generator().manual_seed(2))
    qkv = (x @ state[f"{name}.qkv.weight"].T + state[f"{name}.qkv.bias"]).unflatten(2, (3, heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    table = state[f"{name}.relative_position_bias_table"]
    bias = table[index_table().flatten()].unflatten(0, (WINDOW**2, WINDOW**2)).permute(2, 0, 1)
    weights = ((q * (width // heads) ** -0.5) @ k.transpose(-2, -1) + bias).softmax(dim=-1)
    answer = (weights @ v).transpose(1, 2).flatten(2)
    expected = answer @ state[f"{name}.proj.weight"].T + state[f"{name}.proj.bias"]
    layer = model.model.pixel_level_module.encoder.swin.encoder.layers[i].blocks[0].attention
    assert torch.allclose(layer(x)[0], expected, atol=1e-5)


def test_queries_attend_to_each_other_the_same(state: State, model: Any) -> None:
    name = "panoptic_head.transformer_decoder.layers.0.attentions.1.attn"
    reference = nn.MultiheadAttention(FEATURES, 8).eval()
    reference.load_state_dict({key: state[f"{name}.{key}"] for key in reference.state_dict()})
    x, place = torch.randn(2, QUERIES, 1, FEATURES, generator=torch.Generator().manual_seed(3))
    expected, _ = reference(x + place, x + place, x)
    layer = model.model.transformer_module.decoder.layers[0].self_attn
    found = layer(hidden_states=x, position_embeddings=place)[0]
    assert torch.allclose(found, expected, atol=1e-5)


def test_what_does_not_fit_is_refused(state: State) -> None:
    left = {k: v for k, v in state.items() if k != "panoptic_head.query_feat.weight"}
    with pytest.raises(ValueError, match=r"1 tensors are missing \(model\.transformer_module\.queries_feat"):
        mask2former_from_mmdet(left, "a.pth")
    more = {**state, "panoptic_head.decoder_input_projs.0.weight": torch.zeros(1)}
    with pytest.raises(
        ValueError, match=r"a\.pth does not fit .*not part of the model .*decoder_input_projs"
    ):
        mask2former_from_mmdet(more, "a.pth")
    other = {**state, "backbone.stages.0.blocks.0.attn.w_msa.relative_position_index": index_table().T}
    with pytest.raises(ValueError, match=r"another order of relative positions in 'backbone\.stages\.0"):
        mask2former_from_mmdet(other, "a.pth")
    broken = {**state, "panoptic_head.cls_embed.bias": torch.full((81,), torch.nan)}
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        mask2former_from_mmdet(broken, "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth is no Mask2Former of mmdet with a Swin backbone"):
        mask2former_from_mmdet({"weight": torch.zeros(1)}, "a.pth")


def test_the_command_writes_a_folder_that_opens(state: State, model: Any, tmp_path: Path) -> None:
    from transformers import Mask2FormerForUniversalSegmentation

    torch.save({"meta": {"epoch": 50}, "state_dict": state}, tmp_path / "a.pth")
    words = ["import", str(tmp_path / "a.pth"), "--layout=mmdet-mask2former", f"--to={tmp_path / 'out'}"]
    main(words)
    again = Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path / "out").eval()
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        assert torch.equal(again(x).masks_queries_logits, model(x).masks_queries_logits)
    provenance = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert provenance["imported from"] == "a.pth"
    assert provenance["license"] == "apache-2.0"
    with pytest.raises(SystemExit, match="is not empty; pass --overwrite"):
        main(words)
