"""What holds for every registered optimizer: resume, low precision, gradients that are zero at first.

Shapes of the parameters: an embedding, matrices, a convolution, a norm, biases, a scalar.
"""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

from thalweg.core_optim.build import build
from thalweg.core_optim.config import OptimConfig, ScheduleConfig
from thalweg.core_optim.registry import names, optimizer_class

NAMES = names()
OPTIONS = {
    # every option that makes state of its own kind
    "adabelief": {"amsgrad": True},
    "sgd": {"momentum": 0.9},
    "sgdp": {"momentum": 0.9},
    "adammini": {"block": "rows"},
    "kron": {"preconditioner_update_probability": 0.5},
    "soap": {"precondition_frequency": 2},
    "frugal": {"update_gap": 2, "split": "coord"},
    "mfac": {"num_grads": 4, "damping": 0.1},
}


class Net(nn.Module):
    """One of each kind of parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.conv = nn.Conv1d(6, 4, 3, padding=1)
        self.first = nn.Linear(4, 8)
        self.second = nn.Linear(8, 5, bias=False)
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, 2)
        self.gain = nn.Parameter(torch.tensor(1.5))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.conv(self.embed(tokens).transpose(1, 2)).transpose(1, 2)
        x = self.norm(self.second(torch.tanh(self.first(x))))
        return self.head(x) * self.gain


def network(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(3)
    return Net().to(dtype)


def config(name: str, **more: object) -> OptimConfig:
    given = {"lr": 1e-2, "weight_decay": 0.0 if name == "scion" else 0.1, "options": OPTIONS.get(name, {})}
    return OptimConfig(name=name, schedule=ScheduleConfig(name="constant"), **{**given, **more})


def gradients(net: Net, step: int) -> None:
    """Gradients of a loss at a batch that depends on the step alone."""
    tokens = torch.randint(7, (4, 9), generator=torch.Generator().manual_seed(step))
    net.zero_grad()
    net(tokens).float().square().mean().backward()


def train(net: Net, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        gradients(net, step)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_three_and_three_steps_are_six_to_the_last_bit(name: str, dtype: torch.dtype) -> None:
    options = {**OPTIONS.get(name, {}), "stochastic_rounding": dtype == torch.bfloat16}
    made = config(name, options=options)
    straight = network(dtype)
    train(straight, build(straight, made, None)["optimizer"], range(6))

    first = network(dtype)
    optimizer = build(first, made, None)["optimizer"]
    train(first, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"net": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second = network(dtype)
    second.load_state_dict(saved["net"])
    optimizer = build(second, made, None)["optimizer"]
    optimizer.load_state_dict(saved["optimizer"])
    train(second, optimizer, range(3, 6))

    for (key, a), b in zip(straight.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b), key
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))


@pytest.mark.parametrize("name", NAMES)
def test_moments_of_half_precision_are_fp32_and_stay_so(name: str) -> None:
    """torch casts loaded state to the dtype of the parameter; see issue pytorch/pytorch#80809."""
    net = network(torch.bfloat16)
    optimizer = build(net, config(name), None)["optimizer"]
    train(net, optimizer, range(2))
    dtypes = [{k: v.dtype for k, v in optimizer.state[p].items()} for p in net.parameters()]
    assert all(torch.bfloat16 not in kinds.values() for kinds in dtypes)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert [{k: v.dtype for k, v in optimizer.state[p].items()} for p in net.parameters()] == dtypes


@pytest.mark.parametrize("name", NAMES)
def test_state_in_bf16_on_request(name: str) -> None:
    net = network()
    options = {**OPTIONS.get(name, {}), "state_dtype": "bfloat16", "stochastic_rounding": True}
    optimizer = build(net, config(name, options=options), None)["optimizer"]
    train(net, optimizer, range(4))
    moments = [
        v for s in optimizer.state.values() for k, v in s.items() if k.startswith(("exp_avg", "momentum"))
    ]
    assert all(m.dtype == torch.bfloat16 for m in moments)
    assert all(p.isfinite().all() for p in net.parameters())


