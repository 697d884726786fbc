"""State dicts: dtypes survive, runs continue bit by bit, torch's AdamW loads, other rules are refused."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from optim_cases import Case, cases, gradients, make, weights, written
from torch import Tensor, nn

from thalweg.core_optim import registry
from thalweg.core_optim.engine.optimizer import CoreOptimizer

CASES = {case.label: case for case in cases()}
Named = dict[str, nn.Parameter]


def fresh(dtype: torch.dtype = torch.float32) -> Named:
    return {k: nn.Parameter(v) for k, v in weights(dtype=dtype).items()}


def advance(optimizer: Any, named: Named, steps: range) -> None:
    for step in steps:
        for name, g in gradients(step).items():
            named[name].grad = g.to(named[name].dtype)
        optimizer.step()


def through_a_file(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def assert_same(a: Named, b: Named) -> None:
    for name in a:
        assert torch.equal(a[name], b[name]), name


def assert_same_state(a: CoreOptimizer, b: CoreOptimizer) -> None:
    one, two = a.state_dict(), b.state_dict()
    assert one["param_groups"] == two["param_groups"]
    assert one["state"].keys() == two["state"].keys()
    for number, state in one["state"].items():
        assert state.keys() == two["state"][number].keys()
        for name, value in state.items():
            other = two["state"][number][name]
            assert value.dtype == other.dtype, name
            assert torch.equal(value, other), name


@pytest.mark.parametrize("label", CASES)
def test_three_steps_a_file_and_three_steps_are_six(label: str) -> None:
    case, dtype = CASES[label], torch.bfloat16
    whole, resumed = fresh(dtype), fresh(dtype)
    optimizer = make(case, whole.items())
    advance(optimizer, whole, range(6))
    first = make(case, resumed.items())
    advance(first, resumed, range(3))
    saved = through_a_file(first.state_dict())
    # the weights of the other run must not help
    after = {k: nn.Parameter(p.detach().clone()) for k, p in resumed.items()}
    second = make(case, after.items())
    second.load_state_dict(saved)
    assert_same_state(first, second)
    advance(second, after, range(3, 6))
    assert_same(after, whole)
    assert_same_state(second, optimizer)


@pytest.mark.parametrize("rule", written())
def test_moments_of_bf16_weights_stay_in_fp32(rule: str) -> None:
    named = fresh(torch.bfloat16)
    optimizer = make(Case(rule), named.items())
    advance(optimizer, named, range(2))
    other = make(Case(rule), named.items())
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            assert value.dtype != torch.bfloat16, name
            loaded = other.state[parameter][name]
            assert loaded.dtype == value.dtype
            assert torch.equal(loaded, value)
            assert loaded.data_ptr() != value.data_ptr() or value.numel() == 0


def test_integers_flags_and_bytes_keep_their_dtype() -> None:
    named = fresh(torch.bfloat16)
    optimizer = make(Case("adamw"), named.items())
    advance(optimizer, named, range(1))
    kept = {
        "counter": torch.tensor(2**40 + 1),
        "mask": torch.tensor([True, False]),
        "bytes": torch.tensor([1, 255], dtype=torch.uint8),
        "double": torch.tensor(1.0 / 3.0, dtype=torch.float64),
    }
    optimizer.state[named["odd"]] |= kept
    other = make(Case("adamw"), named.items())
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    for name, value in kept.items():
        loaded = other.state[named["odd"]][name]
        assert loaded.dtype == value.dtype
        assert torch.equal(loaded, value)


def test_loading_copies() -> None:
    named = fresh()
    optimizer = make(Case("adamw"), named.items())
    advance(optimizer, named, range(1))
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved)
    other = make(Case("adamw"), named.items())
    other.load_state_dict(saved)
    advance(other, named, range(1, 3))
    for number, state in saved["state"].items():
        for name, value in state.items():
            assert torch.equal(value, before["state"][number][name])


@pytest.mark.parametrize("foreach", [False, True])
def test_state_of_torch_adamw_continues(foreach: bool) -> None:
    theirs, ours = fresh(), fresh()
    reference = torch.optim.AdamW(theirs.values(), lr=3e-3, weight_decay=0.1, foreach=False)
    advance(reference, theirs, range(3))
    for name, p in ours.items():
        p.data.copy_(theirs[name])
    optimizer = registry.create("adamw", ours.values(), lr=1.0, foreach=foreach)
    optimizer.load_state_dict(through_a_file(reference.state_dict()))
    assert optimizer.param_groups[0]["lr"] == 3e-3
    assert optimizer.param_groups[0]["rule"] == "adamw"
    assert "amsgrad" not in optimizer.param_groups[0]
    advance(reference, theirs, range(3, 6))
    advance(optimizer, ours, range(3, 6))
    for name, p in ours.items():
        torch.testing.assert_close(p, theirs[name], rtol=1e-6, atol=1e-8)


def test_group_of_another_rule_is_refused_and_nothing_changes() -> None:
    named = fresh()
    saved = make(Case("lion"), named.items())
    advance(saved, named, range(1))
    optimizer = make(Case("adamw", {"lr": 0.5}), named.items())
    advance(optimizer, named, range(1))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="group 0 was saved with the rule 'lion', and is now 'adamw'"):
        optimizer.load_state_dict(saved.state_dict())
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert after["state"][0].keys() == before["state"][0].keys()


def test_other_groups_are_refused() -> None:
    named = fresh()
    saved = make(Case("adamw"), named.items())
    optimizer = registry.create("adamw", [{"params": [p]} for p in named.values()])
    with pytest.raises(ValueError, match="parameter groups"):
        optimizer.load_state_dict(saved.state_dict())


def test_options_come_from_the_checkpoint_with_their_types() -> None:
    named = fresh()
    saved = make(Case("adamw", {"lr": 0.25, "betas": (0.5, 0.75)}), named.items()).state_dict()
    saved["param_groups"][0]["betas"] = [0.5, 0.75]  # as JSON gives it back
    del saved["param_groups"][0]["stochastic_rounding"]  # as a version without it would
    optimizer = make(Case("adamw", {"stochastic_rounding": True}), named.items())
    optimizer.load_state_dict(saved)
    group = optimizer.param_groups[0]
    assert group["lr"] == 0.25
    assert group["betas"] == (0.5, 0.75)
    assert group["stochastic_rounding"] is True


@pytest.mark.parametrize("rule", written())
def test_copies_continue_alike(rule: str) -> None:
    """Deep copies and pickles, in the middle of a run."""
    named = fresh()
    optimizer = make(Case(rule), named.items())
    advance(optimizer, named, range(2))
    copies = [copy.deepcopy((named, optimizer)), pickle.loads(pickle.dumps((named, optimizer)))]
    advance(optimizer, named, range(2, 4))
    for other_named, other in copies:
        assert type(other) is type(optimizer)
        assert other.random.seed == optimizer.random.seed
        advance(other, other_named, range(2, 4))
        assert_same(other_named, named)


def test_names_of_parameters_travel() -> None:
    named = fresh()
    saved = make(Case("adamw"), named.items()).state_dict()
    assert saved["param_groups"][0]["param_names"] == list(named)
    assert isinstance(next(iter(named.values())), Tensor)


def test_state_of_another_class_is_refused() -> None:
    named = fresh()
    sgd = torch.optim.SGD(named.values(), lr=0.1, momentum=0.9)
    advance(sgd, named, range(1))
    with pytest.raises(ValueError, match="momentum_buffer and no 'exp_avg', so it is not of 'adamw'"):
        make(Case("adamw"), named.items()).load_state_dict(sgd.state_dict())
    ours = make(Case("sgd", {"momentum": 0.5}), named.items())
    ours.load_state_dict(sgd.state_dict())
    assert ours.param_groups[0]["momentum"] == 0.9


def test_step_that_is_no_tensor_is_taken() -> None:
    named = fresh()
    saved = make(Case("adamw"), named.items())
    advance(saved, named, range(2))
    state = saved.state_dict()
    for one in state["state"].values():
        one["step"] = 2
    other = make(Case("adamw"), named.items())
    other.load_state_dict(state)
    assert torch.equal(other.state[named["odd"]]["step"], torch.tensor(2.0))


def test_hooks_see_and_change_what_is_loaded() -> None:
    named = fresh(torch.bfloat16)
    saved = make(Case("adamw"), named.items())
    advance(saved, named, range(1))
    other = make(Case("adamw"), named.items())
    seen = []

    def double(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        moments = {i: {**s, "exp_avg": 2 * s["exp_avg"]} for i, s in state["state"].items()}
        return {**state, "state": moments}

    other.register_load_state_dict_pre_hook(double)
    other.register_load_state_dict_post_hook(lambda o: seen.append(o.state[named["odd"]]["exp_avg"].clone()))
    for _ in range(2):
        other.load_state_dict(saved.state_dict())
    assert len(seen) == 2
    assert torch.equal(seen[0], 2 * saved.state[named["odd"]]["exp_avg"])
