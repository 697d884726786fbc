"""Reference trajectories of optimizers: entries of the index, their tensors, and runs of our classes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from golden import golden_files
from safetensors.torch import load_file
from torch import Tensor, nn

import thalweg.core_optim.registry as registry


def trajectories(pattern: str) -> list[Path]:
    """Files of the trajectories whose names match."""
    return golden_files("optim", pattern)


def load(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Entry of the index and tensors of a file."""
    entries = json.loads((path.parent / "index.json").read_text())
    return next(entry for entry in entries if entry["file"] == path.name), load_file(path)


def follow(
    entry: dict[str, Any],
    data: dict[str, Tensor],
    prepare: Callable[[Any, list[str]], None] | None = None,
    dtype: torch.dtype = torch.float32,
) -> float:
    """Run the public class on the prescribed gradients and compare every parameter after every step.

    Args:
        entry: Of the index.
        data: Tensors of the file.
        prepare: Gets the optimizer and the names of its parameters in their order, before the first step.
        dtype: Of the parameters.

    Returns:
        Largest deviation as a share of the allowed one.
    """
    params = {name: nn.Parameter(data[f"param.{name}.init"].to(dtype, copy=True)) for name in entry["params"]}
    groups = [{"params": [params[n] for n in g["params"]], **g["kwargs"]} for g in entry["groups"]]
    kind = registry.optimizer_class(registry.CLASSES[entry["optimizer"]])
    optimizer = kind(groups, **entry["kwargs"])
    if prepare:
        prepare(optimizer, [name for group in entry["groups"] for name in group["params"]])
    worst = 0.0
    for t in range(entry["steps"]):
        for name, parameter in params.items():
            parameter.grad = data[f"grad.{t}.{name}"].to(dtype, copy=True)
        optimizer.step()
        for name, parameter in params.items():
            wanted = data[f"param.{name}.{t}"]
            allowed = entry["atol"] + entry["rtol"] * wanted.abs()
            worst = max(worst, ((parameter.detach() - wanted).abs() / allowed).max().item())
    return worst
