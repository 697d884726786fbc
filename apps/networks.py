"""Trained networks from wherever they lie: checkpoints, run folders, exported folders, the hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from thalweg.apps.results import file_hash

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedNetwork:
    """A network and what is known about its origin."""

    network: nn.Module
    """The network, with its weights."""
    source: Path
    """File that held the weights."""
    weights: Literal["ema", "raw"]
    """Averaged weights of a training run, or the weights as they are."""
    app_config: dict[str, Any] | None
    """Configuration of the training run; None for published and exported networks."""

    @property
    def data_config(self) -> dict[str, Any]:
        """Arguments of the data module that the network was trained with; empty if unknown."""
        if self.app_config is None:
            return {}
        arguments: dict[str, Any] = self.app_config["data"].get("init_args", {})
        return arguments

    def describe(self) -> dict[str, Any]:
        """Origin and size, for results."""
        return {
            "class": type(self.network).__name__,
            "parameters": sum(parameter.numel() for parameter in self.network.parameters()),
            "source": str(self.source),
            "weights": self.weights,
            "sha256": file_hash(self.source),
        }

    def training(self) -> dict[str, Any]:
        """Data sets, trajectories per set and starting point of the training; empty if unknown."""
        data = self.data_config
        if self.app_config is None or not data:
            return {}
        sets = [entry if isinstance(entry, dict) else {"name": entry} for entry in data["datasets"]]
        own = {entry.get("num_trajectories") for entry in sets}
        shared = data.get("num_trajectories", -1)
        return {
            "datasets": [entry["name"] for entry in sets],
            "num_trajectories": shared if own == {None} else next(iter(own)) if len(own) == 1 else None,
            "pretrained": self.app_config["model"].get("init_args", {}).get("pretrained"),
        }


def load_network(ref: str, weights: Literal["auto", "ema", "raw"] = "auto") -> LoadedNetwork:
    """Load a network.

    Args:
        ref: Lightning checkpoint, run folder (its newest checkpoint is taken), exported folder, or
            ``hf://org/name``.
        weights: Which weights of a Lightning checkpoint to take.

    Raises:
        ValueError: If there is nothing at ``ref``, or it cannot be read.
    """
    path = Path(ref)
    if path.is_dir() and (path / "config.yaml").is_file():
        from thalweg.apps.trainer_cli import find_run

        path = find_run(ref)[1]
    if path.suffix == ".ckpt":
        return _from_checkpoint(path, weights)
    if weights == "ema":
        raise ValueError(f"{ref} is no Lightning checkpoint: it holds one set of weights, use weights='auto'")
    from thalweg.apps import build
    from thalweg.checkpoints import hub

    network = build.load_network(ref)
    source = hub.weight_file(hub.resolve(ref))
    return LoadedNetwork(network=network, source=Path(source), weights="raw", app_config=None)


def _from_checkpoint(path: Path, weights: Literal["auto", "ema", "raw"]) -> LoadedNetwork:
    """Network of a Lightning checkpoint, rebuilt from the configuration inside it."""
    from thalweg.apps.build import build_network
    from thalweg.checkpoints import lightning_ckpt, strict

    checkpoint = lightning_ckpt.read(path, weights)
    config = checkpoint.require_config()
    network = build_network(config)
    strict.load_strict(network, checkpoint.network_state(), path)
    return LoadedNetwork(network=network, source=path, weights=checkpoint.weights, app_config=config)
