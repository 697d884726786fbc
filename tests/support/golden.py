"""Where golden data lies: shipped under tests/data, and more under $THALWEG_ORACLES when that is set."""

import os
from pathlib import Path

DATA = Path(__file__).parents[1] / "data"


def golden_roots(app: str) -> list[Path]:
    """Folders with golden data of an app, the shipped one first."""
    roots = [DATA / app]
    if extra := os.environ.get("THALWEG_ORACLES"):
        roots.append(Path(extra) / app)
    return [root for root in roots if root.is_dir()]


def golden_files(app: str, pattern: str) -> list[Path]:
    """Golden files or folders matching a glob, one per name; the shipped one wins."""
    found: dict[str, Path] = {}
    for root in golden_roots(app):
        for path in sorted(root.glob(pattern)):
            found.setdefault(path.relative_to(root).as_posix(), path)
    return list(found.values())
