"""What the suite needs to know about the networks that draw images.

Any ``UNet2DModel`` and ``DiTTransformer2DModel`` of diffusers will do, and our ``CaptionedTransformer``; all
take ``network(x, t, class_labels=...)``, where a captioned one has the tokens (B, L) of captions as labels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Mapping


def config_of(network: nn.Module) -> Mapping[str, Any]:
    """The configuration of a diffusers network.

    Raises:
        ValueError: If it is none that draws images.
    """
    config = getattr(network, "config", None)
    known = config is not None and ("num_class_embeds" in config or "num_embeds_ada_norm" in config)
    if not known and not takes_captions(network):
        raise ValueError(
            f"network is a {type(network).__name__}, allowed: diffusers.UNet2DModel,"
            " diffusers.DiTTransformer2DModel, thalweg.diffusion.captioned.CaptionedTransformer"
        )
    assert config is not None
    return config


def takes_captions(network: nn.Module) -> bool:
    """Whether the labels of a network are tokens of captions."""
    return hasattr(network, "empty_caption")


def no_content(network: nn.Module) -> Tensor | None:
    """What stands for an image of nothing in particular: a label () or tokens (L,); None without labels."""
    if takes_captions(network):
        return torch.tensor(network.empty_caption)
    null = null_label(network)
    return None if null is None else torch.tensor(null)


def null_label(network: nn.Module) -> int | None:
    """The label that stands for no class: the last of the network's table, or None without a table."""
    config = config_of(network)
    if takes_captions(network):
        return None
    if "num_embeds_ada_norm" in config:
        return int(config["num_embeds_ada_norm"])  # diffusers adds a row to the table
    count = config["num_class_embeds"]
    return None if count is None else int(count) - 1


def check_fit(network: nn.Module, *, size: int, channels: int, classes: int) -> None:
    """Make sure that a network fits the images and their classes.

    Raises:
        ValueError: If it does not.
    """
    config = config_of(network)
    for name, found in (("sample_size", size), ("in_channels", channels)):
        if config[name] != found:
            raise ValueError(f"the network's {name} is {config[name]}, but the images have {found}")
    null = null_label(network)
    if null is not None and null < classes:
        raise ValueError(
            f"the network knows {null} classes and one label for none, but the images have {classes} classes:"
            f" num_class_embeds (UNet2DModel) must be {classes + 1}, num_embeds_ada_norm (DiT) {classes}"
        )


def check_captions(network: nn.Module, *, size: int, channels: int, words: int, length: int) -> None:
    """Make sure that a network fits latents and their captions.

    Raises:
        ValueError: If it does not.
    """
    if not takes_captions(network):
        raise ValueError(f"the images have captions, but {type(network).__name__} takes none")
    check_fit(network, size=size, channels=channels, classes=0)
    for name, found in (("vocab_size", words), ("length", length)):
        if (known := getattr(network, name)) != found:
            raise ValueError(f"the network's {name} is {known}, but the captions have {found}")


def keep_labels(network: nn.Module) -> None:
    """Keep a DiT from dropping labels on its own: whoever trains it decides about that."""
    from diffusers.models.embeddings import LabelEmbedding

    for part in network.modules():
        if isinstance(part, LabelEmbedding):
            part.dropout_prob = 0.0


def predict(network: nn.Module, x_BCHW: Tensor, label_B: Tensor, classes_B: Tensor | None) -> Tensor:
    """The network's answer (B, C, H, W); a predicted variance, which some DiT add, is left out."""
    output: Tensor = network(x_BCHW, label_B, class_labels=classes_B).sample
    return output[:, : x_BCHW.shape[1]]
