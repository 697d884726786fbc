"""Losses at several shifts of the weights in one pass over the blocks of a network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from thalweg.core_optim.mezo import Entry
from thalweg.core_optim.zeroth import RandomState, real
from thalweg.core_optim.zo2.backends import Backend
from thalweg.core_optim.zo2.flat import Buffers, FlatBlock, Piece, allocate
from thalweg.core_optim.zo2.passes import Closures, Gate, Pass, make_pass
from thalweg.core_optim.zo2.stream import BlockStream


class Shift(NamedTuple):
    """Weights are p + scale * z of a sample; p itself if the scale is zero."""

    sample: int
    scale: float


Shifted = Callable[[Tensor, int, Shift], Tensor]
"""Weights of a parameter, its number and a shift -> its shifted weights."""
Advance = Callable[[Tensor, int, int], bool]
"""Weights of a parameter, its number and its group -> whether they have been updated in place."""


class Streamed:
    """The streamed blocks and the resident parameters of a network.

    Args:
        modules: The blocks.
        blocks: Their parameters, in the same order.
        residents: Trainable parameters outside of them.
        backend: What moves the blocks.
        device: Where the network computes.
        shifted: Makes shifted weights.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        blocks: Sequence[FlatBlock],
        residents: Sequence[Entry],
        backend: Backend,
        device: torch.device,
        shifted: Shifted,
    ) -> None:
        self.modules = modules
        self.blocks = blocks
        self.residents = residents
        self.device = device
        self.shifted = shifted
        self.stream = BlockStream(blocks, backend)
        self.work = allocate(blocks, device, computing=True)
        self.numbers = {id(module): number for number, module in enumerate(modules)}
        self.inner = [
            (number, part)
            for number, module in enumerate(modules)
            for part in _owners(module, blocks[number])
        ]
        self.is_checked = False
        self.has_changed = False
        self.buffers: Buffers = {}

    def losses(self, closures: Closures, shifts: Sequence[Shift], advance: Advance | None) -> list[Tensor]:
        """Sums of the closures' losses in float64 at the shifts; see :meth:`evaluate`."""
        return self.evaluate([make_pass(closures, self.numbers) for _ in shifts], shifts, advance)

    def evaluate(
        self, passes: Sequence[Pass], shifts: Sequence[Shift], advance: Advance | None = None
    ) -> list[Any]:
        """Results of evaluations at shifts of the weights, all with the same random numbers.

        Args:
            passes: Evaluations that call the same blocks.
            shifts: One for each.
            advance: Brings weights up to date before they are shifted; each parameter is given to it once,
                also if an evaluation fails.

        Raises:
            ValueError: If evaluations call different blocks, or a block is used outside of its call.
        """
        left = set(range(len(self.blocks))) if advance is not None else set()
        if advance is not None:
            for entry in self.residents:
                advance(real(entry.parameter), entry.index, entry.group)
        with self._away(advance, left), self._residents_at(shifts) as show, Gate(self.modules) as gate:
            turns = self._turns(passes, shifts, show, gate)
            try:
                while (number := self._agree(turns())) is not None:
                    if self.stream.current is not None:
                        self._leave()
                    self.buffers = self.stream.enter(number)
                    self.has_changed = number in left and self._advance(number, self.buffers, advance)
                    left.discard(number)
            finally:
                for one in passes:
                    one.close()
        self.is_checked = True
        return [one.result() for one in passes]

    def _turns(
        self, passes: Sequence[Pass], shifts: Sequence[Shift], show: Callable[[int], None], gate: Gate
    ) -> Callable[[], list[int | None]]:
        """Lets each pass in turn run to its next block, with its own weights and random numbers."""
        random = RandomState([torch.empty(0, device=self.device)])
        states = [random.get()] * len(shifts)

        def run() -> list[int | None]:
            found = []
            for turn, (one, shift) in enumerate(zip(passes, shifts, strict=True)):
                show(turn)
                if self.stream.current is not None:
                    self._show_current(shift)
                random.set(states[turn])
                found.append(gate.advance(one))
                states[turn] = random.get()
            return found

        return run

    def apply(self, advance: Advance) -> None:
        """Bring all weights up to date."""
        for entry in self.residents:
            advance(real(entry.parameter), entry.index, entry.group)
        with self._away(advance, set(range(len(self.blocks)))):
            pass

    @contextmanager
    def _away(self, advance: Advance | None, left: set[int]) -> Iterator[None]:
        """Take the blocks' weights from the parameters, and give them back with what was left to do done."""
        for block in self.blocks:
            block.hide()
        self.has_changed = False
        handles = [] if self.is_checked else self._watch()
        self.stream.begin()
        try:
            yield
        finally:
            if self.stream.current is not None:
                self._leave()
            for number in sorted(left):
                buffers = self.stream.enter(number)
                self.has_changed = self._advance(number, buffers, advance)
                self._leave()
            self.stream.end()
            for handle in handles:
                handle.remove()
            for block in self.blocks:
                block.park()

    def _leave(self) -> None:
        assert self.stream.current is not None
        self.blocks[self.stream.current].hide()
        self.stream.leave(changed=self.has_changed)

    def _advance(self, number: int, buffers: Buffers, advance: Advance | None) -> bool:
        """Update a block on the device; whether that changed it."""
        assert advance is not None
        block = self.blocks[number]
        done = [
            advance(view, piece.index, piece.group)
            for piece, view in zip(block.pieces, block.views(buffers), strict=True)
            if piece.index is not None
        ]
        return any(done)

    def _show_current(self, shift: Shift) -> None:
        """Let the current block's parameters be its shifted weights."""
        assert self.stream.current is not None
        block = self.blocks[self.stream.current]
        views = zip(block.pieces, block.views(self.buffers), block.views(self.work), strict=True)
        for piece, kept, work in views:
            piece.show(self._shown(piece, kept, work, shift))

    def _shown(self, piece: Piece, kept: Tensor, work: Tensor, shift: Shift) -> Tensor:
        if piece.index is not None and shift.scale:
            return work.copy_(self.shifted(kept, piece.index, shift))
        return kept if kept.dtype == work.dtype else work.copy_(kept)

    @contextmanager
    def _residents_at(self, shifts: Sequence[Shift]) -> Iterator[Callable[[int], None]]:
        """Keep resident weights at all shifts beside each other; yields what shows one of the sets."""
        kept = [entry.parameter.data for entry in self.residents]
        sets = [self._resident_set(shift) for shift in shifts]

        def show(turn: int) -> None:
            for entry, weights in zip(self.residents, sets[turn], strict=True):
                entry.parameter.data = weights

        try:
            yield show
        finally:
            for entry, weights in zip(self.residents, kept, strict=True):
                entry.parameter.data = weights

    def _resident_set(self, shift: Shift) -> list[Tensor]:
        found = []
        for entry in self.residents:
            weights = real(entry.parameter)
            if shift.scale:
                weights = self.shifted(weights, entry.index, shift).to(weights.dtype)
            found.append(torch.view_as_complex(weights) if entry.parameter.is_complex() else weights)
        return found

    def _agree(self, found: list[int | None]) -> int | None:
        if any(number != found[0] for number in found):
            names = ["the end" if n is None else self.blocks[n].name for n in found]
            raise ValueError(
                f"evaluations of the same batch call different blocks ({', '.join(names)}): stream only"
                " blocks whose calls do not depend on the weights"
            )
        return found[0]

    def _watch(self) -> list[torch.utils.hooks.RemovableHandle]:
        """Hooks that name the part of a block that something outside of the block uses."""

        def watch(number: int, name: str, part: nn.Module) -> torch.utils.hooks.RemovableHandle:
            def check(module: nn.Module, arguments: object) -> None:
                if self.stream.current != number:
                    raise ValueError(
                        f"{name or 'all'} of block {self.blocks[number].name} is used outside of the block:"
                        " pass that module as resident"
                    )

            return part.register_forward_pre_hook(check)

        return [watch(number, name, part) for number, (name, part) in self.inner]


def _owners(module: nn.Module, block: FlatBlock) -> list[tuple[str, nn.Module]]:
    """Parts of a block that own streamed parameters."""
    streamed = {id(piece.parameter) for piece in block.pieces}
    return [
        (name, part)
        for name, part in module.named_modules()
        if any(id(parameter) in streamed for parameter in part._parameters.values())
    ]
