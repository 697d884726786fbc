"""Networks as a head, a list of blocks and a tail, for those who can say so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn


class Chain(Protocol):
    """A network cut into blocks.

    The state that passes from block to block may be anything: a tensor, a tuple, a dict of tensors. A block
    must not put a view of its own weights into it, since their memory is used again.
    """

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """Blocks in the order of their calls; each takes the state and returns the next one."""
        ...

    def head_in(self, batch: Any) -> Any:
        """State before the first block."""
        ...

    def tail(self, state: Any, batch: Any) -> Tensor:
        """Loss after the last block."""
        ...


@dataclass(frozen=True)
class ChainLoss:
    """Closure of a chain and a batch, for any optimizer; ``ZO2`` runs it without threads."""

    chain: Chain
    batch: Any

    def __call__(self) -> Tensor:
        """The loss."""
        state = self.chain.head_in(self.batch)
        for block in self.chain.blocks:
            state = block(state)
        return self.chain.tail(state, self.batch)
