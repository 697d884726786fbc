"""Checkpoints of image denoisers to the folder of a diffusers pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from thalweg.checkpoints.lightning_ckpt import LightningCheckpoint
    from thalweg.diffusion.captioned import CaptionedTransformer


def is_diffusion(checkpoint: LightningCheckpoint) -> bool:
    """Whether a checkpoint is one of DiffusionModule or a class derived from it."""
    from thalweg.apps.build import import_class

    path = str(checkpoint.require_config()["model"].get("class_path"))
    if path.startswith("thalweg.pde."):
        return False  # decided without importing diffusers
    from thalweg.diffusion.module import DiffusionModule

    found = import_class(path)
    return isinstance(found, type) and issubclass(found, DiffusionModule)


def write_pipeline(
    network: nn.Module,
    folder: Path,
    checkpoint: LightningCheckpoint,
    provenance: Mapping[str, Any],
    *,
    repo: str,
    license: str,
) -> None:
    """Pipeline, card and provenance.

    Raises:
        ValueError: If diffusers has no scheduler for the noise schedule and prediction of the run.
    """
    from thalweg.apps.results import write_json
    from thalweg.checkpoints.atomic import write_text
    from thalweg.diffusion.export import save_pipeline
    from thalweg.diffusion.networks import takes_captions
    from thalweg.diffusion.schedules import NoiseSchedule

    settings = checkpoint.require_config()["model"]["init_args"]
    schedule = NoiseSchedule.from_dict(settings["schedule"])
    prediction = settings.get("prediction", "noise")
    if takes_captions(network):
        from thalweg.diffusion.captioned import CaptionedTransformer
        from thalweg.diffusion.export_captioned import save_captioned

        assert isinstance(network, CaptionedTransformer)
        save_captioned(folder, network, schedule, prediction, checkpoint.facts)
        text = captioned_card(network, checkpoint.facts, provenance, repo=repo, license=license)
    else:
        names = [str(name) for name in checkpoint.facts.get("class_names", ())]
        save_pipeline(folder, network, schedule, prediction, names)
        text = card(network, names, provenance, repo=repo, license=license)
    mode = (folder / "model_index.json").stat().st_mode
    for path in folder.rglob("*.safetensors"):
        path.chmod(mode)  # safetensors makes files that only their owner may read
    write_json(dict(provenance), folder / "provenance.json")
    write_text(folder / "README.md", text)


def card(
    network: nn.Module, names: list[str], provenance: Mapping[str, Any], *, repo: str, license: str
) -> str:
    """The README.md of a pipeline."""
    from thalweg.apps.model_card import parameter_count
    from thalweg.checkpoints.model_card import Card, render

    config = provenance.get("app_config", {})
    images = ((config.get("data") or {}).get("init_args") or {}).get("images")
    lines = {key: value for key, value in provenance.items() if key != "app_config"}
    size = getattr(network, "config", {}).get("sample_size")
    pipeline = "ClassImagePipeline" if names else "DDPMPipeline"
    module = "thalweg.diffusion.pipeline" if names else "diffusers"
    return render(
        "pipeline",
        Card(
            name=repo.rsplit("/", 1)[-1],
            repo=repo,
            license=license,
            summary=f"{type(network).__name__} with {parameter_count(network)} parameters, images of "
            f"{size} x {size} pixels.",
            tags=("diffusers", "image-generation"),
            datasets=(str(images),) if images else (),
            provenance=lines,
            config=config,
            fields={
                "import": f"from {module} import {pipeline}",
                "pipeline": pipeline,
                "arguments": f"class_labels={names[0]!r}, batch_size=4, " if names else "batch_size=4, ",
                "classes": ", ".join(names) or "none",
            },
        ),
    )


def captioned_card(
    network: CaptionedTransformer,
    facts: Mapping[str, Any],
    provenance: Mapping[str, Any],
    *,
    repo: str,
    license: str,
) -> str:
    """The README.md of a pipeline that takes captions."""
    from thalweg.apps.model_card import parameter_count
    from thalweg.checkpoints.model_card import Card, render
    from thalweg.diffusion.captioned import MAX_SEQUENCE_LENGTH

    config = provenance.get("app_config", {})
    captions = ((config.get("data") or {}).get("init_args") or {}).get("captions")
    return render(
        "captioned",
        Card(
            name=repo.rsplit("/", 1)[-1],
            repo=repo,
            license=license,
            summary=f"A text-to-image pipeline with {parameter_count(network)} parameters, of the classes of"
            " Stable Diffusion 3.",
            tags=("diffusers", "text-to-image"),
            datasets=(str(captions),) if captions else (),
            provenance={key: value for key, value in provenance.items() if key != "app_config"},
            config=config,
            fields={
                "max_sequence_length": MAX_SEQUENCE_LENGTH,
                "words_most": int(facts["length"]) - 2,
                "words": ", ".join(facts["words"]),
            },
        ),
    )
