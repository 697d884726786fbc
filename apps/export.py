"""``thalweg export`` and ``thalweg import``: Lightning checkpoints and published weights to tidy folders.

A folder holds ``config.json``, ``model.safetensors`` (with an index if sharded), the model card ``README.md``
and ``provenance.json``; an image denoiser becomes a diffusers pipeline. It is complete before it appears
under its name.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import nn

    from thalweg.checkpoints.lightning_ckpt import LightningCheckpoint

DType = Literal["float32", "bfloat16", "float16"]


def export(
    *,
    ckpt: str | Path,
    to: str | Path,
    weights: Literal["auto", "ema", "raw"] = "auto",
    push: str | None = None,
    license: str = "apache-2.0",
    dtype: DType | None = None,
    errors: str | Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Turn a Lightning checkpoint into a Hugging Face folder, and optionally push it to the hub.

    Checkpoints of the diffusion module become the folder of a diffusers pipeline, those of online fine-tuning
    a LoRA for ``load_lora_weights`` (or a transformer, if all of it was trained).

    Args:
        ckpt: Checkpoint file of ``thalweg fit``.
        to: Folder to write.
        weights: ema for averaged weights, raw for the optimizer's, auto for averaged ones if there are any.
        push: Repository ORG/NAME on the Hugging Face hub to create if needed and upload to.
        license: Licence identifier for the card, as the hub spells it.
        dtype: Store floating-point weights in this type; as trained if not given.
        errors: Result file of ``thalweg evaluate`` whose errors the card shows.
        overwrite: Replace files of an existing folder.

    Returns:
        The folder.

    Raises:
        ValueError: If the checkpoint does not fit its configuration, the folder is in use, or the push fails.
    """
    from thalweg.apps.build import build_network
    from thalweg.apps.export_pipeline import is_diffusion, write_pipeline
    from thalweg.apps.export_policy import is_policy
    from thalweg.apps.model_card import card_text, parameter_count, provenance_of, read_errors
    from thalweg.checkpoints import lightning_ckpt, strict

    target = _free_target(to, overwrite)
    if push is not None:
        _check_push(push)
    if is_policy(policies := lightning_ckpt.read(ckpt)):
        return _export_policy(policies, target, weights, push=push, license=license, dtype=dtype)
    checkpoint = lightning_ckpt.read(ckpt, weights)
    network = build_network(checkpoint.require_config())
    strict.load_strict(network, checkpoint.network_state(), checkpoint.path)
    strict.check_finite(network.state_dict(), checkpoint.path)
    _cast(network, dtype)
    provenance = provenance_of(checkpoint)
    table = read_errors(Path(errors)) if errors is not None else {}

    def fill(folder: Path) -> None:
        if is_diffusion(checkpoint):
            write_pipeline(network, folder, checkpoint, provenance, repo=push or target.name, license=license)
            return
        card = card_text(
            network, repo=push or target.name, license=license, provenance=provenance, errors=table
        )
        _write_folder(network, folder, _network_tree(checkpoint), provenance, card)

    _write_aside(target, fill)
    print(f"wrote {target} ({parameter_count(network)} parameters, {checkpoint.weights} weights)")
    if push is not None:
        print(f"pushed to {_push(target, push, checkpoint)}")
    return target


def _export_policy(
    checkpoint: LightningCheckpoint,
    target: Path,
    weights: Literal["auto", "ema", "raw"],
    *,
    push: str | None,
    license: str,
    dtype: DType | None,
) -> Path:
    """Export what online fine-tuning has trained: the average, or the weights themselves (raw)."""
    from thalweg.apps.export_policy import POLICIES, weights_of, write_policy
    from thalweg.apps.model_card import provenance_of

    state = weights_of(checkpoint, weights, dtype)
    provenance = {**provenance_of(checkpoint), "policy": POLICIES[weights]}
    written: list[str] = []

    def fill(folder: Path) -> None:
        name = push or target.name
        written.append(write_policy(folder, checkpoint, state, provenance, repo=name, license=license))

    _write_aside(target, fill)
    count = sum(value.numel() for value in state.values())
    print(f"wrote {target} ({written[0]} of {count} parameters, policy {POLICIES[weights]})")
    if push is not None:
        print(f"pushed to {_push(target, push, checkpoint)}")
    return target


def import_(
    ref: str,
    *,
    to: str | Path,
    layout: Literal["scot", "mmdet-mask2former"] = "scot",
    license: str | None = None,
    dtype: DType | None = None,
    overwrite: bool = False,
) -> Path:
    """Verify a published checkpoint, tensor for tensor, and write it in the current layout.

    Args:
        ref: Folder, ORG/NAME, or hf://ORG/NAME[@REVISION] of scOT; the file of GenEval's detector.
        to: Folder to write.
        layout: What the checkpoint is: scot, or mmdet-mask2former, GenEval's detector of mmdet 2.x, which
            becomes a folder of transformers.
        license: Licence identifier for the card; that of the source's card, else other, if not given.
        dtype: Store floating-point weights in this type; as published if not given.
        overwrite: Replace files of an existing folder.

    Returns:
        The folder.

    Raises:
        ValueError: If the reference cannot be resolved, or the weights do not fit their configuration.
    """
    from thalweg.apps.model_card import card_text, parameter_count, stated_license, versions
    from thalweg.checkpoints import hub, strict, tensors
    from thalweg.checkpoints.maps.poseidon import MAP
    from thalweg.pde.poseidon import ScOT

    target = _free_target(to, overwrite)
    if layout == "mmdet-mask2former":
        return _import_detector(Path(ref).expanduser(), target, license, dtype)
    source = hub.resolve(ref)
    if source.is_file():
        raise ValueError(f"{ref} is a single file; give the folder that also holds its config.json")
    found = hub.weight_file(source)
    network = ScOT.from_pretrained(source)
    strict.check_finite(network.state_dict(), found)
    _cast(network, dtype)
    origin = source.name if Path(ref).expanduser().exists() else ref
    provenance = {"imported from": origin, "weight file": found.name, **versions()}
    name = license or stated_license(source) or "other"

    def fill(folder: Path) -> None:
        card = card_text(network, repo=target.name, license=name, provenance=provenance, errors={})
        _write_folder(network, folder, {}, provenance, card)

    _write_aside(target, fill)
    print(f"{found}: every tensor fits {type(network).__name__} ({parameter_count(network)} parameters)")
    print(MAP.trace(tensors.load(found)).summary())
    print(f"wrote {target}")
    return target


