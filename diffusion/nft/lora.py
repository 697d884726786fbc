"""LoRA of a transformer on disk: files of diffusers, folders of PEFT, and checks of what they hold.

Everywhere else in the package an adapter is a dict of tensors named ``MODULE.lora_A.weight`` (r, in) and
``MODULE.lora_B.weight`` (out, r), with the settings of a :class:`LoraSpec` beside it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from thalweg.checkpoints import tensors as files
from thalweg.checkpoints.atomic import write_atomically, write_text

TARGETS = (
    "attn.add_k_proj",
    "attn.add_q_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "attn.to_k",
    "attn.to_out.0",
    "attn.to_q",
    "attn.to_v",
)
"""The projections of joint attention. Second attentions (``attn2``) are not among them."""

FILE = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"
"""Header entry in which diffusers keeps the settings; without them it takes r for alpha."""
COMPONENT = "transformer"
"""Prefix of names in files of diffusers."""
PEFT_PREFIX = "base_model.model."
PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
REFUSED: dict[str, Any] = {"use_dora": False, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
"""Settings of PEFT that would change what the tensors mean, with their only allowed values."""


@dataclass(frozen=True, kw_only=True)
class LoraSpec:
    """Settings of an adapter, whose update of a weight is alpha / r times B A.

    Raises:
        ValueError: For a rank below 1, an alpha that is not positive, or no target.
    """

    r: int = 32
    """Rank."""
    alpha: float = 64.0
    """Scale of the update times r."""
    targets: tuple[str, ...] = TARGETS
    """Linear layers that are adapted: those named so, or whose names end with a dot and this."""

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.r < 1:
            raise ValueError(f"r is {self.r}, allowed: 1 and more")
        if not self.alpha > 0:
            raise ValueError(f"alpha is {self.alpha}, allowed: any positive number")
        if not self.targets or isinstance(self.targets, str):
            raise ValueError(f"targets are {self.targets!r}, allowed: names of layers, at least one")

    def peft(self) -> Any:
        """The same for PEFT: A from a normal distribution of standard deviation 1 / r, B zero, no dropout."""
        try:
            from peft import LoraConfig
        except ImportError as error:
            raise ImportError("LoRA needs peft: pip install 'thalweg[diffusion]'") from error
        return LoraConfig(**_settings(self), init_lora_weights="gaussian")


def adapted(network: nn.Module, targets: Sequence[str] = TARGETS) -> dict[str, nn.Module]:
    """Layers of a network that targets name, in its order.

    Raises:
        ValueError: If a target names none; the message lists endings of linear layers.
    """
    linear = {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.Linear)}
    hits = {target: [name for name in linear if _matches(name, target)] for target in targets}
    if missed := [target for target, names in hits.items() if not names]:
        known = sorted({_ending(name) for name in linear})
        raise ValueError(f"target {missed[0]!r} names no linear layer, allowed: {', '.join(known)}")
    chosen = {name for names in hits.values() for name in names}
    return {name: layer for name, layer in linear.items() if name in chosen}


def _ending(name: str) -> str:
    """What is left of a name without its block."""
    parts = name.split(".")
    return ".".join(parts[-3 if parts[-1].isdecimal() else -2 :])


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def lora_shapes(network: nn.Module, spec: LoraSpec) -> dict[str, tuple[int, int]]:
    """Names and shapes of the tensors of an adapter; the network needs no weights (meta device).

    Raises:
        ValueError: As :func:`adapted` does.
    """
    found: dict[str, tuple[int, int]] = {}
    for name, layer in adapted(network, spec.targets).items():
        assert isinstance(layer, nn.Linear)
        found[f"{name}.lora_A.weight"] = (spec.r, layer.in_features)
        found[f"{name}.lora_B.weight"] = (layer.out_features, spec.r)
    return found


def check_lora(state: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]], source: object) -> None:
    """Refuse an adapter that is not the one which a network has, and name the first tensor at fault.

    Args:
        state: The adapter.
        shapes: What :func:`lora_shapes` gives for the network.
        source: Where the adapter comes from, for the message.

    Raises:
        ValueError: If a tensor is missing, left over, of another shape or not finite.
    """
    for name, value in state.items():
        if name not in shapes:
            raise ValueError(
                f"{source} has {name!r}, but that layer is not adapted here; targets or networks differ"
            )
        if tuple(value.shape) != tuple(shapes[name]):
            rank = 0 if ".lora_A." in name else 1
            side = "rank" if value.shape[rank] != shapes[name][rank] else "width"
            raise ValueError(
                f"{source} has {name!r} of shape {tuple(value.shape)}, needed: {tuple(shapes[name])};"
                f" its {side} differs"
            )
        if not torch.isfinite(value).all():
            raise ValueError(f"{source} has {name!r} with values that are not finite")
    if lost := [name for name in shapes if name not in state]:
        raise ValueError(f"{source} lacks {lost[0]!r} and {len(lost) - 1} more of {len(shapes)} tensors")


def export_lora(folder: str | Path, state: Mapping[str, Tensor], spec: LoraSpec) -> Path:
    """Write ``pytorch_lora_weights.safetensors`` for ``load_lora_weights``, with its scale.

    Args:
        folder: Where to.
        state: The adapter.
        spec: Its settings.

    Returns:
        The file, which is complete or not there.
    """
    path = Path(folder) / FILE
    plain = {f"{COMPONENT}.{name}": value.detach().cpu().contiguous() for name, value in state.items()}
    settings = {f"{COMPONENT}.{name}": value for name, value in _settings(spec).items()}
    header = {"format": "pt", METADATA: json.dumps(settings, indent=2, sort_keys=True)}
    write_atomically(path, lambda temporary: save_file(plain, temporary, metadata=header))
    return path


def _settings(spec: LoraSpec) -> dict[str, Any]:
    """Settings under their names in PEFT."""
    return {
        "r": spec.r,
        "lora_alpha": int(spec.alpha) if float(spec.alpha).is_integer() else spec.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(spec.targets),
        "use_dora": False,
    }


def export_peft(folder: str | Path, state: Mapping[str, Tensor], spec: LoraSpec) -> Path:
    """Write a folder of PEFT, as published checkpoints are: weights and ``adapter_config.json``."""
    folder = Path(folder)
    files.save({PEFT_PREFIX + name: value for name, value in state.items()}, folder / PEFT_WEIGHTS[0])
    config = {"peft_type": "LORA", **_settings(spec), "inference_mode": True}
    write_text(folder / PEFT_CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
    return folder


def read_lora(path: str | Path) -> tuple[LoraSpec, dict[str, Tensor]]:
    """Read an adapter: a folder of PEFT (or one with it under ``lora``), or a file or folder of diffusers.

    Returns:
        Its settings, and its tensors in float32.

    Raises:
        ValueError: If there is none, or it is not a plain LoRA; the message names the file.
    """
    path = Path(path)
    for folder in (path, path / "lora"):
        if (folder / PEFT_CONFIG).is_file():
            return _read_peft(folder)
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{path} has no LoRA, allowed: {PEFT_CONFIG} with {PEFT_WEIGHTS[0]}, or {FILE}")
    return _read_diffusers(file)


def _read_peft(folder: Path) -> tuple[LoraSpec, dict[str, Tensor]]:
    config = folder / PEFT_CONFIG
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{config} is not JSON: {error}") from None
    found = [folder / name for name in PEFT_WEIGHTS if (folder / name).is_file()]
    if not found:
        raise ValueError(f"{folder} has {PEFT_CONFIG} but no {PEFT_WEIGHTS[0]}")
    state = _renamed(files.load(found[0], torch.float32), PEFT_PREFIX, found[0])
    return _spec(settings, config), state


def _read_diffusers(file: Path) -> tuple[LoraSpec, dict[str, Tensor]]:
    state = _renamed(files.load(file, torch.float32), f"{COMPONENT}.", file)
    raw = files.read_metadata(file).get(METADATA)
    if raw is None:
        return _guessed(state), state
    try:
        settings = json.loads(raw)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: its {METADATA} is not JSON: {error}") from None
    own = {k.removeprefix(f"{COMPONENT}."): v for k, v in settings.items() if k.startswith(f"{COMPONENT}.")}
    return _spec(own, file), state


def _renamed(state: Mapping[str, Tensor], prefix: str, file: Path) -> dict[str, Tensor]:
    for name in state:
        if not name.startswith(prefix) or not name.endswith((".lora_A.weight", ".lora_B.weight")):
            raise ValueError(f"{file} has {name!r}, allowed: {prefix}LAYER.lora_A.weight and .lora_B.weight")
    if not state:
        raise ValueError(f"{file} has no tensors")
    return {name.removeprefix(prefix): value for name, value in state.items()}


def _spec(settings: Mapping[str, Any], source: Path) -> LoraSpec:
    """Settings of PEFT as ours."""
    for name, allowed in REFUSED.items():
        if settings.get(name, allowed) not in (allowed, None):
            raise ValueError(f"{source}: {name} is {settings[name]!r}, allowed: {allowed!r}")
    targets = settings.get("target_modules")
    if isinstance(targets, str) or not targets or "r" not in settings:
        raise ValueError(f"{source}: needed are r and a list target_modules, found {sorted(settings)}")
    r = int(settings["r"])
    return LoraSpec(r=r, alpha=float(settings.get("lora_alpha", r)), targets=tuple(sorted(targets)))


def _guessed(state: Mapping[str, Tensor]) -> LoraSpec:
    """Settings that diffusers assumes for a file that does not say: a scale of 1."""
    r = next(len(value) for name, value in state.items() if name.endswith(".lora_A.weight"))
    layers = tuple(dict.fromkeys(name.rsplit(".lora_", 1)[0] for name in state))
    return LoraSpec(r=r, alpha=float(r), targets=layers)
