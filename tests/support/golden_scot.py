"""Golden scOT networks: small published-layout checkpoints and the outputs of the original implementation."""

import json
from pathlib import Path
from typing import Any

from golden import golden_files
from safetensors.torch import load_file
from torch import Tensor

from thalweg.pde.poseidon import ScOT

CASES = {path.parent.name: path.parent for path in golden_files("poseidon", "*/config.json")}


def case_with(filename: str) -> dict[str, Path]:
    """Cases that also hold a certain file."""
    return {name: folder for name, folder in CASES.items() if (folder / filename).exists()}


def load_case(folder: Path) -> tuple[ScOT, dict[str, Tensor]]:
    """Network in evaluation mode and its recorded inputs and outputs."""
    return ScOT.from_pretrained(folder).eval(), load_file(folder / "io.safetensors")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())
