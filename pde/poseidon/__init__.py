"""Poseidon: the scalable operator transformer scOT, its training, fine-tuning and rollouts.

The network is described in Herde et al. 2024, "Poseidon: Efficient Foundation Models for PDEs"
(arXiv 2405.19101). Names are resolved lazily, so that importing the package costs nothing.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thalweg.pde.poseidon.config import ScOTConfig
    from thalweg.pde.poseidon.model import ScOT, ScOTOutput

__all__ = ["ScOT", "ScOTConfig", "ScOTOutput"]

_HOME = {"ScOT": "model", "ScOTOutput": "model", "ScOTConfig": "config"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