def _import_detector(file: Path, target: Path, license: str | None, dtype: DType | None) -> Path:
    """Write the detector of GenEval as a folder of transformers."""
    from thalweg.apps.model_card import parameter_count, versions
    from thalweg.apps.results import write_json
    from thalweg.checkpoints import tensors
    from thalweg.diffusion.metrics.mmdet import mask2former_from_mmdet

    network = mask2former_from_mmdet(tensors.load(file), file)
    _cast(network, dtype)

    def fill(folder: Path) -> None:
        network.save_pretrained(folder)
        checksums = {path.name: _sha256(path) for path in sorted(folder.glob("*.safetensors"))}
        origin = {"imported from": file.name, "sha256 of it": _sha256(file)}
        terms = {"license": license or "apache-2.0", "trained on": "COCO"}
        write_json({**origin, **terms, **versions(), "sha256": checksums}, folder / "provenance.json")

    _write_aside(target, fill)
    print(f"{file}: every tensor fits {type(network).__name__} ({parameter_count(network)} parameters)")
    print(f"wrote {target}")
    return target


def _free_target(to: str | Path, overwrite: bool) -> Path:
    """The target folder, which must be new or empty unless files may be replaced."""
    target = Path(to).expanduser().absolute()
    if target.is_file():
        raise ValueError(f"{target} is a file; give a folder")
    if not overwrite and target.is_dir() and any(target.iterdir()):
        raise ValueError(f"folder {target} is not empty; pass --overwrite or another folder")
    return target


def _write_aside(target: Path, fill: Callable[[Path], None]) -> None:
    """Fill a temporary folder beside the target, then move its files there."""
    aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        aside.mkdir(parents=True)
        fill(aside)
        if not target.is_dir():
            os.replace(aside, target)
            return
        written = {path.name for path in aside.iterdir()}
        for name in sorted(written):
            if (aside / name).is_dir() and (target / name).is_dir():
                shutil.rmtree(target / name)  # a folder is not replaced by another
            os.replace(aside / name, target / name)
        # Weights of another layout would win over the new ones, or be pushed along with them.
        for pattern in ("model*.safetensors", "model*.json", "pytorch_model*.bin", "pytorch_model*.json"):
            for stale in set(target.glob(pattern)) - {target / name for name in written}:
                stale.unlink()
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_folder(
    network: nn.Module, folder: Path, tree: Mapping[str, Any], provenance: Mapping[str, Any], card: str
) -> None:
    """Configuration, weights, card and provenance; other networks than scOT are described by their class."""
    from thalweg.apps.results import write_json
    from thalweg.checkpoints import tensors
    from thalweg.checkpoints.atomic import write_text
    from thalweg.pde.poseidon import ScOT

    if isinstance(network, ScOT):
        network.save_pretrained(folder)
        stored = str(next(network.parameters()).dtype).removeprefix("torch.")
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        write_json({**config, "torch_dtype": stored}, folder / "config.json")
    else:
        tensors.save_sharded(network.state_dict(), folder)
        write_json(tree, folder / "config.json")
    checksums = {path.name: _sha256(path) for path in sorted(folder.glob("*.safetensors"))}
    write_json({**provenance, "sha256": checksums}, folder / "provenance.json")
    write_text(folder / "README.md", card)


def _network_tree(checkpoint: LightningCheckpoint) -> dict[str, Any]:
    tree: dict[str, Any] = checkpoint.require_config()["model"]["init_args"]["network"]
    return tree


def _cast(network: nn.Module, dtype: DType | None) -> None:
    """Convert real weights; complex ones, as in Fourier layers, would lose their imaginary part."""
    if dtype is None:
        return
    import torch

    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(getattr(torch, dtype))


def _sha256(path: Path) -> str:
    import hashlib

    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_push(repo: str) -> None:
    """Refuse a bad name and offline mode before any work is done."""
    from huggingface_hub import constants

    from thalweg.checkpoints import hub

    ref = hub.parse(repo)
    if ref.repo_id != repo:
        raise ValueError(f"push is {repo!r}; give a repository as ORG/NAME")
    if constants.is_offline_mode():
        raise ValueError(f"cannot push to {repo}: offline mode is on (HF_HUB_OFFLINE)")


def _push(folder: Path, repo: str, checkpoint: LightningCheckpoint) -> str:
    """Upload a folder; returns the address."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    api = HfApi()
    message = f"{checkpoint.weights} weights after {checkpoint.global_step} steps"
    try:
        url = api.create_repo(repo, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
    except (HTTPError, OSError, ValueError) as err:
        reason = str(err).strip().splitlines()[0]
        raise ValueError(
            f"{folder} is complete but was not pushed ({reason}): run 'hf auth login', then"
            f" 'hf upload {repo} {folder}'"
        ) from err
    return str(url)
