"""Start from pretrained weights: load them into a network that may have other channels."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from torch import nn

from thalweg.checkpoints import lightning_ckpt
from thalweg.pde.poseidon.config import ScOTConfig
from thalweg.pde.poseidon.model import ScOT
from thalweg.pde.poseidon.pretrained import replace_embedding_recovery

FREE = ("image_size", "p", "channel_slice_list_normalized_loss", "drop_path_rate", "initializer_range")
"""Fields that may differ between a checkpoint and the network that starts from it."""
CHANNELS = ("num_channels", "num_out_channels")


def load_pretrained(network: nn.Module, ref: str, *, replace: bool) -> None:
    """Copy pretrained weights into a scOT, which keeps its own configuration.

    Args:
        network: The scOT to fill.
        ref: ``hf://org/name``, a local Hugging Face folder, or a Lightning ``.ckpt`` of such a network (its
            averaged weights where it has them).
        replace: Let patch embedding and recovery be initialised afresh where channel counts differ.

    Raises:
        ValueError: If the network is no scOT, or differs from the checkpoint in what cannot be replaced.
    """
    if not isinstance(network, ScOT):
        raise ValueError(f"pretrained={ref!r} needs a scOT network, not {type(network).__name__}")
    source = _from_lightning(ref) if ref.endswith(".ckpt") else ScOT.from_pretrained(ref)
    config = network.config
    different = [
        f"{f.name} ({getattr(source.config, f.name)} there, {getattr(config, f.name)} here)"
        for f in fields(ScOTConfig)
        if f.name not in (*FREE, *CHANNELS)
        and "dropout" not in f.name
        and getattr(source.config, f.name) != getattr(config, f.name)
    ]
    if different:
        raise ValueError(f"the pretrained network {ref} is built differently: {'; '.join(different)}")
    counts = [(getattr(source.config, name), getattr(config, name)) for name in CHANNELS]
    if any(a != b for a, b in counts) and not replace:
        (cin, new_in), (cout, new_out) = counts
        raise ValueError(
            f"the pretrained network {ref} maps {cin} to {cout} channels, the one here {new_in} to {new_out}:"
            " set replace_embedding_recovery to true to initialise patch embedding and recovery afresh"
        )
    if replace:
        slices = config.channel_slice_list_normalized_loss or (0, config.num_out_channels)
        replace_embedding_recovery(
            source, config.num_channels, config.num_out_channels, channel_slices=slices
        )
    network.load_state_dict(source.state_dict())


def _from_lightning(ref: str) -> ScOT:
    """The scOT inside a Lightning checkpoint.

    Raises:
        ValueError: If the checkpoint holds another network.
    """
    checkpoint = lightning_ckpt.read(Path(ref))
    network = checkpoint.require_config()["model"]["init_args"]["network"]
    if network["class_path"].rpartition(".")[2] != "ScOT":
        raise ValueError(f"{ref} holds a {network['class_path']}, not a scOT")
    source = ScOT(ScOTConfig.from_json(network["init_args"]["config"]))
    source.load_state_dict(checkpoint.network_state())
    return source
