"""SAM and ASAM: stored trajectories, the step on a quadratic, weights that come back to the last bit."""

import copy
import io
import json
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from golden import golden_files, golden_roots
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LambdaLR

from thalweg.core_optim.sam import SAM, frozen_statistics
from thalweg.core_optim.shards import norm_of

FILES = [*golden_files("optim", "sam_*.safetensors"), *golden_files("optim", "asam_*.safetensors")]
BASES = {"SGD": {"lr": 0.05, "momentum": 0.9}, "AdamW": {"lr": 0.01, "weight_decay": 0.01}}
Step = Callable[[], Tensor]


def entry(name: str) -> dict[str, Any]:
    for root in golden_roots("optim"):
        for found in json.loads((root / "index.json").read_text()):
            if found["file"] == name:
                return dict(found)
    raise AssertionError(name)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_stored_trajectories(path: Any) -> None:
    facts, data = entry(path.name), load_file(path)
    h, m, b, a, c = (data[f"problem.{name}"] for name in "hMbAc")
    names = facts["params"]
    params = [nn.Parameter(data[f"param.{name}.init"].clone()) for name in names]
    optimizer = SAM(params, **facts["kwargs"])

    def closure() -> Tensor:
        x = torch.cat([p.flatten() for p in params])
        wells = (c * torch.tanh(a @ x)).sum()
        loss = 0.5 * (h * x * x).sum() + 0.5 * (m @ x).square().sum() - b @ x + wells
        optimizer.zero_grad()
        loss.backward()
        return loss

    close = {"rtol": facts["rtol"], "atol": facts["atol"]}
    for t in range(facts["steps"]):
        loss = optimizer.step(closure)
        torch.testing.assert_close(loss.double(), data[f"loss.{t}"].squeeze(), rtol=1e-5, atol=1e-5)
        for name, parameter in zip(names, params):
            torch.testing.assert_close(parameter.data, data[f"param.{name}.{t}"], **close)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Dropout(0.5), nn.Linear(8, 2))


def batch(step: int, size: int = 8) -> Tensor:
    return torch.randn(size, 3, generator=torch.Generator().manual_seed(step))


def closure_of(net: nn.Module, x: Tensor, parts: int = 1) -> Step:
    def closure() -> Tensor:
        loss: Tensor = net(x).square().mean() / parts
        loss.backward()
        return loss

    return closure


def train(net: nn.Module, optimizer: Any, steps: range, schedule: LambdaLR | None = None) -> list[float]:
    losses = []
    for step in steps:
        torch.manual_seed(step)
        losses.append(float(optimizer.step(closure_of(net, batch(step)))))
        if schedule is not None:
            schedule.step()
    return losses


