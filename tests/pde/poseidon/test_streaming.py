"""ScOT trains block by block as it does whole, long skips included."""

import torch
from poseidon_runs import scot

from thalweg.core_optim.mezo import MeZO
from thalweg.core_optim.zo2 import ZO2, SlotBackend, TraceBackend, find_blocks
from thalweg.pde.poseidon import ScOT


def test_streamed_steps_equal_plain_ones_bitwise() -> None:
    plain, streamed = scot(depths=(2, 2)), scot(depths=(2, 2))
    assert find_blocks(streamed) == streamed.wrap_modules()
    mezo, zo2 = MeZO(plain.parameters(), lr=1e-4), ZO2(streamed.parameters(), lr=1e-4)
    trace = TraceBackend(SlotBackend("cpu"))
    zo2.attach(streamed, backend=trace)

    def loss(network: ScOT, step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(2, 2, 4, 16, 16, generator=generator)
        return network(x, torch.tensor([0.2, 0.7]), labels=y).loss

    for step in range(3):
        trace.events.clear()
        mezo.step(lambda step=step: loss(plain, step))
        zo2.step(lambda step=step: loss(streamed, step))
        assert mezo.projected_gradients == zo2.projected_gradients
    uploads = [number for event, number in trace.events if event == "upload"]
    assert sorted(uploads) == list(range(len(zo2.streamed.blocks))), "the order is learnt in the first step"
    zo2.flush()
    for a, b in zip(plain.parameters(), streamed.parameters(), strict=True):
        assert torch.equal(a, b)
