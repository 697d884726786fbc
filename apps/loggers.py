"""The default logger: CSV, without losing what an earlier run left in the same folder."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch.loggers
from lightning.pytorch.loggers.logger import rank_zero_experiment


class CSVLogger(lightning.pytorch.loggers.CSVLogger):
    """Lightning's CSV logger, which deletes the metrics of a run that is continued in its own folder.

    Here they are kept as ``metrics_1.csv``, ``metrics_2.csv``, ...; ``metrics.csv`` is the newest part.

    Args:
        save_dir: Folder of all runs.
        name: Folder of this kind of run below it.
        version: Folder of the run; by default the next free ``version_<n>``.
        prefix: Put before the names of metrics.
        flush_logs_every_n_steps: Steps between writes.
    """

    def __init__(
        self,
        save_dir: str,
        name: str | None = "run",
        version: int | str | None = None,
        prefix: str = "",
        flush_logs_every_n_steps: int = 100,
    ) -> None:
        super().__init__(save_dir, name, version, prefix, flush_logs_every_n_steps)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """Lightning's writer."""
        if self._experiment is None:
            set_aside(Path(self.log_dir) / "metrics.csv")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*logs directory .* exists and is not empty")
            return super().experiment


def set_aside(path: Path) -> None:
    """Rename a file to the next free numbered name, if it exists."""
    if not path.is_file():
        return
    number = 1
    while (target := path.with_stem(f"{path.stem}_{number}")).exists():
        number += 1
    path.rename(target)
