"""Configurations: presets, files, derived shapes and refusals."""

import json
from pathlib import Path

import pytest
from golden_scot import CASES
from jsonargparse import ArgumentParser

from thalweg.pde.poseidon import ScOT, ScOTConfig


@pytest.mark.parametrize("name", CASES)
def test_published_json_survives_a_round_trip(name: str) -> None:
    text = (CASES[name] / "config.json").read_text()
    original, written = json.loads(text), ScOTConfig.from_json(CASES[name] / "config.json").to_json()
    ignored = {"transformers_version", "architectures"}
    assert {k: v for k, v in original.items() if k not in ignored}.items() <= written.items()
    assert ScOTConfig.from_json(written) == ScOTConfig.from_json(original)


def test_reference_defaults() -> None:
    config = ScOTConfig()
    assert (config.image_size, config.embed_dim, config.depths, config.window_size) == (
        224,
        96,
        (2, 2, 6, 2),
        7,
    )
    assert ScOTConfig.from_json({"skip_connections": [True, True, True], "depths": [2, 2, 6, 2]}) == config


def test_published_sizes_shift_on_the_finest_level_only() -> None:
    config = ScOTConfig.preset("T")
    assert config.grids == ((32, 32), (16, 16), (8, 8), (4, 4))
    assert config.windows == ((16, 16), (16, 16), (8, 8), (4, 4))
    assert config.shifts == ((8, 8), (0, 0), (0, 0), (0, 0))
    assert config.widths == (48, 96, 192, 384)


def test_odd_grids_round_up_and_their_windows_down() -> None:
    config = ScOTConfig.preset("T", image_size=(100, 52))
    assert config.grids == ((25, 13), (13, 7), (7, 4), (4, 2))
    assert config.windows == ((16, 13), (12, 6), (6, 3), (3, 1))
    assert config.shifts[0] == (8, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embed_dims": 48}, "did you mean embed_dim"),
        ({"embed_dim": 50}, "not divisible by 3 heads"),
        ({"depths": (4, 4, 4)}, "num_heads needs one entry per level"),
        ({"skip_connections": (2, 2, 2)}, "skip_connections needs one entry per level"),
        ({"p": 3}, "p must be 1 or 2"),
        ({"channel_slice_list_normalized_loss": (0, 3, 3)}, "must increase"),
        ({"channel_slice_list_normalized_loss": (0, 5)}, "exceeds num_out_channels"),
        ({"image_size": (128, 128, 128)}, "pair"),
        ({"image_size": 2}, "smaller than one patch"),
        ({"hidden_act": "gelu_fast"}, "known: gelu"),
        ({"residual_model": "unet"}, "known: convnext, resnet"),
        ({"drop_path_rate": 1.0}, r"\[0, 1\)"),
        ({"learn_residual": True, "num_channels": 2}, "learn_residual"),
        ({"use_absolute_embeddings": True, "image_size": 126}, "divisible by the patch"),
    ],
)
def test_impossible_networks_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScOTConfig.preset("T", **changes)


def test_unknown_size_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="known: T, S, B, L"):
        ScOTConfig.preset("XL")


def test_damaged_config_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        ScOTConfig.from_json(tmp_path / "config.json")


def test_yaml_builds_a_network() -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(ScOT, "network")
    parsed = parser.parse_object(
        {
            "network": {
                "config": {
                    "image_size": [32, 64],
                    "embed_dim": 12,
                    "depths": [1, 1],
                    "num_heads": [3, 6],
                    "skip_connections": [1, 0],
                    "use_conditioning": True,
                }
            }
        }
    )
    network = parser.instantiate(parsed).network
    assert network.config.image_shape == (32, 64)
    assert network.config.depths == (1, 1)
