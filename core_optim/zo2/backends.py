"""How blocks get from the host to the device and back.

A block is live from the call of ``upload`` to that of ``offload`` or ``drop``. Calls only issue work, in the
order in which the device sees it: work on a slot follows what was issued for it before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from thalweg.core_optim.zo2.flat import Buffers, FlatBlock, Kind, allocate


class Backend(Protocol):
    """Transfers of blocks, by their numbers."""

    slots: int
    """Blocks that may be live at a time."""

    def prepare(self, blocks: Sequence[FlatBlock]) -> None:
        """Allocate what the blocks need."""
        ...

    def upload(self, number: int) -> None:
        """Start to bring a block to the device."""
        ...

    def wait(self, number: int) -> Buffers:
        """Buffers of an uploaded block; what is issued from now on sees its weights."""
        ...

    def offload(self, number: int) -> None:
        """Bring a block back once what was issued for it is done."""
        ...

    def drop(self, number: int) -> None:
        """Forget a block that has not changed."""
        ...

    def sync(self) -> None:
        """Wait until the host's memory is up to date."""
        ...

    def mark(self, event: str, number: int) -> None:
        """Be told that computing on a block begins or ends."""
        ...


class HostBackend:
    """The network computes where its weights are: nothing is copied."""

    slots = 2

    def prepare(self, blocks: Sequence[FlatBlock]) -> None:
        """See :class:`Backend`."""
        self.blocks = blocks

    def upload(self, number: int) -> None:
        """See :class:`Backend`."""

    def wait(self, number: int) -> Buffers:
        """See :class:`Backend`."""
        return self.blocks[number].host

    def offload(self, number: int) -> None:
        """See :class:`Backend`."""

    def drop(self, number: int) -> None:
        """See :class:`Backend`."""

    def sync(self) -> None:
        """See :class:`Backend`."""

    def mark(self, event: str, number: int) -> None:
        """See :class:`Backend`."""


class SlotBackend:
    """Blocks are copied into the slots of a device and back, one copy at a time.

    Args:
        device: Where the slots are.
        slots: Blocks that fit on the device beside each other.

    Raises:
        ValueError: For less than two slots, with which nothing could overlap.
    """

    def __init__(self, device: torch.device | str, slots: int = 2) -> None:
        if slots < 2:
            raise ValueError(f"slots is {slots}, allowed: 2 and more")
        self.device = torch.device(device)
        self.slots = slots

    def prepare(self, blocks: Sequence[FlatBlock]) -> None:
        """See :class:`Backend`."""
        self.blocks = blocks
        self.buffers = [allocate(blocks, self.device, computing=False) for _ in range(self.slots)]
        self.free = deque(range(self.slots))
        self.slot_of: dict[int, int] = {}

    def upload(self, number: int) -> None:
        """See :class:`Backend`."""
        slot = self.slot_of[number] = self.free.popleft()
        self._copy(self.blocks[number].host, self.buffers[slot], to_host=False)

    def wait(self, number: int) -> Buffers:
        """See :class:`Backend`."""
        return self.buffers[self.slot_of[number]]

    def offload(self, number: int) -> None:
        """See :class:`Backend`."""
        slot = self.slot_of.pop(number)
        self._copy(self.blocks[number].host, self.buffers[slot], to_host=True)
        self.free.append(slot)

    def drop(self, number: int) -> None:
        """See :class:`Backend`."""
        self.free.append(self.slot_of.pop(number))

    def sync(self) -> None:
        """See :class:`Backend`."""

    def mark(self, event: str, number: int) -> None:
        """See :class:`Backend`."""

    def _copy(self, host: dict[Kind, Tensor], slot: dict[Kind, Tensor], *, to_host: bool) -> None:
        for kind, there in host.items():
            here = slot[kind][: there.numel()]
            if to_host:
                there.copy_(here, non_blocking=True)
            else:
                here.copy_(there, non_blocking=True)


class CudaBackend(SlotBackend):
    """Copies on a stream of their own, beside the computing, from and to page-locked host memory.

    While block i is computed, block i - 1 goes back and block i + 1 comes into its slot.

    Args:
        device: A CUDA device.
        slots: Blocks that fit on the device beside each other.
    """

    def prepare(self, blocks: Sequence[FlatBlock]) -> None:
        """See :class:`Backend`."""
        super().prepare(blocks)
        self.copies = torch.cuda.Stream(self.device)
        self.arrived = [torch.cuda.Event() for _ in range(self.slots)]
        self.computed = [torch.cuda.Event() for _ in range(self.slots)]
        self.copies.wait_stream(torch.cuda.current_stream(self.device))
        for slot in self.buffers:
            for buffer in slot.values():
                buffer.record_stream(self.copies)

    def upload(self, number: int) -> None:
        """See :class:`Backend`."""
        self.copies.wait_event(self.computed[self.free[0]])
        with torch.cuda.stream(self.copies):
            super().upload(number)
        self.arrived[self.slot_of[number]].record(self.copies)

    def wait(self, number: int) -> Buffers:
        """See :class:`Backend`."""
        torch.cuda.current_stream(self.device).wait_event(self.arrived[self.slot_of[number]])
        return super().wait(number)

    def offload(self, number: int) -> None:
        """See :class:`Backend`."""
        event = self.computed[self.slot_of[number]]
        event.record(torch.cuda.current_stream(self.device))
        self.copies.wait_event(event)
        with torch.cuda.stream(self.copies):
            super().offload(number)

    def drop(self, number: int) -> None:
        """See :class:`Backend`."""
        self.computed[self.slot_of[number]].record(torch.cuda.current_stream(self.device))
        super().drop(number)

    def sync(self) -> None:
        """See :class:`Backend`."""
        self.copies.synchronize()


class TraceBackend:
    """Another backend, with a record of what was issued in which order.

    Args:
        inner: What does the work.
    """

    def __init__(self, inner: Backend) -> None:
        self.inner = inner
        self.slots = inner.slots
        self.events: list[tuple[str, int]] = []
        """``(event, number of the block)``: upload, wait, begin, end, offload, drop; sync has number -1."""

    def prepare(self, blocks: Sequence[FlatBlock]) -> None:
        """See :class:`Backend`."""
        self.inner.prepare(blocks)

    def upload(self, number: int) -> None:
        """See :class:`Backend`."""
        self.events.append(("upload", number))
        self.inner.upload(number)

    def wait(self, number: int) -> Buffers:
        """See :class:`Backend`."""
        self.events.append(("wait", number))
        return self.inner.wait(number)

    def offload(self, number: int) -> None:
        """See :class:`Backend`."""
        self.events.append(("offload", number))
        self.inner.offload(number)

    def drop(self, number: int) -> None:
        """See :class:`Backend`."""
        self.events.append(("drop", number))
        self.inner.drop(number)

    def sync(self) -> None:
        """See :class:`Backend`."""
        self.events.append(("sync", -1))
        self.inner.sync()

    def mark(self, event: str, number: int) -> None:
        """See :class:`Backend`."""
        self.events.append((event, number))
        self.inner.mark(event, number)
