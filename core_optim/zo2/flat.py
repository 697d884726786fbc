"""Blocks of a network as flat buffers, one per number type, so that one copy moves a block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from thalweg.core_optim.zeroth import real

ALIGNMENT = 64
"""Numbers between the starts of parameters: a multiple of what vector units and matrix kernels want."""
Kind = tuple[torch.dtype, torch.dtype]
"""Number type that the network computes in, and the one that the host keeps."""
Buffers = Mapping[Kind, Tensor]


@dataclass(frozen=True)
class Piece:
    """A parameter's place in its block."""

    parameter: nn.Parameter
    index: int | None
    """Number in the optimizer; None if frozen."""
    group: int
    kind: Kind
    offset: int
    shape: torch.Size
    """Of the real view of complex parameters."""
    is_complex: bool

    def show(self, weights: Tensor) -> None:
        """Let the parameter be these real weights, without a copy."""
        self.parameter.data = torch.view_as_complex(weights) if self.is_complex else weights

    def hide(self) -> None:
        """Leave nothing to compute with, so that a use outside of the block fails."""
        self.parameter.data = self.parameter.new_empty(0, dtype=self.parameter.dtype)


class FlatBlock:
    """Parameters of a block in host memory; between steps they are views of it.

    Args:
        name: Name of the block, for messages.
        parameters: Its parameters, with number and group in the optimizer or None and 0 if frozen.
        host_dtype: What the host keeps; the parameters' own type if not given.
        pinned: Whether the host memory is page-locked.
    """

    def __init__(
        self,
        name: str,
        parameters: Sequence[tuple[nn.Parameter, int | None, int]],
        host_dtype: torch.dtype | None = None,
        *,
        pinned: bool = False,
    ) -> None:
        self.name = name
        self.dtypes = [parameter.dtype for parameter, _, _ in parameters]
        sizes: dict[Kind, int] = {}
        self.pieces: list[Piece] = []
        for parameter, index, group in parameters:
            weights = real(parameter)
            kind = (weights.dtype, host_dtype or weights.dtype)
            start = sizes.get(kind, 0)
            self.pieces.append(
                Piece(parameter, index, group, kind, start, weights.shape, parameter.is_complex())
            )
            sizes[kind] = start + -(-weights.numel() // ALIGNMENT) * ALIGNMENT
        self.host: dict[Kind, Tensor] = {
            kind: torch.zeros(size, dtype=kind[1], pin_memory=pinned) for kind, size in sizes.items()
        }
        self.is_trainable = any(piece.index is not None for piece in self.pieces)

    def views(self, buffers: Buffers) -> list[Tensor]:
        """Real weights of each piece as views of buffers laid out like the host's."""
        return [
            buffers[piece.kind][piece.offset : piece.offset + piece.shape.numel()].view(piece.shape)
            for piece in self.pieces
        ]

    def fill(self) -> None:
        """Copy the parameters' present weights to the host."""
        for piece, view in zip(self.pieces, self.views(self.host), strict=True):
            view.copy_(real(piece.parameter))

    def park(self) -> None:
        """Let the parameters be views of the host's memory."""
        for piece, view in zip(self.pieces, self.views(self.host), strict=True):
            piece.show(view)

    def hide(self) -> None:
        """Leave nothing to compute with."""
        for piece in self.pieces:
            piece.hide()

    def release(self, device: torch.device) -> None:
        """Give the parameters memory of their own on a device, in the type that the network computes in."""
        for piece, view in zip(self.pieces, self.views(self.host), strict=True):
            piece.show(view.to(device, piece.kind[0], copy=True))

    @property
    def num_bytes(self) -> int:
        """Bytes that a transfer moves."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.host.values())


def allocate(blocks: Sequence[FlatBlock], device: torch.device, *, computing: bool) -> dict[Kind, Tensor]:
    """Buffers that hold any one of the blocks, in the number type of computing or in the host's."""
    sizes: dict[Kind, int] = {}
    for block in blocks:
        for kind, host in block.host.items():
            sizes[kind] = max(sizes.get(kind, 0), host.numel())
    return {
        kind: torch.zeros(n, dtype=kind[0 if computing else 1], device=device) for kind, n in sizes.items()
    }
