"""Where rewards find their packages and weights, and the one error they give when something is missing."""

from __future__ import annotations

import importlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from thalweg.diffusion.rewards.base import RewardError


def needed(module: str, reward: str, install: str) -> Any:
    """Import a package that a reward needs.

    Raises:
        RewardError: If it is not installed; the error says what to type.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RewardError(f"reward {reward!r} needs {module}: {install} ({error})") from None


def weights_file(path: str | None, reward: str, source: str) -> Path:
    """File of a reward's weights.

    Raises:
        RewardError: If none is given or it does not exist; nothing is downloaded.
    """
    if path is None:
        raise RewardError(f"reward {reward!r} needs 'weights', the file {source}; nothing is downloaded")
    if not Path(path).is_file():
        raise RewardError(f"reward {reward!r}: weights {path!r} is no file; needed: {source}")
    return Path(path)


def model_folder(path: str | None, reward: str, option: str, repository: str) -> str:
    """Folder of a model as transformers writes it.

    Raises:
        RewardError: If none is given or it holds no ``config.json``; nothing is downloaded.
    """
    source = f"`hf download {repository} --local-dir FOLDER` makes one"
    if path is None:
        raise RewardError(f"reward {reward!r} needs {option!r}, the folder of {repository}; {source}")
    if not (Path(path) / "config.json").is_file():
        raise RewardError(f"reward {reward!r}: {option} {path!r} is no folder of a model; {source}")
    return path


def whole_model(kind: Any, folder: str, unused: Collection[str] = ()) -> Any:
    """A model of transformers all of whose weights are there; without this, missing ones would be made up.

    Args:
        kind: Its class.
        folder: Where it is.
        unused: Weights that may be missing.

    Raises:
        RewardError: If it is another model, or not whole.
    """
    try:
        said = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")).get("model_type")
        if said != kind.config_class.model_type:
            raise ValueError(f"its config.json is that of a {said}")
        model, info = kind.from_pretrained(folder, local_files_only=True, output_loading_info=True)
        lost = sorted(set(info["missing_keys"]) - set(unused))
        if lost:
            raise ValueError(f"{len(lost)} of its tensors are missing, such as {lost[0]}")
    except (OSError, ValueError, RuntimeError, AttributeError) as error:
        raise RewardError(f"{folder!r} holds no whole {kind.__name__}: {error}") from None
    return model
