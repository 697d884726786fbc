"""The order in which blocks come and go, and that a slot is never used for two blocks at once."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from thalweg.core_optim.mezo import MeZO
from thalweg.core_optim.zo2 import ZO2, HostBackend, SlotBackend, TraceBackend, find_blocks
from thalweg.core_optim.zo2.flat import ALIGNMENT, FlatBlock


class Slow(SlotBackend):
    """As on a device, copies happen late: those in at the wait, those out when the slot is needed again.

    A slot that nobody may read any more holds NaN.
    """

    def prepare(self, blocks: Sequence[FlatBlock]) -> None:
        super().prepare(blocks)
        self.late_in: dict[int, int] = {}
        self.late_out: dict[int, int] = {}

    def upload(self, number: int) -> None:
        slot = self.slot_of[number] = self.free.popleft()
        self.late_in[number] = slot

    def wait(self, number: int) -> dict:
        slot = self.late_in.pop(number)
        self._write_out(slot)
        for late, other in list(self.late_out.items()):
            if other == number:  # copies out come before later copies in
                self._write_out(late)
        self._copy(self.blocks[number].host, self.buffers[slot], to_host=False)
        return self.buffers[slot]

    def offload(self, number: int) -> None:
        slot = self.slot_of.pop(number)
        self.late_out[slot] = number
        self.free.append(slot)

    def drop(self, number: int) -> None:
        self.late_in.pop(number, None)
        super().drop(number)

    def sync(self) -> None:
        for slot in list(self.late_out):
            self._write_out(slot)

    def _write_out(self, slot: int) -> None:
        if slot in self.late_out:
            self._copy(self.blocks[self.late_out.pop(slot)].host, self.buffers[slot], to_host=True)
            for buffer in self.buffers[slot].values():
                buffer.fill_(torch.nan)


class Deep(nn.Module):
    def __init__(self, count: int = 5, width: int = 6) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(count))
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x).tanh()
        return self.head(x).square().mean()


def deep(count: int = 5) -> Deep:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Deep(count)


def traced(net: Deep, steps: int, **options: float) -> tuple[ZO2, list[list[tuple[str, int]]]]:
    """Events of each step."""
    trace = TraceBackend(Slow("cpu"))
    zo2 = ZO2(net.parameters(), lr=1e-2, **options)
    zo2.attach(net, list(net.blocks), backend=trace)
    found = []
    x = torch.ones(2, 6)
    for _ in range(steps):
        trace.events.clear()
        zo2.step(lambda: net(x))
        found.append(list(trace.events))
    return zo2, found


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_next_block_comes_while_one_is_computed_and_goes_afterwards(count: int) -> None:
    _, (_, events) = traced(deep(count), 2)
    at = {event: place for place, event in enumerate(events)}
    assert len(at) == len(events), "each block comes, is computed and goes once"
    for i in range(count):
        assert at["upload", i] < at["wait", i] < at["begin", i] < at["end", i] < at["offload", i]
        if i + 1 < count:
            assert at["upload", i + 1] < at["begin", i], "issued before computing, hence beside it"
            assert at["offload", i] < at["wait", i + 1]
        if i + 2 < count:
            assert at["offload", i] < at["upload", i + 2], "its slot is free"
    assert events[-1] == ("sync", -1)


def test_no_more_than_two_blocks_are_live() -> None:
    _, steps = traced(deep(), 3)
    for events in steps:
        live: set[int] = set()
        most = 0
        for event, number in events:
            if event == "upload":
                assert number not in live
                live.add(number)
            elif event in ("offload", "drop"):
                live.remove(number)
            elif event != "sync":
                assert number in live
            most = max(most, len(live))
        assert most == 2
        assert not live


def test_blocks_without_an_update_are_not_brought_back() -> None:
    """In the first step nothing is pending; a rate of zero and frozen blocks change nothing."""
    _, (first, second) = traced(deep(), 2)
    assert [event for event, _ in first].count("drop") == 5
    assert [event for event, _ in second].count("offload") == 5
    frozen = deep()
    frozen.blocks[2].requires_grad_(False)
    _, (_, second) = traced(frozen, 2)
    assert ("drop", 2) in second
    assert [number for event, number in second if event == "offload"] == [0, 1, 3, 4]


def test_late_copies_change_nothing() -> None:
    plain, streamed = deep(), deep()
    mezo = MeZO(plain.parameters(), lr=1e-2)
    for _ in range(10):
        mezo.step(lambda: plain(torch.ones(2, 6)))
    zo2, _ = traced(streamed, 10)
    zo2.flush()
    assert mezo.projected_gradients == zo2.projected_gradients
    for a, b in zip(plain.parameters(), streamed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_flush_overlaps_as_well_and_happens_once() -> None:
    net = deep()
    zo2, _ = traced(net, 1)
    trace = zo2.streamed.stream.backend
    trace.events.clear()
    zo2.flush()
    at = {event: place for place, event in enumerate(trace.events)}
    assert all(at["upload", i + 1] < at["begin", i] < at["offload", i] for i in range(4))
    trace.events.clear()
    zo2.flush()
    assert not trace.events


def test_a_changed_order_is_the_next_guess() -> None:
    class Turned(Deep):
        def forward(self, x: Tensor) -> Tensor:
            for block in reversed(self.blocks):
                x = block(x).tanh()
            return x.mean()

    torch.manual_seed(0)
    _, (first, second) = traced(Turned(3), 2)
    assert [n for event, n in first if event == "upload"] == [0, 2, 1, 0]
    assert [n for event, n in second if event == "upload"] == [2, 1, 0]


def test_a_block_is_one_aligned_buffer_per_number_type() -> None:
    module = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2, dtype=torch.float64), nn.LayerNorm(2))
    block = FlatBlock("b", [(p, i, 0) for i, p in enumerate(module.parameters())])
    before = [p.detach().clone() for p in module.parameters()]
    block.fill()
    block.park()
    assert len(block.host) == 2
    assert all(piece.offset % ALIGNMENT == 0 for piece in block.pieces)
    pointers = {buffer.untyped_storage().data_ptr() for buffer in block.host.values()}
    for p, old in zip(module.parameters(), before, strict=True):
        assert torch.equal(p, old)
        assert p.untyped_storage().data_ptr() in pointers
    assert block.num_bytes == sum(b.numel() * b.element_size() for b in block.host.values())


def test_less_than_two_slots_are_refused() -> None:
    with pytest.raises(ValueError, match="slots is 1, allowed: 2 and more"):
        SlotBackend("cpu", slots=1)


def test_blocks_are_found_by_what_networks_say_of_themselves() -> None:
    net = deep()
    assert find_blocks(net) == list(net.blocks)
    net._no_split_modules = ["Linear"]
    assert find_blocks(net) == [*net.blocks, net.head]
    net.wrap_modules = lambda: [net.blocks[1], net.blocks]
    assert find_blocks(net) == [net.blocks]
    with pytest.raises(ValueError, match="Linear names no blocks"):
        find_blocks(nn.Linear(2, 2))


def test_the_host_backend_copies_nothing() -> None:
    backend = HostBackend()
    block = FlatBlock("b", [(nn.Parameter(torch.ones(3)), 0, 0)])
    backend.prepare([block])
    backend.upload(0)
    assert backend.wait(0) is block.host
