"""What a parameter is for, told by its module and shape rather than by its name.

A parameter may be of several kinds: the weight of a patch embedding is an embedding and a convolution.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn

WEIGHTED = (nn.Linear, nn.modules.conv._ConvNd)
LORA_A = re.compile(r"lora_(embedding_)?A\b|lora\.down\b")
LORA_B = re.compile(r"lora_(embedding_)?B\b|lora\.up\b")
MAPS = (*WEIGHTED, nn.MultiheadAttention, nn.Bilinear)
HEADS = ("recovery", "unembed", "finallayer", "lmhead")
"""Parts of the names of classes that lead out of a network, in lower case."""
SPECIAL = frozenset({"norm", "bias", "embedding", "head", "table", "vector"})
"""Kinds that the rules for hidden matrices are not for."""


def kinds_of(module: nn.Module) -> dict[Tensor, set[str]]:
    """The kinds of every parameter; those of a tied parameter are those of all its places.

    norm       in a module whose class is a norm, the maps of a conditional norm included
    bias       called bias
    embedding  in nn.Embedding or a class called ...Embed..., or the first linear map or convolution
    table      of two or more dimensions, in no linear map, convolution or attention: positions, queries
    table      of two or more dimensions, of no linear map, convolution or attention: positions, queries, ...
    lora_a, lora_b   the two factors of a low-rank adapter of peft or diffusers
    vector     at most one dimension
    matrix     two dimensions;   conv   more
    """
    found: dict[Tensor, set[str]] = {}
    modules = dict(module.named_modules(remove_duplicate=False))
    first, last = _ends(modules)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        path, _, own = name.rpartition(".")
        owners = _classes(path, modules)
        kinds = found.setdefault(parameter, set())
        kinds.add("vector" if parameter.dim() < 2 else "matrix" if parameter.dim() == 2 else "conv")
        if any("norm" in owner.lower() for owner in owners):
            kinds.add("norm")
        if own == "bias" or own.endswith("_bias"):
            kinds.add("bias")
        if parameter.dim() > 1 and not isinstance(modules[path], (*MAPS, nn.Embedding)):
            kinds.add("table")
        low_rank = [kind for kind, word in (("lora_a", LORA_A), ("lora_b", LORA_B)) if word.search(name)]
        kinds.update(low_rank)
        if low_rank:
            continue
        if path == first or any("embed" in owner.lower() for owner in owners):
            kinds.add("embedding")
        if path == last or any(word in owner.lower() for owner in owners for word in HEADS):
            kinds.add("head")
    return found


def _ends(modules: Mapping[str, nn.Module]) -> tuple[str | None, str | None]:
    """Names of the first and the last layer with a weight; adapters do not count, nor does a lone layer."""
    layers = [
        name
        for name, module in modules.items()
        if isinstance(module, WEIGHTED) and not LORA_A.search(name) and not LORA_B.search(name)
    ]
    return (layers[0], layers[-1]) if len(layers) > 2 else (None, layers[-1] if layers else None)


def _classes(path: str, modules: Mapping[str, nn.Module]) -> list[str]:
    """Classes of the module and of those it is part of, the outermost left out."""
    parts = path.split(".") if path else []
    return [type(modules[".".join(parts[: i + 1])]).__name__ for i in range(len(parts))]