class LowRank(nn.Module):
    """A frozen layer with an adapter whose B starts at zero, so that A gets no gradient at first."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(6, 5).requires_grad_(False)
        self.lora_A = nn.Linear(6, 2, bias=False)
        self.lora_B = nn.Linear(2, 5, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.lora_B(self.lora_A(x))


@pytest.mark.parametrize("name", NAMES)
def test_adapter_whose_first_gradients_are_zero_trains(name: str) -> None:
    """B gets no gradient either in the first three steps, as behind a gate that opens later."""
    torch.manual_seed(0)
    net = LowRank()
    optimizer = build(net, config(name, weight_decay=0.0, lr=RATES.get(name, 1e-2)), None)["optimizer"]
    x, y = torch.randn(32, 6), torch.randn(32, 5)
    before = net.lora_A.weight.detach().clone()
    losses = []
    for step in range(60):
        optimizer.zero_grad()
        loss = (net(x) - y).square().mean() * (step >= 3)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert all(p.isfinite().all() for p in net.parameters()), f"step {step}"
        if step == 2 and name not in SHRINKING:
            assert torch.equal(net.lora_A.weight, before)
    assert not torch.equal(net.lora_A.weight, before)
    assert losses[-1] < losses[3]


RATES = {"sgd": 0.1, "sgdp": 0.1, "sgdsai": 1e-2, "mfac": 0.01}
SHRINKING = ("scion",)
"""Rules that pull weights to zero whatever the gradient."""


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_none_leave_a_parameter_alone(name: str) -> None:
    net = network()
    optimizer = build(net, config(name), None)["optimizer"]
    before = net.second.weight.detach().clone()
    for step in range(3):
        gradients(net, step)
        net.second.weight.grad = None
        optimizer.step()
    assert torch.equal(net.second.weight, before)
    assert not optimizer.state.get(net.second.weight)


@pytest.mark.parametrize("name", NAMES)
def test_class_is_an_optimizer_of_torch_that_copies_and_pickles(name: str) -> None:
    import thalweg.core_optim as core_optim

    kind = optimizer_class(name)
    assert getattr(core_optim, kind.__name__) is kind
    weight = nn.Parameter(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
    optimizer = kind([("w", weight)], lr=1e-2)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups[0]["param_names"] == ["w"]
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert type(copied) is kind
        ours, theirs = optimizer.state_dict(), copied.state_dict()
        assert ours["state"].keys() == theirs["state"].keys()
        assert ours["param_groups"] == theirs["param_groups"]


@pytest.mark.parametrize("name", NAMES)
def test_ascent_is_descent_with_the_sign_changed(name: str) -> None:
    up, down = network(), network()
    options = OPTIONS.get(name, {})
    upwards = config(name, weight_decay=0.0, kernel="loop", options={**options, "maximize": True})
    ascending = build(up, upwards, None)["optimizer"]
    descending = build(down, config(name, weight_decay=0.0, kernel="loop"), None)["optimizer"]
    for step in range(3):
        gradients(down, step)
        for a, b in zip(up.parameters(), down.parameters()):
            a.grad = None if b.grad is None else -b.grad
        ascending.step()
        descending.step()
        for a, b in zip(up.parameters(), down.parameters()):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_everything_listed_can_be_imported() -> None:
    import thalweg.core_optim as core_optim

    listed = [name for name in dir(core_optim) if not name.startswith("_")]
    assert {"SOAP", "Muon", "SAM", "MeZO", "ZO2", "EMA", "CoreOptimizer"} <= set(listed)
    assert all(hasattr(core_optim, name) for name in listed)
    with pytest.raises(AttributeError, match="has no attribute 'SOAPS'"):
        _ = core_optim.SOAPS
