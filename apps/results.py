"""Results on disk: JSON files that are replaced only once they are complete."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_json(content: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Write JSON with readable indentation to a temporary file, then rename it over the old one.

    Raises:
        ValueError: If the content holds NaN or infinity, which JSON cannot express.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    os.replace(partial, path)
    return path
