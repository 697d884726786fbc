"""ZO2 is MeZO: the same projected gradients at each step and, after a flush, the same weights, bit by bit."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from thalweg.core_optim.mezo import MeZO
from thalweg.core_optim.zo2 import ZO2, Backend, ChainLoss, HostBackend, SlotBackend

BACKENDS: dict[str, Callable[[], Backend]] = {"host": HostBackend, "slots": lambda: SlotBackend("cpu")}


class Block(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 20), nn.Linear(20, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.down(torch.nn.functional.gelu(self.up(self.norm(x)))))


class Net(nn.Module):
    """Embedding and head with tied weights, four blocks, a long skip, dropout."""

    def __init__(self, width: int = 11, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, width)
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(4))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 9)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor(0.5))

    def head_in(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.embed(batch[0])

    def tail(self, state: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        logits = self.head(self.norm(state)).flatten(0, 1)
        return nn.functional.cross_entropy(logits.float(), batch[1].flatten())

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        state = self.head_in(batch)
        for block in self.blocks:
            state = block(state)
        return self.tail(state, batch)


def network(seed: int = 0, dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Net(dropout=dropout).to(dtype)


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(9, (3, 6), generator=generator)
    return tokens, (tokens + 1) % 9


def groups(net: nn.Module) -> list[dict[str, Any]]:
    """Matrices decay, the rest does not."""
    parameters = [p for p in net.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1]},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0, "lr": 2e-3},
    ]


def train(optimizer: MeZO, net: Net, steps: range, kind: str = "plain", last: int = 250) -> list[Any]:
    """Projected gradients of steps with a rate that falls from step to step."""
    found = []
    for step in steps:
        for group, lr in zip(optimizer.param_groups, (1e-3, 2e-3), strict=True):
            group["lr"] = lr * (1.0 - step / last)
        data = batch(step)
        closure = ChainLoss(net, data) if kind == "chain" else lambda data=data: net(data)
        optimizer.step([closure, ChainLoss(net, batch(step + 1000))] if kind == "two" else closure)
        found.append(optimizer.projected_gradients)
    return found


def weights(net: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


OPTIONS = {"lr": 1e-3, "weight_decay": 0.1, "seed": 3}


@pytest.mark.parametrize(
    ("backend", "kind", "steps"),
    [("slots", "plain", 200), ("host", "chain", 200), ("host", "plain", 20), ("slots", "chain", 20)],
)
def test_steps_with_a_falling_rate_equal_those_of_mezo_bitwise(backend: str, kind: str, steps: int) -> None:
    plain, streamed = network(), network()
    mezo, zo2 = MeZO(groups(plain), **OPTIONS), ZO2(groups(streamed), **OPTIONS)
    zo2.attach(streamed, list(streamed.blocks), backend=BACKENDS[backend]())
    assert train(mezo, plain, range(steps)) == train(zo2, streamed, range(steps), kind)
    assert not equal(weights(plain), weights(streamed)), "the last update is pending"
    zo2.flush()
    assert equal(weights(plain), weights(streamed))
    assert not equal(weights(plain), weights(network()))
    zo2.detach()
    assert equal(weights(plain), weights(streamed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_number_types_equal_mezo_bitwise(dtype: torch.dtype) -> None:
    plain, streamed = network(dtype=dtype), network(dtype=dtype)
    mezo, zo2 = MeZO(groups(plain), **OPTIONS), ZO2(groups(streamed), **OPTIONS)
    zo2.attach(streamed, list(streamed.blocks), backend=SlotBackend("cpu"))
    assert train(mezo, plain, range(20)) == train(zo2, streamed, range(20))
    zo2.flush()
    assert equal(weights(plain), weights(streamed))
    assert not equal(weights(plain), weights(network(dtype=dtype)))


def test_several_directions_dropout_and_micro_batches_equal_mezo_bitwise() -> None:
    plain, streamed = network(dropout=0.3), network(dropout=0.3)
    mezo = MeZO(groups(plain), num_directions=3, **OPTIONS)
    zo2 = ZO2(groups(streamed), num_directions=3, **OPTIONS)
    zo2.attach(streamed, list(streamed.blocks), backend=SlotBackend("cpu"))
    found = []
    for optimizer, net in ((mezo, plain), (zo2, streamed)):
        torch.manual_seed(5)
        found.append(train(optimizer, net, range(6), "two"))
        found.append(torch.get_rng_state().tolist())
    zo2.flush()
    assert found[0] == found[2]
    assert found[1] == found[3]
    assert equal(weights(plain), weights(streamed))


def test_pending_update_keeps_the_rate_it_was_made_with() -> None:
    plain, streamed = network(), network()
    mezo, zo2 = MeZO(groups(plain), **OPTIONS), ZO2(groups(streamed), **OPTIONS)
    zo2.attach(streamed, list(streamed.blocks))
    for optimizer, net in ((mezo, plain), (zo2, streamed)):
        optimizer.step(ChainLoss(net, batch(0)))
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = 7.0, 5.0
    zo2.flush()
    assert equal(weights(plain), weights(streamed))


def save(net: nn.Module, zo2: ZO2) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "zo2": zo2.state_dict()}, file)
    file.seek(0)
    found: dict[str, Any] = torch.load(file, weights_only=True)
    return found


@pytest.mark.parametrize("host_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("flush", [False, True])
def test_resumed_run_equals_straight_run_bitwise(flush: bool, host_dtype: torch.dtype | None) -> None:
    """With the pending update in the checkpoint, or applied before it."""
    straight, first, second = network(), network(), network(seed=8)
    zo2 = ZO2(groups(straight), **OPTIONS)
    zo2.attach(straight, list(straight.blocks), host_dtype=host_dtype)
    gradients = train(zo2, straight, range(8))
    zo2.flush()

    half = ZO2(groups(first), **OPTIONS)
    half.attach(first, list(first.blocks), host_dtype=host_dtype)
    train(half, first, range(4))
    if flush:
        half.flush()
    saved = save(first, half)
    assert (saved["zo2"]["zeroth_order"]["pending"] is None) == flush

    other = ZO2(groups(second), **{**OPTIONS, "seed": 0})
    other.attach(second, list(second.blocks), host_dtype=host_dtype)
    second.load_state_dict(saved["net"])
    other.load_state_dict(saved["zo2"])
    assert train(other, second, range(4, 8)) == gradients[4:]
    other.flush()
    assert equal(weights(straight), weights(second))


@pytest.mark.parametrize("host_dtype", [torch.bfloat16, torch.float16])
def test_fewer_bits_on_the_host_are_rounded_alike_in_every_backend(host_dtype: torch.dtype) -> None:
    found = []
    for make in BACKENDS.values():
        net = network()
        zo2 = ZO2(groups(net), **OPTIONS)
        zo2.attach(net, list(net.blocks), backend=make(), host_dtype=host_dtype)
        train(zo2, net, range(10))
        zo2.flush()
        assert net.blocks[0].up.weight.dtype == host_dtype
        assert net.embed.weight.dtype == torch.float32
        found.append(weights(net))
        with zo2.gathered():
            assert net.blocks[0].up.weight.dtype == torch.float32
            net(batch(0))
        before = weights(net)
        zo2.step(ChainLoss(net, batch(0)))
        zo2.pending = None
        assert equal(before, weights(net)), "a step without its update rounds nothing"
    assert equal(*found)


def test_rounding_at_random_keeps_updates_below_half_a_unit() -> None:
    """The decay of one step is a 78th of the spacing of bfloat16 at 1."""
    net = nn.Sequential(nn.Linear(100, 100, bias=False))
    nn.init.ones_(net[0].weight)
    zo2 = ZO2(net.parameters(), lr=1e-6, weight_decay=100.0)
    zo2.attach(net, [net[0]], host_dtype=torch.bfloat16)
    for _ in range(20):
        zo2.step(lambda: net(torch.zeros(1, 100)).sum())
    zo2.flush()
    assert net[0].weight.float().mean().item() == pytest.approx((1 - 1e-4) ** 20, abs=3e-4)


def test_float32_on_the_host_of_a_bfloat16_network_keeps_every_update() -> None:
    net = network(dtype=torch.bfloat16)
    start = net.blocks[0].up.weight.detach().float()
    zo2 = ZO2(net.parameters(), lr=1e-7)
    zo2.attach(net, list(net.blocks), host_dtype=torch.float32)
    for _ in range(3):
        zo2.step(ChainLoss(net, batch(0)))
    zo2.flush()
    moved = (net.blocks[0].up.weight - start).abs()
    assert net.blocks[0].up.weight.dtype == torch.float32
    assert 0 < moved.max().item() < 1e-4
    with zo2.gathered():
        assert net.blocks[0].up.weight.dtype == torch.bfloat16


def test_frozen_blocks_and_parameters_stay() -> None:
    plain, streamed = network(), network()
    for net in (plain, streamed):
        net.blocks[1].requires_grad_(False)
        net.blocks[2].up.requires_grad_(False)
    mezo, zo2 = MeZO(groups(plain), **OPTIONS), ZO2(groups(streamed), **OPTIONS)
    zo2.attach(streamed, list(streamed.blocks), backend=SlotBackend("cpu"))
    found = [train(mezo, plain, range(5)), train(zo2, streamed, range(5))]
    zo2.flush()
    assert found[0] == found[1]
    assert equal(weights(plain), weights(streamed))
    assert equal(weights(streamed.blocks[1]), weights(network().blocks[1]))


def test_adapters_train_in_frozen_blocks_as_residents() -> None:
    """As with LoRA: the blocks pass by, and only what is on the device moves."""
    net = network()
    net.blocks.requires_grad_(False)
    zo2 = ZO2([net.norm.weight], lr=1e-2)
    zo2.attach(net, list(net.blocks), backend=SlotBackend("cpu"))
    zo2.step(ChainLoss(net, batch(0)))
    zo2.flush()
    assert not torch.equal(net.norm.weight, network().norm.weight)
    assert equal(weights(net.blocks), weights(network().blocks))


def test_evaluation_streams_the_weights_after_the_last_step() -> None:
    plain, streamed = network(), network()
    mezo, zo2 = MeZO(groups(plain), **OPTIONS), ZO2(groups(streamed), **OPTIONS)
    zo2.attach(streamed, list(streamed.blocks), backend=SlotBackend("cpu"))
    train(mezo, plain, range(3))
    train(zo2, streamed, range(3))
    assert zo2.run(lambda: {"loss": streamed(batch(7))})["loss"].item() == plain(batch(7)).item()
    assert zo2.run(ChainLoss(streamed, batch(7))).item() == plain(batch(7)).item()
    with zo2.gathered("cpu"):
        assert streamed(batch(7)).item() == plain(batch(7)).item()


@pytest.mark.parametrize("call", [1, 2, 5])
def test_a_failed_step_leaves_the_weights_after_the_one_before(call: int) -> None:
    plain, streamed = network(), network()
    mezo, zo2 = MeZO(groups(plain), **OPTIONS), ZO2(groups(streamed), **OPTIONS)
    zo2.attach(streamed, list(streamed.blocks), backend=SlotBackend("cpu"))
    train(mezo, plain, range(2))
    train(zo2, streamed, range(2))
    calls = []

    def fail(*_: Any) -> None:
        calls.append(None)
        if len(calls) == call:
            raise RuntimeError("broken")

    handles = [block.up.register_forward_hook(fail) for block in streamed.blocks]
    with pytest.raises(RuntimeError, match="broken"):
        zo2.step(lambda: streamed(batch(2)))
    for handle in handles:
        handle.remove()
    assert zo2.pending is None
    assert zo2.steps_done == 2
    assert equal(weights(plain), weights(streamed))
    assert train(mezo, plain, range(2, 4)) == train(zo2, streamed, range(2, 4))


def test_autocast_around_a_step_reaches_the_evaluations() -> None:
    plain, streamed = network(), network()
    mezo, zo2 = MeZO(groups(plain), **OPTIONS), ZO2(groups(streamed), **OPTIONS)
    zo2.attach(streamed, list(streamed.blocks))
    with torch.autocast("cpu", torch.bfloat16):
        found = [train(mezo, plain, range(3)), train(zo2, streamed, range(3))]
    assert found[0] == found[1]
    assert found[0] != train(MeZO(groups(fresh := network()), **OPTIONS), fresh, range(3))


class Odd(nn.Module):
    """Blocks called out of order, twice, in an order that depends on the batch, or from the outside."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(5, 5) for _ in range(4))

    def forward(self, order: list[int]) -> Tensor:
        x = torch.ones(2, 5)
        for number in order:
            x = self.blocks[number](x).tanh()
        return x.square().sum()


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_order_of_blocks_equals_mezo_bitwise(backend: str) -> None:
    """The order is only a guess: blocks may be skipped, repeated and swapped from step to step."""
    torch.manual_seed(0)
    plain, streamed = Odd(), Odd()
    streamed.load_state_dict(plain.state_dict())
    mezo, zo2 = MeZO(plain.parameters(), lr=1e-2), ZO2(streamed.parameters(), lr=1e-2)
    zo2.attach(streamed, list(streamed.blocks), backend=BACKENDS[backend]())
    for order in ([0, 1, 2, 3], [3, 1], [], [2, 2, 0, 2], [0, 1, 2, 3], [1]):
        mezo.step(lambda order=order: plain(order))
        zo2.step(lambda order=order: streamed(order))
        assert mezo.projected_gradients == zo2.projected_gradients
    zo2.flush()
    assert equal(weights(plain), weights(streamed))


