"""Checkpoints of online fine-tuning to a LoRA that diffusers loads, or to a transformer's folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from thalweg.checkpoints.lightning_ckpt import LightningCheckpoint

POLICIES = {"auto": "ema", "ema": "ema", "raw": "current"}
"""Policy that is exported, by the choice of weights."""


def is_policy(checkpoint: LightningCheckpoint) -> bool:
    """Whether a checkpoint holds policies rather than a network."""
    return any(name.startswith("policy.") for name in checkpoint.state_dict)


def weights_of(
    checkpoint: LightningCheckpoint, weights: Literal["auto", "ema", "raw"], dtype: str | None
) -> dict[str, Tensor]:
    """Weights of the exported policy by their names in the network.

    Raises:
        ValueError: If there are none, or they are not finite.
    """
    import torch

    from thalweg.checkpoints import strict

    prefix = f"policy.{POLICIES[weights]}."
    state = checkpoint.network_state(prefix)
    strict.check_finite(state, checkpoint.path)
    return state if dtype is None else {k: v.to(getattr(torch, dtype)) for k, v in state.items()}


def write_policy(
    folder: Path,
    checkpoint: LightningCheckpoint,
    state: Mapping[str, Tensor],
    provenance: Mapping[str, Any],
    *,
    repo: str,
    license: str,
) -> str:
    """Weights, card and provenance.

    Returns:
        What was written, in a word.
    """
    from thalweg.apps.results import write_json
    from thalweg.checkpoints.atomic import write_text
    from thalweg.diffusion.nft.lora import LoraSpec, export_lora

    settings = checkpoint.require_config()["model"]["init_args"]
    policy = settings.get("policy") or {}
    lora = policy.get("kind", "lora") == "lora"
    if lora:
        spec = dict(policy.get("lora") or {})
        if "targets" in spec:
            spec["targets"] = tuple(spec["targets"])
        export_lora(folder, state, LoraSpec(**spec))
    else:
        write_transformer(folder / "transformer", settings["pipeline"], state)
    write_json(dict(provenance), folder / "provenance.json")
    write_text(folder / "README.md", card(settings, provenance, lora=lora, repo=repo, license=license))
    return "LoRA" if lora else "transformer"


def write_transformer(folder: Path, pipeline: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """The transformer of the pipeline with other weights.

    Raises:
        ValueError: If the pipeline is not there any more, or is another one.
    """
    from thalweg.checkpoints import strict
    from thalweg.diffusion.draw import open_pipeline

    pipe: Any = open_pipeline(pipeline["model"], revision=pipeline.get("revision"))
    network = pipe.transformer
    fixed = {k: v for k, v in network.state_dict().items() if k not in dict(network.named_parameters())}
    strict.load_strict(network, {**fixed, **state}, folder)
    network.to(next(iter(state.values())).dtype).save_pretrained(folder)


def card(
    settings: Mapping[str, Any], provenance: Mapping[str, Any], *, lora: bool, repo: str, license: str
) -> str:
    """The README.md: what it is, and how to use it."""
    from thalweg.checkpoints.model_card import Card, render, without_machine_paths

    base = str(without_machine_paths(str(settings["pipeline"]["model"])))
    rewards = [f"- {name}, weight {spec.get('weight', 1.0)}" for name, spec in settings["rewards"].items()]
    kind = "LoRA" if lora else "transformer"
    data = (provenance.get("app_config", {}).get("data") or {}).get("init_args") or {}
    prompts = without_machine_paths(str(data.get("prompts", "")))
    lines = [
        "from diffusers import DiffusionPipeline, SD3Transformer2DModel",
        f'pipe = DiffusionPipeline.from_pretrained("{base}")',
        f'pipe.load_lora_weights("{repo}")'
        if lora
        else f'pipe.transformer = SD3Transformer2DModel.from_pretrained("{repo}", subfolder="transformer")',
    ]
    return render(
        "policy",
        Card(
            name=repo.rsplit("/", 1)[-1],
            repo=repo,
            license=license,
            summary=f"A {kind} for {base}, fine-tuned online by rewards.",
            tags=("text-to-image", "diffusers", *(("lora",) if lora else ())),
            base_model=base if "/" in base else None,
            datasets=(prompts,) if prompts else (),
            provenance={k: v for k, v in provenance.items() if k != "app_config"},
            config=provenance.get("app_config", {}),
            fields={"load": "\n".join(lines), "rewards": "\n".join(rewards)},
        ),
    )
