"""Where rewards find their packages and weights, and the one error they give when something is missing."""

from __future__ import annotations

import importlib
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
