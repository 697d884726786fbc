"""The order of transfers: the next block comes while one is computed, and goes back afterwards."""

from __future__ import annotations

from collections.abc import Sequence

from thalweg.core_optim.zo2.backends import Backend
from thalweg.core_optim.zo2.flat import Buffers, FlatBlock


class BlockStream:
    """Brings blocks in the order in which they are asked for, one of them ahead.

    What is brought ahead is a guess: the order of the last pass, at first that of the list. A wrong guess
    costs a transfer and changes no result.

    Args:
        blocks: All blocks.
        backend: What moves them.
    """

    def __init__(self, blocks: Sequence[FlatBlock], backend: Backend) -> None:
        self.blocks = blocks
        self.backend = backend
        self.order = list(range(len(blocks)))
        self.visited: list[int] = []
        self.current: int | None = None
        self.ahead: int | None = None
        backend.prepare(blocks)

    def begin(self) -> None:
        """Start a pass over the blocks."""
        self.visited = []
        self._bring_next()

    def enter(self, number: int) -> Buffers:
        """Buffers of a block that is computed next; starts to bring the one after it."""
        assert self.current is None
        if self.ahead != number:
            self._forget_guess()
            self.backend.upload(number)
        self.ahead = None
        buffers = self.backend.wait(number)
        self.current = number
        self.visited.append(number)
        self._bring_next()
        self.backend.mark("begin", number)
        return buffers

    def leave(self, *, changed: bool) -> None:
        """End the computing on the current block, and bring it back if its weights have changed."""
        assert self.current is not None
        number, self.current = self.current, None
        self.backend.mark("end", number)
        if changed:
            self.backend.offload(number)
        else:
            self.backend.drop(number)

    def end(self) -> None:
        """End a pass; its order is the next guess."""
        if self.current is not None:
            self.leave(changed=False)
        self._forget_guess()
        if self.visited:
            self.order = self.visited
        self.backend.sync()

    def _bring_next(self) -> None:
        """Start to bring the block that follows in the order, if it is another one."""
        position = len(self.visited)
        if self.visited != self.order[:position] or position == len(self.order):
            return
        if (guess := self.order[position]) != self.current:
            self.ahead = guess
            self.backend.upload(guess)

    def _forget_guess(self) -> None:
        if self.ahead is not None:
            self.backend.drop(self.ahead)
            self.ahead = None
