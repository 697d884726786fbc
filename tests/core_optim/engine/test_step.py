"""A step as torch.optim has it: closures, hooks, rates in tensors, groups, zero gradients, scalers."""

import functools
from typing import Any

import pytest
import torch
from optim_cases import Case, element_rules, gradients, make, matrix_rules, weights, written
from torch import Tensor, nn

from thalweg.core_optim import registry
from thalweg.core_optim.engine import update
from thalweg.core_optim.engine.optimizer import CoreOptimizer

Named = dict[str, nn.Parameter]


def fresh() -> Named:
    return {k: nn.Parameter(v) for k, v in weights().items()}


def advance(optimizer: CoreOptimizer, named: Named, steps: int = 3) -> None:
    for step in range(steps):
        for name, g in gradients(step).items():
            named[name].grad = g
        optimizer.step()


def moved(named: Named) -> dict[str, Tensor]:
    return {name: p.detach() - start for (name, p), start in zip(named.items(), weights().values())}


def run(rule: str, **options: Any) -> Named:
    named = fresh()
    advance(make(Case(rule), named.items(), **options), named)
    return named


MOVES_WITHOUT_GRADIENT = ("scion",)
"""Scion's constrained steps shrink weights towards the centre of its ball."""


@pytest.mark.parametrize("rule", written())
def test_zero_gradients_without_decay_move_nothing(rule: str) -> None:
    options = {"weight_decay": 0.0} if "weight_decay" in registry.rule(rule).options else {}
    if "weight_decay_1d" in registry.rule(rule).options:
        options["weight_decay_1d"] = 0.0
    named = fresh()
    optimizer = make(Case(rule, options), named.items())
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    for _ in range(3):
        for p in named.values():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    for name, change in moved(named).items():
        assert bool(change.isfinite().all()), name
        if rule not in MOVES_WITHOUT_GRADIENT:
            assert not change.any(), name


@pytest.mark.parametrize("rule", written())
def test_rate_of_zero_moves_nothing(rule: str) -> None:
    named = fresh()
    decay = None if rule == "schedulefree_adamw" else "independent"
    optimizer = make(Case(rule), named.items(), decay=decay, weight_decay=0.5)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    advance(optimizer, named)
    for change in moved(named).values():
        assert bool((change.abs() <= 1e-6).all())


@pytest.mark.parametrize("rule", written())
def test_step_returns_what_the_closure_does_with_gradients_on(rule: str) -> None:
    named = fresh()
    optimizer = make(Case(rule), named.items())
    seen = []

    def closure() -> Tensor:
        seen.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = sum((p.square().sum() for p in named.values()), torch.zeros(()))
        loss.backward()
        return loss

    with torch.no_grad():
        first = optimizer.step(closure)
        second = optimizer.step(closure)
    assert seen == [True, True]
    assert first.item() > 0.0
    assert bool(second.isfinite())
    assert all(p.requires_grad and p.is_leaf and p.grad_fn is None for p in named.values())
    assert all(not value.requires_grad for state in optimizer.state.values() for value in state.values())
    assert optimizer.step() is None


@pytest.mark.parametrize("rule", written())
def test_gradients_are_not_changed(rule: str) -> None:
    named = fresh()
    optimizer = make(Case(rule), named.items(), maximize=True, cautious=rule != "schedulefree_adamw")
    for step in range(2):
        for name, g in gradients(step).items():
            named[name].grad = g
        versions = {name: p.grad._version for name, p in named.items()}
        optimizer.step()
        for name, g in gradients(step).items():
            assert torch.equal(named[name].grad, g)
            assert named[name].grad._version == versions[name]


@pytest.mark.parametrize("rule", written())
def test_autograd_sees_that_weights_changed(rule: str) -> None:
    assert_seen(fresh(), rule)


def test_autograd_sees_what_compiled_kernels_change(monkeypatch: pytest.MonkeyPatch) -> None:
    update.compiled.cache_clear()
    monkeypatch.setattr(update.torch, "compile", functools.partial(torch.compile, backend="eager"))
    assert_seen({"odd": fresh()["odd"]}, "lion", compile=True)
    update.compiled.cache_clear()


def assert_seen(named: Named, rule: str, **options: Any) -> None:
    optimizer = make(Case(rule), named.items(), **options)
    loss = sum((p**3).sum() for p in named.values())
    for p in named.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("rule", written())
def test_rate_in_a_tensor_is_the_number(rule: str) -> None:
    number, tensor = run(rule, lr=0.0078125), run(rule, lr=torch.tensor(0.0078125))
    for name, p in number.items():
        assert torch.equal(p, tensor[name])


def test_rate_in_a_tensor_may_change_and_travels() -> None:
    named, other = fresh(), fresh()
    rate = torch.tensor(0.1)
    optimizer = make(Case("adamw"), named.items(), lr=rate)
    plain = make(Case("adamw"), other.items(), lr=0.1)
    for value in (0.1, 0.05):
        rate.fill_(value)
        plain.param_groups[0]["lr"] = rate.item()
        advance(optimizer, named, 1)
        advance(plain, other, 1)
    for name, p in named.items():
        assert torch.equal(p, other[name])
    saved = optimizer.state_dict()
    again = make(Case("adamw"), fresh().items())
    again.load_state_dict(saved)
    assert again.param_groups[0]["lr"] == rate


