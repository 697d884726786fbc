"""Loading and saving scOT in the published layout, and fitting a pretrained network to other channels."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from thalweg.checkpoints import hub, strict, tensors
from thalweg.checkpoints.atomic import write_text
from thalweg.checkpoints.keymap import KeyMap
from thalweg.checkpoints.maps.poseidon import RULES
from thalweg.pde.poseidon.config import ScOTConfig
from thalweg.pde.poseidon.model import ScOT

Init = Literal["default", "normal"]


def replace_embedding_recovery(
    model: ScOT,
    num_channels: int,
    num_out_channels: int,
    *,
    channel_slices: Sequence[int] | None = None,
    init: Init = "default",
    reset_matching: bool = False,
) -> list[str]:
    """Fit a network to other channels in place: fresh layers from fields to tokens and back.

    As in the published fine-tuning, tensors whose shape does not change keep their values: the bias of the
    patch embedding, and everything if the channels stay the same. Call it before the optimizer is built.

    Args:
        model: network to change; its configuration follows.
        num_channels: input channels from now on.
        num_out_channels: output channels from now on.
        channel_slices: loss groups for the new output channels; not needed if the present ones still fit.
        init: fresh weights from torch's default for convolutions (as published with transformers 4.29), or
            ``normal`` with ``initializer_range`` and zero biases.
        reset_matching: draw all weights of the three layers afresh, also those whose shape fits.

    Returns:
        Names of the parameters that were drawn afresh.

    Raises:
        ValueError: if the loss groups do not fit the new channels.
    """
    if init not in ("default", "normal"):
        raise ValueError(f"init is {init!r}, allowed: default, normal")
    slices = channel_slices if channel_slices is not None else model.config.channel_slice_list_normalized_loss
    if channel_slices is None and slices is not None and slices[-1] != num_out_channels:
        raise ValueError(
            f"the loss groups {tuple(slices)} do not cover {num_out_channels} output channels: pass "
            "channel_slices (channel_slice_list_normalized_loss when loading), e.g. (0, 1, 3, 4)"
        )
    config = model.config.replace(
        num_channels=num_channels,
        num_out_channels=num_out_channels,
        channel_slice_list_normalized_loss=None if slices is None else tuple(slices),
    )
    width, patch = config.embed_dim, config.patch_size
    like = {
        "device": model.patch_recovery.mixup.weight.device,
        "dtype": model.patch_recovery.mixup.weight.dtype,
    }
    fresh: dict[str, nn.Conv2d | nn.ConvTranspose2d] = {
        "embeddings.patch_embeddings.projection": nn.Conv2d(num_channels, width, patch, patch, **like),
        "patch_recovery.projection": nn.ConvTranspose2d(width, num_out_channels, patch, patch, **like),
        "patch_recovery.mixup": nn.Conv2d(
            num_out_channels, num_out_channels, 5, padding=2, bias=False, **like
        ),
    }
    drawn = []
    for name, layer in fresh.items():
        if init == "normal":
            _draw_normal(layer, config.initializer_range)
        kept = {} if reset_matching else _matching(layer, model.get_submodule(name))
        drawn += [f"{name}.{key}" for key, _ in layer.named_parameters() if key not in kept]
        layer.load_state_dict(kept, strict=False)
        layer.requires_grad_(model.get_submodule(name).weight.requires_grad).train(model.training)
        model.set_submodule(name, layer)
    model.config = config
    return drawn


# The loader has a flag of the same name.
_replace = replace_embedding_recovery


def load_pretrained(
    source: str | os.PathLike[str],
    *,
    replace_embedding_recovery: bool = False,
    init: Init = "default",
    reset_matching: bool = False,
    **changes: Any,
) -> ScOT:
    """Network with stored weights, from a folder or a hub repository such as ``camlab-ethz/Poseidon-T``.

    Every stored tensor must find its place and every parameter its value; older names are translated.

    Args:
        source: folder with ``config.json`` and weights, ``org/name``, or ``hf://org/name[@revision]``.
        replace_embedding_recovery: allow ``num_channels`` and ``num_out_channels`` to change, with fresh
            weights where shapes differ; see the function of that name.
        init: how these fresh weights are drawn.
        reset_matching: draw embedding and recovery afresh even where shapes agree.
        changes: fields of the stored configuration to change, e.g. ``p=2`` or ``drop_path_rate=0.1``.

    Raises:
        ValueError: if the weights do not fit the configuration, or if channels change without permission.
    """
    folder = hub.resolve(os.fspath(source))
    stored = ScOTConfig.from_json(hub.resolve(folder, "config.json"))
    weights = hub.weight_file(folder)
    state, _ = KeyMap(RULES).apply(tensors.load(weights))
    if "embeddings.mask_token" in state:
        stored = stored.replace(use_mask_token=True)
    config = _changed(stored, changes)
    if (config.num_channels, config.num_out_channels) != (stored.num_channels, stored.num_out_channels):
        _require_permission(source, stored, config, replace_embedding_recovery)
    # Everything but channels and loss is final, so that the stored tensors are checked against the new shape.
    channels = {name: getattr(stored, name) for name in _CHANNEL_FIELDS}
    with torch.device("meta"):
        model = ScOT(config.replace(**channels))
    model.to_empty(device="cpu")
    strict.load_strict(model, state, weights)
    if not replace_embedding_recovery:
        model.config = config
        return model
    slices = config.channel_slice_list_normalized_loss
    _replace(
        model,
        config.num_channels,
        config.num_out_channels,
        channel_slices=slices,
        init=init,
        reset_matching=reset_matching,
    )
    model.config = config
    return model


_CHANNEL_FIELDS = ("num_channels", "num_out_channels", "channel_slice_list_normalized_loss", "learn_residual")


def save_pretrained(model: ScOT, folder: str | os.PathLike[str]) -> None:
    """Write ``config.json`` and ``model.safetensors`` (in shards beyond 5 GB) in the published layout."""
    folder = Path(folder)
    tensors.save_sharded(model.state_dict(), folder)
    write_text(folder / "config.json", json.dumps(model.config.to_json(), indent=2) + "\n")


def _changed(stored: ScOTConfig, changes: dict[str, Any]) -> ScOTConfig:
    """Stored configuration with changes; changed output channels need their own loss groups."""
    outputs = changes.get("num_out_channels", stored.num_out_channels)
    slices = changes.get("channel_slice_list_normalized_loss", stored.channel_slice_list_normalized_loss)
    if outputs != stored.num_out_channels and slices is not None and slices[-1] != outputs:
        raise ValueError(
            f"num_out_channels={outputs} needs loss groups that end there, not {tuple(slices)}: pass "
            f"channel_slice_list_normalized_loss, e.g. (0, {outputs})"
        )
    return stored.replace(**changes)


def _require_permission(source: object, stored: ScOTConfig, config: ScOTConfig, granted: bool) -> None:
    if not granted:
        raise ValueError(
            f"{source} has {stored.num_channels} input and {stored.num_out_channels} output channels, asked "
            f"for {config.num_channels} and {config.num_out_channels}: pass replace_embedding_recovery=True "
            "to give embedding and recovery fresh weights"
        )


def _matching(fresh: nn.Module, old: nn.Module) -> dict[str, torch.Tensor]:
    shapes = {name: value.shape for name, value in fresh.named_parameters()}
    return {name: value.detach() for name, value in old.named_parameters() if value.shape == shapes[name]}


def _draw_normal(layer: nn.Conv2d | nn.ConvTranspose2d, std: float) -> None:
    nn.init.normal_(layer.weight, std=std)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
