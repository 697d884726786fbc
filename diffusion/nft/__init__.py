"""Online reinforcement learning of flow-matching models (DiffusionNFT, Zheng et al. 2025, arXiv 2509.16117).

Names are resolved lazily, so that importing the package costs nothing.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thalweg.diffusion.nft.advantage import group_advantage
    from thalweg.diffusion.nft.loss import nft_loss

__all__ = ["group_advantage", "nft_loss"]

_HOME = {"group_advantage": "advantage", "nft_loss": "loss"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