def weights(net: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_step_on_a_quadratic(adaptive: bool) -> None:
    """x+ = x - lr H (x + e), with e = rho H x / |H x|, or rho x^2 H x / ||x| H x|."""
    generator = torch.Generator().manual_seed(1)
    root = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    hessian = root @ root.T
    x = nn.Parameter(torch.randn(5, generator=generator, dtype=torch.float64))
    expected = x.detach().clone()
    optimizer = SAM([x], "SGD", {"lr": 0.01}, rho=0.3, adaptive=adaptive)
    for _ in range(5):
        slope = hessian @ expected
        move = expected.square() * slope if adaptive else slope
        move = move / ((expected.abs() * slope).norm() if adaptive else slope.norm())
        expected = expected - 0.01 * hessian @ (expected + 0.3 * move)

        def closure() -> Tensor:
            loss = 0.5 * x @ hessian @ x
            loss.backward()
            return loss

        optimizer.step(closure)
        torch.testing.assert_close(x.detach(), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("base", BASES)
def test_with_rho_zero_it_is_the_base(base: str) -> None:
    plain, sharp = (network().eval() for _ in range(2))
    optimizer = SAM(sharp.parameters(), base, BASES[base], rho=0.0)
    reference = type(optimizer.base)(plain.parameters(), **BASES[base])
    for step in range(4):
        reference.zero_grad()
        closure_of(plain, batch(step))()
        reference.step()
        optimizer.step(closure_of(sharp, batch(step)))
    assert same(weights(plain), weights(sharp))
    assert not same(weights(plain), weights(network()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_come_back_to_the_last_bit(dtype: torch.dtype) -> None:
    net = network().to(dtype)
    before, seen = weights(net), []
    optimizer = SAM(net.parameters(), "SGD", {"lr": 0.0}, rho=0.7)

    def closure() -> Tensor:
        seen.append(weights(net))
        loss: Tensor = net(batch(0).to(dtype)).square().mean()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    assert same(weights(net), before)
    assert not same(seen[1], before)
    away = torch.stack([(a.double() - b.double()).norm() for a, b in zip(seen[1], before)]).norm()
    assert float(away) == pytest.approx(0.7, rel=1e-5 if dtype == torch.float32 else 0.02)


def test_weights_come_back_when_the_second_evaluation_fails() -> None:
    net = network()
    before = weights(net)
    optimizer = SAM(net.parameters(), "SGD", {"lr": 0.1})
    calls = []

    def closure() -> Tensor:
        calls.append(weights(net))
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return closure_of(net, batch(0))()

    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(closure)
    assert not same(calls[1], before)
    assert same(weights(net), before)


def test_a_list_of_closures_is_the_big_batch() -> None:
    whole, parts = (network().double().eval() for _ in range(2))
    optimizers = [SAM(net.parameters(), "AdamW", BASES["AdamW"], rho=0.5) for net in (whole, parts)]
    for step in range(3):
        x = batch(step, 12).double()
        once = optimizers[0].step(closure_of(whole, x))
        several = optimizers[1].step([closure_of(parts, micro, 3) for micro in x.chunk(3)])
        torch.testing.assert_close(once, several)
    for one, other in zip(weights(whole), weights(parts)):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_the_loss_is_that_of_the_weights_themselves() -> None:
    net = network().eval()
    optimizer = SAM(net.parameters(), "SGD", {"lr": 0.1}, rho=0.5)
    losses: list[float] = []

    def closure() -> Tensor:
        loss = closure_of(net, batch(0))()
        losses.append(loss.item())
        return loss

    assert float(optimizer.step(closure)) == losses[0] < losses[1]
    assert float(optimizer.loss) == losses[0]


def test_the_second_evaluation_leaves_statistics_alone_and_can_draw_the_same() -> None:
    net = network()
    plain = copy.deepcopy(net)
    optimizer = SAM(net.parameters(), "SGD", {"lr": 0.0}, model=net, replay_random=True)
    inputs: list[Tensor] = []
    net[3].register_forward_hook(lambda _, __, out: inputs.append(out == 0.0))
    torch.manual_seed(3)
    optimizer.step(closure_of(net, batch(0)))
    after = torch.rand(3)
    assert torch.equal(inputs[0], inputs[1])
    torch.manual_seed(3)
    closure_of(plain, batch(0))()
    assert torch.equal(after, torch.rand(3))
    for one, other in zip(net.buffers(), plain.buffers(), strict=True):
        assert torch.equal(one, other)
    assert net[1].track_running_stats
    with frozen_statistics(net):
        net(batch(1))
    assert torch.equal(net[1].running_mean, plain[1].running_mean)


def test_groups_have_radii_of_their_own_and_share_the_norm() -> None:
    first, second = (nn.Parameter(torch.tensor([value])) for value in (3.0, 4.0))
    groups = [{"params": [first], "rho": 0.0}, {"params": [second], "lr": 0.2}]
    optimizer = SAM(groups, "SGD", {"lr": 0.1}, rho=1.0)
    places = []

    def closure() -> Tensor:
        places.append((first.item(), second.item()))
        loss = 0.5 * (first.square() + second.square()).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert places[1] == pytest.approx((3.0, 4.0 + 4.0 / 5.0))
    assert first.item() == pytest.approx(3.0 - 0.1 * 3.0)
    assert second.item() == pytest.approx(4.0 - 0.2 * 4.8)
    assert norm_of([], []).item() == 0.0


def test_maximising_looks_down_the_slope() -> None:
    x = nn.Parameter(torch.tensor([1.0]))
    optimizer = SAM([x], "SGD", {"lr": 0.1, "maximize": True}, rho=0.5)
    places = []

    def closure() -> Tensor:
        places.append(x.item())
        loss = -0.5 * (x - 3.0).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert places == [1.0, 0.5]
    assert x.item() == pytest.approx(1.25)


@pytest.mark.parametrize("base", BASES)
def test_a_resumed_run_is_the_whole_one(base: str) -> None:
    def made(seed: int) -> tuple[nn.Module, SAM, LambdaLR]:
        net = network(seed)
        optimizer = SAM(net.parameters(), base, BASES[base], adaptive=True, rho=0.5, model=net)
        return net, optimizer, LambdaLR(optimizer, lambda step: 1.0 / (1 + step))

    whole, optimizer, schedule = made(0)
    train(whole, optimizer, range(6), schedule)
    first, optimizer, schedule = made(0)
    train(first, optimizer, range(3), schedule)
    file = io.BytesIO()
    parts = {
        "net": first.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
    }
    torch.save(parts, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    second, optimizer, schedule = made(7)
    second.load_state_dict(loaded["net"])
    optimizer.load_state_dict(loaded["optimizer"])
    schedule.load_state_dict(loaded["schedule"])
    assert optimizer.param_groups is optimizer.base.param_groups
    assert optimizer.state is optimizer.base.state
    train(second, optimizer, range(3, 6), schedule)
    assert same(weights(whole), weights(second))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(BASES[base]["lr"] / 7)


def test_it_can_take_over_from_a_base_alone() -> None:
    net = network()
    alone = AdamW(net.parameters(), lr=0.01)
    closure_of(net, batch(0))()
    alone.step()
    optimizer = SAM(net.parameters(), AdamW, {"lr": 0.5}, rho=0.2)
    optimizer.load_state_dict(alone.state_dict())
    assert optimizer.param_groups[0]["rho"] == 0.2
    assert optimizer.param_groups[0]["lr"] == 0.01
    around = SAM(None, alone, rho=0.3)
    assert around.base is alone
    assert alone.param_groups[0]["rho"] == 0.3


@pytest.mark.parametrize("base", ["adabelief", "Lion", "schedulefree_adamw", "Adagrad", torch.optim.RMSprop])
def test_any_optimizer_can_be_the_base(base: Any) -> None:
    net = nn.Sequential(nn.Linear(3, 8, bias=False), nn.GELU(), nn.Linear(8, 2, bias=False))
    optimizer = SAM(net.parameters(), base, {"lr": 0.02}, rho=0.05)
    losses = train(net, optimizer, range(20))
    assert float(closure_of(net, batch(0))().detach()) < 0.7 * losses[0]
    assert optimizer.state is optimizer.base.state


@pytest.mark.parametrize("base", ["SGD", SGD])
def test_a_copy_is_an_optimizer_of_its_own(base: Any) -> None:
    net = network()
    optimizer = SAM(net.parameters(), base, BASES["SGD"])
    train(net, optimizer, range(2))
    other = copy.deepcopy(optimizer)
    assert other.param_groups is other.base.param_groups is not optimizer.param_groups
    assert other.state is other.base.state
    extra = nn.Parameter(torch.ones(2))
    other.add_param_group({"params": [extra], "rho": 0.9})
    assert len(other.base.param_groups) == 2 != len(optimizer.param_groups)
    assert other.param_groups[1]["rho"] == 0.9
    assert other.param_groups[1]["momentum"] == 0.9
    assert "SAM" in repr(other)


def test_contexts_surround_the_second_evaluation_only() -> None:
    net = network()
    events: list[str] = []

    @contextmanager
    def around() -> Any:
        events.append("in")
        yield
        events.append("out")

    def closure() -> Tensor:
        events.append("evaluate")
        return closure_of(net, batch(0))()

    SAM(net.parameters(), "SGD", BASES["SGD"], around_second=[around]).step(closure)
    assert events == ["evaluate", "in", "evaluate", "out"]


def test_what_it_refuses() -> None:
    net = network()
    optimizer = SAM(net.parameters(), "SGD", {"lr": 0.1})
    for nothing in (None, []):
        with pytest.raises(ValueError, match="needs a closure"):
            optimizer.step(nothing)
    with pytest.raises(ValueError, match="neither a loss nor a gradient"):
        optimizer.step(lambda: None)
    with pytest.raises(ValueError, match=r"rho of group with 6 parameters is -1, allowed: a number >= 0"):
        SAM(net.parameters(), "SGD", {"lr": 0.1}, rho=-1)
    with pytest.raises(ValueError, match="base is 'Optimizer', allowed: adabelief, "):
        SAM(net.parameters(), "Optimizer")
    with pytest.raises(ValueError, match="exists already"):
        SAM(net.parameters(), SGD(net.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="params is empty"):
        SAM([])
    table = nn.Embedding(4, 2, sparse=True)
    optimizer = SAM(table.parameters(), "SGD", {"lr": 0.1})
    with pytest.raises(ValueError, match=r"shape \(4, 2\) is sparse"):
        optimizer.step(closure_of(table, torch.tensor([1])))


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_step_reads_nothing_back_from_the_device(adaptive: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    net = network()
    optimizer = SAM(net.parameters(), SGD, BASES["SGD"], adaptive=adaptive, model=net)

    def refuse(*_: Any) -> None:
        raise AssertionError("a value was read")

    for name in ("item", "tolist", "__float__", "__bool__", "cpu", "numpy"):
        monkeypatch.setattr(Tensor, name, refuse)
    optimizer.step(closure_of(net, torch.ones(4, 3)))


def test_a_step_at_rate_zero_makes_the_state_for_a_distributed_checkpoint() -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    net = nn.Linear(3, 2)
    optimizer = SAM(net.parameters(), base="adamw", base_kwargs={"lr": 1e-3})
    before = [p.detach().clone() for p in net.parameters()]
    state = get_optimizer_state_dict(net, optimizer)["state"]
    assert set(state) == {"weight", "bias"}
    assert {"exp_avg", "exp_avg_sq", "step"} <= set(state["weight"])
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters()))
    with pytest.raises(ValueError, match="needs a closure"):
        optimizer.step()