def test_a_part_used_outside_of_its_block_is_named_and_may_be_resident() -> None:
    class Peeks(Net):
        def tail(self, state: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
            return super().tail(self.blocks[0].norm(state), batch)

    torch.manual_seed(0)
    plain, streamed = Peeks(), Peeks()
    streamed.load_state_dict(plain.state_dict())
    mezo, zo2 = MeZO(groups(plain), **OPTIONS), ZO2(groups(streamed), **OPTIONS)
    zo2.attach(streamed, list(streamed.blocks))
    with pytest.raises(ValueError, match=r"norm of block blocks\.0 is used outside of the block: pass that"):
        zo2.step(lambda: streamed(batch(0)))
    zo2.detach()
    zo2.attach(streamed, list(streamed.blocks), resident=[streamed.blocks[0].norm])
    assert train(mezo, plain, range(3)) == train(zo2, streamed, range(3))


def test_blocks_that_depend_on_the_weights_are_refused() -> None:
    net = nn.ModuleList([nn.Linear(1, 1, bias=False), nn.Linear(1, 1)])
    nn.init.zeros_(net[0].weight)
    zo2 = ZO2(net.parameters())
    zo2.attach(net, list(net))

    def loss() -> Tensor:
        x = net[0](torch.ones(1, 1))
        return (net[1](x) if x > 0 else x).sum()

    with pytest.raises(ValueError, match=r"call different blocks .*the end"):
        zo2.step(loss)
    assert net[0].weight.item() == 0.0


def test_wrong_uses_are_named() -> None:
    net = network()
    zo2 = ZO2(net.parameters())
    with pytest.raises(ValueError, match="no network: call attach"):
        zo2.step(lambda: net(batch(0)))
    with pytest.raises(ValueError, match=r"host_dtype is torch\.int8, allowed: torch\.float32"):
        zo2.attach(net, host_dtype=torch.int8)
    with pytest.raises(ValueError, match="block 1 is part of block 0"):
        zo2.attach(net, [net.blocks[0], net.blocks[0].up])
    with pytest.raises(ValueError, match=r"blocks \[0\] are not part of Net"):
        zo2.attach(net, [nn.Linear(2, 2)])
    with pytest.raises(ValueError, match="replay_rng is an option of MeZO"):
        ZO2(net.parameters(), replay_rng=False)
    zo2.attach(net)
    with pytest.raises(ValueError, match="a network already"):
        zo2.attach(net)
    with pytest.raises(ValueError, match="detach it before adding a group"):
        zo2.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    compiled = network()
    compiled.blocks[0].compile(backend="eager")
    with pytest.raises(ValueError, match=r"blocks\.0 is compiled"):
        ZO2(compiled.parameters()).attach(compiled)
