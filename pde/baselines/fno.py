"""Fourier neural operator from the ``neuraloperator`` package, conditioned on the lead time.

Li et al. 2021, "Fourier Neural Operator for Parametric Partial Differential Equations". The lead time enters
as a constant input channel, as do the grid coordinates.

Shapes: B batch, C channels, H/W space.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from thalweg.pde.baselines.operator import BaselineOperator, OperatorConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class FNOConfig(OperatorConfig):
    """Size of the Fourier neural operator."""

    modes: int = 16
    """Fourier modes kept per axis, both signs together; at most the resolution."""
    width: int = 64
    """Channels of the Fourier layers."""
    depth: int = 4
    """Number of Fourier layers."""
    grid: bool = True
    """Add the grid coordinates to the input; without them the network commutes with periodic shifts."""
    padding: float | None = None
    """Zero padding of the domain as a fraction of its side, for problems that are not periodic."""


class FNOOperator(BaselineOperator):
    """FNO with the calling conventions of scOT."""

    def __init__(self, config: FNOConfig) -> None:
        super().__init__()
        self.config: FNOConfig = config
        extra = 2 * config.grid + config.use_conditioning
        self.fno = _fno_class()(
            n_modes=(config.modes, config.modes),
            in_channels=config.num_channels + extra,
            out_channels=config.num_out_channels,
            hidden_channels=config.width,
            n_layers=config.depth,
            positional_embedding=None,
            domain_padding=config.padding,
        )
        self.register_state_dict_post_hook(_drop_metadata)

    def predict(self, x_BCHW: Tensor, time_B: Tensor) -> Tensor:
        """Append time and coordinates as channels and apply the FNO, in float32 also under autocast.

        Fourier transforms know no bfloat16.
        """
        batch, _, height, width = x_BCHW.shape
        channels = [x_BCHW]
        if self.config.use_conditioning:
            channels.append(time_B.to(x_BCHW).view(batch, 1, 1, 1).expand(batch, 1, height, width))
        if self.config.grid:
            axes = (torch.arange(n, device=x_BCHW.device, dtype=x_BCHW.dtype) / n for n in (height, width))
            grid = torch.stack(torch.meshgrid(*axes, indexing="ij"))
            channels.append(grid.expand(batch, 2, height, width))
        with torch.autocast(x_BCHW.device.type, enabled=False):
            output: Tensor = self.fno(torch.cat(channels, dim=1))
        return output

    def wrap_modules(self) -> list[nn.Module]:
        """The spectral convolutions, where nearly all parameters are."""
        return list(self.fno.fno_blocks.convs)


def _fno_class() -> type[nn.Module]:
    """Import the FNO.

    Raises:
        ImportError: If the package is missing; the message names the extra that brings it.
    """
    try:
        with warnings.catch_warnings():  # the import changes the filters of the whole process
            from neuralop.models import FNO
    except ImportError:
        raise ImportError("the FNO baseline needs neuraloperator: pip install 'thalweg[baselines]'") from None
    return FNO


def _drop_metadata(
    module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: dict[str, Any]
) -> None:
    """Take out the constructor arguments that neuraloperator stores, as Python objects, among weights."""
    state.pop("_metadata", None)
