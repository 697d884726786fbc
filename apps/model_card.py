"""What ``thalweg export`` and ``thalweg import`` write about a network: its card and where it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from thalweg.checkpoints.lightning_ckpt import LightningCheckpoint

Errors = Mapping[str, Mapping[str, float]]


def card_text(
    network: nn.Module,
    *,
    repo: str,
    license: str,
    provenance: Mapping[str, Any],
    errors: Errors,
) -> str:
    """The README.md of a folder.

    Args:
        network: Network that the folder holds.
        repo: What a reader passes to ``from_pretrained``.
        license: Licence identifier of the hub.
        provenance: What ``provenance_of`` says; its ``app_config`` becomes the configuration section.
        errors: Data set to metric to value.
    """
    from thalweg.checkpoints.model_card import Card, render
    from thalweg.pde.poseidon import ScOT

    kind = type(network)
    is_scot = isinstance(network, ScOT)
    app_config = provenance.get("app_config", {})
    lines = {key: value for key, value in provenance.items() if key != "app_config"}
    fields: dict[str, object] = {"class_path": f"{kind.__module__}.{kind.__qualname__}"}
    if isinstance(network, ScOT):
        fields["channels_in"] = network.config.num_channels
        fields["channels_out"] = network.config.num_out_channels
        fields["resolution"] = " x ".join(map(str, network.config.image_shape))
    card = Card(
        name=repo.rsplit("/", 1)[-1],
        repo=repo,
        license=license,
        summary=f"{kind.__name__} with {parameter_count(network)} parameters.",
        tags=("pde", "neural-operator", "scot" if is_scot else kind.__name__.lower()),
        datasets=_datasets_of(app_config),
        metrics=tuple(dict.fromkeys(name for row in errors.values() for name in row)),
        base_model=_base_model_of(app_config),
        errors=errors,
        provenance=lines,
        config=app_config,
        fields=fields,
    )
    return render("poseidon" if is_scot else "network", card)


def provenance_of(checkpoint: LightningCheckpoint) -> dict[str, Any]:
    """Checkpoint, progress, versions and configuration, without paths of this machine."""
    from thalweg.checkpoints.model_card import without_machine_paths

    return {
        "checkpoint": checkpoint.path.name,
        "weights": "exponential moving average" if checkpoint.weights == "ema" else "raw",
        "epoch": checkpoint.epoch,
        "optimizer steps": checkpoint.global_step,
        **versions(),
        "app_config": without_machine_paths(checkpoint.require_config()),
    }


def versions() -> dict[str, str]:
    """Versions of the programs that computed the weights' folder."""
    from importlib.metadata import version

    return {name: version(name) for name in ("thalweg", "torch")}


def _datasets_of(app_config: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the training data in the data section."""
    entries = ((app_config.get("data") or {}).get("init_args") or {}).get("datasets") or []
    return tuple(entry if isinstance(entry, str) else str(entry["name"]) for entry in entries)


def _base_model_of(app_config: Mapping[str, Any]) -> str | None:
    """Hub repository that a run started from; None for local files."""
    from thalweg.checkpoints import hub

    start = ((app_config.get("model") or {}).get("init_args") or {}).get("pretrained")
    # Without the scheme it might as well be a folder on the machine of the run.
    return hub.parse(start).repo_id if isinstance(start, str) and start.startswith("hf://") else None


def read_errors(path: Path) -> Errors:
    """Errors in a result file of ``thalweg evaluate``: those in normalised units over the scored channels.

    Raises:
        ValueError: If the file is no such result.
    """
    from thalweg.apps.build import read_config

    result = read_config(path)
    try:
        dataset, metrics = str(result["dataset"]), result["metrics"]["normalised"]
        scored = {name: float(value) for name, value in metrics.items() if name.startswith("scored_")}
    except (KeyError, TypeError, AttributeError, ValueError) as err:
        raise ValueError(f"{path} is no result of 'thalweg evaluate' ({type(err).__name__}: {err})") from None
    return {dataset: scored}


def stated_license(folder: Path) -> str | None:
    """Licence in the front matter of a folder's card."""
    from thalweg.checkpoints.model_card import read_front_matter

    card = folder / "README.md"
    stated = read_front_matter(card.read_text(encoding="utf-8")).get("license") if card.is_file() else None
    return stated if isinstance(stated, str) else None


def parameter_count(network: nn.Module) -> str:
    """Number of parameters with thousands separators."""
    return f"{sum(p.numel() for p in network.parameters()):,}"
