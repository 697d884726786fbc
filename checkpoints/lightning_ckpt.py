"""Read Lightning checkpoints without Lightning: weights, averaged or raw, and the configuration they carry.

With ``EMAWeightAveraging`` (Lightning 2.6) the entry ``state_dict`` of a file holds the averaged weights and
``current_model_state`` the raw ones; without that callback ``state_dict`` is raw. The configuration of the
run lies under ``app_config`` as ``{"model": {"class_path": ..., "init_args": ...}, "data": {...}}``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from thalweg.checkpoints.keymap import KeyMap, Rename
from thalweg.checkpoints.tensors import load_pickled

Weights = Literal["auto", "ema", "raw"]
CONFIG_KEY = "app_config"
"""Entry of the file under which the command line stores the run's configuration."""
POLICIES_KEY = "policies"
"""Entry of the file under which weights of policies lie that were split over processes."""
FACTS_KEY = "facts"
"""Entry of the file under which a LightningModule stores what an export needs beside the configuration."""

_WITHOUT_COMPILE_MARK = KeyMap([Rename(pattern=r"(?<![^.])_orig_mod\.", to="")])


@dataclass(frozen=True, kw_only=True, slots=True)
class LightningCheckpoint:
    """What a ``.ckpt`` file holds of a model."""

    path: Path
    """The file."""
    weights: Literal["ema", "raw"]
    """Which weights ``state_dict`` holds."""
    state_dict: dict[str, Tensor]
    """Weights by their names in the LightningModule, without marks of torch.compile."""
    app_config: dict[str, Any] | None
    """The run's ``model`` and ``data`` configuration; None in files of other programs."""
    epoch: int
    """Epochs completed when the file was written."""
    global_step: int
    """Optimizer steps done."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the LightningModule says about its weights beside the configuration, e.g. names of classes."""

    def network_state(self, prefix: str = "network.") -> dict[str, Tensor]:
        """Weights of one submodule, under its own names.

        Raises:
            ValueError: If no weight starts with the prefix.
        """
        state = {n.removeprefix(prefix): t for n, t in self.state_dict.items() if n.startswith(prefix)}
        if not state:
            starts = ", ".join(dict.fromkeys(name.split(".", 1)[0] + "." for name in self.state_dict))
            raise ValueError(f"{self.path} has no weights under {prefix!r}, only under {starts or 'nothing'}")
        return state

    def require_config(self) -> dict[str, Any]:
        """The configuration.

        Raises:
            ValueError: If the file has none.
        """
        if self.app_config is None:
            raise ValueError(
                f"{self.path} carries no {CONFIG_KEY!r}, so its network cannot be rebuilt; only"
                " checkpoints of 'thalweg fit' carry it"
            )
        return self.app_config


def read(path: str | Path, weights: Weights = "auto") -> LightningCheckpoint:
    """Read a checkpoint file.

    Args:
        path: File written by Lightning's ModelCheckpoint.
        weights: ``ema`` for averaged weights, ``raw`` for those of the optimizer, ``auto`` for averaged ones
            where the file has them and raw ones otherwise.

    Raises:
        ValueError: If the file is missing, damaged or no Lightning checkpoint, or lacks averaged weights that
            were asked for.
    """
    path = Path(path)
    if weights not in get_args(Weights):
        raise ValueError(f"weights is {weights!r}, allowed: {', '.join(get_args(Weights))}")
    content = read_content(path)
    chosen = _choose(path, content, weights)
    raw_key = "current_model_state" if "current_model_state" in content else "state_dict"
    named = content["state_dict" if chosen == "ema" else raw_key]
    state, _ = _WITHOUT_COMPILE_MARK.apply({**named, **content.get(POLICIES_KEY, {})})
    return LightningCheckpoint(
        path=path,
        weights=chosen,
        state_dict=state,
        app_config=content.get(CONFIG_KEY),
        epoch=int(content.get("epoch", 0)),
        global_step=int(content.get("global_step", 0)),
        facts=content.get(FACTS_KEY, {}),
    )


def read_content(path: Path) -> Mapping[str, Any]:
    """Everything in a checkpoint file, on the CPU.

    Raises:
        ValueError: If the file is missing, damaged or no Lightning checkpoint, or holds more than tensors.
    """
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder, probably a sharded checkpoint: merge it with"
            f" 'python -m lightning.pytorch.utilities.consolidate_checkpoint {path}' first"
        )
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    content = load_pickled(path)
    if not isinstance(content, Mapping) or not isinstance(content.get("state_dict"), Mapping):
        found = (
            ", ".join(map(str, list(content)[:6])) if isinstance(content, Mapping) else type(content).__name__
        )
        raise ValueError(f"{path} is no Lightning checkpoint: it has no 'state_dict' (found: {found})")
    return content


def _choose(path: Path, content: Mapping[str, Any], weights: Weights) -> Literal["ema", "raw"]:
    """Which weights to take; averages that have not begun are still the initial weights of the run."""
    averaging = content.get("averaging_state", {})
    averaged = "current_model_state" in content
    begun = averaged and int(averaging.get("n_averaged", 1)) > 0
    if weights == "ema" and not begun:
        reason = "its averaging had not begun" if averaged else "it was trained without weight averaging"
        raise ValueError(f"{path} holds no averaged weights, {reason}; ask for weights='raw'")
    return "ema" if begun and weights != "raw" else "raw"
