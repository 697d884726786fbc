"""How the trainer reads and writes ``.ckpt`` files: atomically, and without running code from them.

Lightning writes to the system's temporary folder and moves the file; where that is another file system, a
kill or a full disk in the middle of the move destroys the checkpoint that was there.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from thalweg.checkpoints.atomic import write_bytes
from thalweg.checkpoints.lightning_ckpt import read_content

VERSION_KEY = "pytorch-lightning_version"
"""Entry of every checkpoint that the trainer writes."""


class SafeCheckpointIO(TorchCheckpointIO):
    """Checkpoint files beside their final name first, read with the restricted unpickler."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a file; the old one stays until the new one is complete.

        Raises:
            OSError: If writing fails.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        # torch reports a full disk as an internal error of its archive writer
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_bytes(path, buffer.getbuffer())

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = None,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a file onto the CPU.

        Raises:
            ValueError: If the file is missing, damaged, no checkpoint, or holds more than plain tensors.
        """
        if "://" in str(path):
            return dict(super().load_checkpoint(path, map_location, weights_only=True))
        content = read_content(Path(path))
        if VERSION_KEY not in content:
            raise ValueError(
                f"{path} has weights but was not written by the trainer (it has no {VERSION_KEY!r}), so it"
                " cannot be resumed; a fit can start from its weights with --model.init_args.pretrained"
            )
        return dict(content)
