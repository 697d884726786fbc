"""Golden values of DiffusionNFT: files of cases, and their arrays."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from golden import golden_files
from safetensors.torch import load_file
from torch import Tensor


@cache
def arrays(path: Path) -> dict[str, Tensor]:
    """Arrays beside a file of cases."""
    return load_file(path.with_suffix(".safetensors"))


def cases(name: str, key: str = "cases") -> list[tuple[Path, dict[str, Any]]]:
    """Cases of all files whose names begin so, each with its file; those of the complete file come once."""
    files = golden_files("nft", f"{name}*.json")
    complete = [path for path in files if path.stem == name] or files
    return [(path, case) for path in complete for case in json.loads(path.read_text())[key]]


def case_names(found: list[tuple[Path, dict[str, Any]]]) -> list[str]:
    """What tests call them."""
    return [str(case["case"]) for _, case in found]