@pytest.mark.parametrize("rule", written())
def test_schedulers_of_torch_drive_the_rate(rule: str) -> None:
    named, other = fresh(), fresh()
    scheduled = make(Case(rule), named.items(), lr=0.01)
    by_hand = make(Case(rule), other.items(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(scheduled, lambda step: 1.0 / (1 + step))
    for step in range(3):
        for group in by_hand.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) / (1 + step)
        for some, optimizer in ((named, scheduled), (other, by_hand)):
            for name, g in gradients(step).items():
                some[name].grad = g
            optimizer.step()
        scheduler.step()
    for name, p in named.items():
        assert torch.equal(p, other[name])


@pytest.mark.parametrize("rule", element_rules())
def test_groups_go_at_their_own_rates(rule: str) -> None:
    """Two groups move as two optimizers do."""
    options = [{"lr": 0.01, "weight_decay": 0.1}, {"lr": 0.05, "weight_decay": 0.0}]
    together, apart = fresh(), fresh()
    names = [["odd", "vector"], ["conv", "short", "single", "even"]]
    groups = [{"params": [(n, together[n]) for n in some], **o} for some, o in zip(names, options)]
    advance(registry.create(rule, groups), together)
    for some, o in zip(names, options):
        advance(registry.create(rule, [(n, apart[n]) for n in some], **o), apart)
    for name, p in together.items():
        assert torch.equal(p, apart[name])


def test_hooks_of_steps_run() -> None:
    named = fresh()
    optimizer = make(Case("lion"), named.items())
    order: list[str] = []
    handles = [
        optimizer.register_step_pre_hook(lambda *_: order.append("before")),
        optimizer.register_step_post_hook(lambda *_: order.append("after")),
    ]
    advance(optimizer, named, 1)
    for handle in handles:
        handle.remove()
    advance(optimizer, named, 1)
    assert order == ["before", "after"]


def test_hooks_of_state_dicts_run() -> None:
    named = fresh()
    optimizer = make(Case("lion"), named.items())
    advance(optimizer, named, 1)
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "note": 1})
    saved = optimizer.state_dict()
    assert saved["note"] == 1
    other = make(Case("lion"), named.items())
    other.load_state_dict(saved)
    assert torch.equal(other.state[named["odd"]]["exp_avg"], optimizer.state[named["odd"]]["exp_avg"])


@pytest.mark.parametrize("rule", written())
def test_scaler_of_torch_unscales_and_skips(rule: str) -> None:
    plain, scaled = fresh(), fresh()
    reference, optimizer = make(Case(rule), plain.items()), make(Case(rule), scaled.items())
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(3):
        for name, g in gradients(step).items():
            plain[name].grad = g
            scaled[name].grad = g * 8.0
        reference.step()
        scaler.scale(torch.ones(()))
        scaler.step(optimizer)
        scaler.update()
    for name, p in plain.items():
        assert torch.equal(p, scaled[name])
    before = {name: p.detach().clone() for name, p in scaled.items()}
    for p in scaled.values():
        p.grad = torch.full_like(p, float("inf"))
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 4.0
    for name, p in scaled.items():
        assert torch.equal(p, before[name])


def test_parameters_that_join_late_count_their_own_steps() -> None:
    """A parameter without gradients at first moves as one of an optimizer made later."""
    named, alone = fresh(), fresh()
    optimizer = make(Case("adamw"), named.items())
    for step in range(4):
        for name, g in gradients(step).items():
            named[name].grad = None if name == "odd" and step < 2 else g
        optimizer.step()
    later = make(Case("adamw"), [("odd", alone["odd"])])
    for step in range(2, 4):
        alone["odd"].grad = gradients(step)["odd"]
        later.step()
    assert torch.equal(named["odd"], alone["odd"])
    assert optimizer.state[named["odd"]]["step"] == 2
    assert optimizer.state[named["even"]]["step"] == 4


@pytest.mark.parametrize("rule", matrix_rules())
def test_matrix_rules_see_all_of_a_group_at_once(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also parameters of several dtypes and steps, as long as they are computed in one dtype."""
    calls: list[int] = []
    found = registry.rule(rule)
    update = found.update
    monkeypatch.setattr(
        found, "update", lambda items, *rest: calls.append(len(items)) or update(items, *rest)
    )
    named = [(str(d), nn.Parameter(torch.ones(4, 6, dtype=d))) for d in (torch.float32, torch.bfloat16)]
    optimizer = make(Case(rule), named)
    for step in range(2):
        for i, (_, p) in enumerate(named):
            p.grad = torch.ones_like(p) if i >= step else None
        optimizer.step()
    assert calls == [2, 1]


@pytest.mark.parametrize("rule", written())
def test_steps_repeat_to_the_last_bit(rule: str) -> None:
    torch.manual_seed(1)
    one = run(rule)
    torch.manual_seed(2)
    two = run(rule)
    for name, p in one.items():
        assert torch.equal(p, two[name])


@pytest.mark.parametrize("rule", written())
def test_global_generator_is_left_alone(rule: str) -> None:
    named = fresh()
    optimizer = make(Case(rule), named.items())
    before = torch.get_rng_state()
    advance(optimizer, named)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("rule", written())
def test_way_downhill_is_found(rule: str) -> None:
    """The loss of a small regression falls."""
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = make(Case(rule), net.named_parameters())
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (net(x) - x[:, :1] * x[:, 1:2]).square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert min(losses[1:]) < losses[0]
