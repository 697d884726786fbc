"""Streaming through a GPU: equal to MeZO there, with transfers beside the computing and little memory."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from thalweg.core_optim.mezo import MeZO
from thalweg.core_optim.zo2 import ZO2, CudaBackend
from thalweg.core_optim.zo2.flat import FlatBlock

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


class Deep(nn.Module):
    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(count))
        self.head = nn.Linear(width, 1)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.dropout(block(x).tanh())
        return self.head(x).square().mean()


def deep(count: int = 6, width: int = 256, dtype: torch.dtype = torch.float32) -> Deep:
    torch.manual_seed(0)
    return Deep(count, width).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_steps_equal_those_of_mezo_bitwise(dtype: torch.dtype) -> None:
    plain, streamed = deep(dtype=dtype).cuda(), deep(dtype=dtype)
    mezo, zo2 = MeZO(plain.parameters(), lr=1e-3), ZO2(streamed.parameters(), lr=1e-3)
    zo2.attach(streamed, list(streamed.blocks), device="cuda")
    assert isinstance(zo2.streamed.stream.backend, CudaBackend)
    gradients: list[list[tuple[float, ...]]] = [[], []]
    for found, optimizer, net in zip(gradients, (mezo, zo2), (plain, streamed), strict=True):
        torch.manual_seed(1)
        for _ in range(50):
            x = torch.randn(32, 256, device="cuda", dtype=dtype)
            optimizer.step(lambda x=x, net=net: net(x))
            found.append(optimizer.projected_gradients)
    assert gradients[0] == gradients[1]
    zo2.flush()
    assert streamed.blocks[0].weight.device.type == "cpu"
    assert streamed.blocks[0].weight.is_pinned()
    assert streamed.head.weight.device.type == "cuda"
    for a, b in zip(plain.parameters(), streamed.parameters(), strict=True):
        assert torch.equal(a.cpu(), b.cpu())
    x = torch.randn(4, 256, device="cuda", dtype=dtype)
    plain.eval(), streamed.eval()
    assert zo2.run(lambda: streamed(x)).item() == plain(x).item()


class Timed(CudaBackend):
    """Knows when transfers and computations ended on the device."""

    def prepare(self, blocks: Sequence[FlatBlock]) -> None:
        super().prepare(blocks)
        self.times: dict[tuple[str, int], torch.cuda.Event] = {}

    def upload(self, number: int) -> None:
        super().upload(number)
        self._note(("arrived", number), self.copies)

    def mark(self, event: str, number: int) -> None:
        self._note((event, number), torch.cuda.current_stream())

    def _note(self, key: tuple[str, int], stream: torch.cuda.Stream) -> None:
        self.times[key] = torch.cuda.Event(enable_timing=True)
        self.times[key].record(stream)


def test_the_next_block_arrives_before_a_long_computation_ends() -> None:
    net = deep(4, 4096)
    timed = Timed("cuda")
    zo2 = ZO2(net.parameters(), lr=1e-3)
    zo2.attach(net, list(net.blocks), device="cuda", backend=timed)
    x = torch.randn(65536, 4096, device="cuda")
    for _ in range(2):
        zo2.step(lambda: net(x))
    torch.cuda.synchronize()
    for i in range(3):
        assert timed.times["arrived", i + 1].elapsed_time(timed.times["end", i]) > 0.0


def test_memory_is_that_of_three_blocks() -> None:
    """Two slots and one block of shifted weights, one parameter's direction, and activations."""
    count, width = 24, 2048
    net = deep(count, width)
    block = sum(p.numel() * 4 for p in net.blocks[0].parameters())
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    zo2 = ZO2(net.parameters(), lr=1e-6)
    zo2.attach(net, list(net.blocks), device="cuda")
    for _ in range(3):
        x = torch.randn(4, width, device="cuda")
        zo2.step(lambda x=x: net(x))
    zo2.flush()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 7 * block + 2**26  # two slots, shifted weights, temporaries of one matrix, workspace
    assert peak < 0.5 * count * block
