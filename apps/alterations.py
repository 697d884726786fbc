"""Changes to a module for the time of a fit, undone in reverse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L


class Alterations:
    """What a callback has changed, and how to change it back."""

    def __init__(self) -> None:
        self.restore: list[Callable[[], object]] = []

    def later(self, action: Callable[[], object]) -> None:
        """Remember how to change something back."""
        self.restore.append(action)

    def replace(self, module: L.LightningModule, name: str, method: Callable[..., Any]) -> None:
        """Put a function in the place of a method of one module.

        Several callbacks may do so with the same method, each around what it finds. Their changes end
        together, with the fit, in any order; so the first to change it back gives back the module's own.
        """
        setattr(module, name, method)
        self.later(lambda: module.__dict__.pop(name, None))

    def undo(self) -> None:
        """Change everything back, the last first."""
        while self.restore:
            self.restore.pop()()
