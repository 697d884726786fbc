"""Results on disk: JSON files that are replaced only once they are complete, and where numbers come from."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from thalweg.checkpoints.atomic import write_text


def write_json(content: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Write JSON with readable indentation; an old file is replaced only by a complete new one.

    JSON has no NaN and no infinity; both become null, so that a diverged run still leaves its results.
    """
    path = Path(path)
    write_text(path, json.dumps(_finite(content), indent=1, allow_nan=False) + "\n")
    return path


def _finite(value: Any) -> Any:
    """The same content with None for numbers that are not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def provenance() -> dict[str, Any]:
    """Versions, machine and, in a checkout, the commit that produced a result."""
    return {
        "thalweg": version("thalweg"),
        "torch": version("torch"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "commit": _commit(),
    }


def _commit() -> str | None:
    """Commit of the checkout that this file lies in, with ``+`` if it has changes; None if installed."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    words = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*words, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        diff = subprocess.run([*words, "diff", "--quiet", "HEAD"], capture_output=True, check=False)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if diff.returncode else "")


def file_hash(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
