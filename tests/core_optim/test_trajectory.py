"""Trajectory losses and their store: zero at the past, the stated gradients, nothing without a past."""

import io
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax, softmax

from thalweg.core_optim.engine.random import mix
from thalweg.core_optim.trajectory import (
    distance_to_past,
    is_active,
    kl_to_past,
    replay,
    squared_to_past,
    streams_of,
)
from thalweg.core_optim.trajectory_store import TrajectoryStore


def outputs(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("kind", ["kl", "squared"])
def test_at_the_past_loss_and_gradient_are_zero(kind: Any) -> None:
    now = outputs(0, 4, 6).requires_grad_()
    loss = distance_to_past(kind, now, now.detach().clone())
    loss.backward()
    assert loss.abs().item() < 1e-16
    assert now.grad is not None
    assert now.grad.abs().max().item() < 1e-16


@pytest.mark.parametrize("tau", [1.0, 5.0])
def test_the_divergence_and_its_gradient(tau: float) -> None:
    """L = tau^2 KL(past || now) / B as torch computes it; dL/dz = tau (softmax now - softmax past) / B."""
    now, past = outputs(1, 4, 6).requires_grad_(), outputs(2, 4, 6)
    loss = kl_to_past(now, past, tau=tau)
    loss.backward()
    logs = (log_softmax(z / tau, dim=1) for z in (now, past))
    expected = tau**2 * kl_div(*logs, reduction="batchmean", log_target=True)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-14)
    slope = tau * (softmax(now.detach() / tau, 1) - softmax(past / tau, 1)) / 4
    torch.testing.assert_close(now.grad, slope, rtol=1e-12, atol=1e-14)


def test_a_shift_of_all_logits_is_no_difference() -> None:
    now = outputs(1, 4, 6)
    assert kl_to_past(now, now + 3.0).abs().item() < 1e-14
    assert kl_to_past(now.float(), 1e4 * outputs(2, 4, 6).float()).isfinite()


def test_the_squared_difference_and_its_gradient() -> None:
    now, past = outputs(1, 4, 2, 3, 3).requires_grad_(), outputs(2, 4, 2, 3, 3)
    loss = squared_to_past(now, past)
    loss.backward()
    assert loss.item() == pytest.approx(float((now.detach() - past).square().sum() / 72), rel=1e-14)
    torch.testing.assert_close(now.grad, 2 * (now.detach() - past) / 72, rtol=1e-13, atol=1e-15)


def test_dense_labels_are_averaged_over_places() -> None:
    now, past = outputs(1, 4, 6, 5), outputs(2, 4, 6, 5)
    single = torch.stack([kl_to_past(now[..., i], past[..., i]) for i in range(5)]).mean()
    torch.testing.assert_close(kl_to_past(now, past), single, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("kind", ["kl", "squared"])
def test_rows_without_a_past_count_exactly_nothing(kind: Any) -> None:
    """Whatever they hold; the mean is still over the whole batch."""
    now, past = outputs(1, 4, 6).requires_grad_(), outputs(2, 4, 6)
    valid = torch.tensor([True, False, True, False])
    past[1], past[3] = torch.nan, torch.inf
    loss = distance_to_past(kind, now, past, valid)
    loss.backward()
    half = distance_to_past(kind, now.detach()[valid], past[valid])
    torch.testing.assert_close(loss.detach(), half / 2, rtol=1e-12, atol=0.0)
    assert now.grad is not None
    assert now.grad[~valid].abs().max().item() == 0.0
    assert now.grad[valid].abs().min().item() > 0.0
    nothing = distance_to_past(kind, now.detach(), past, torch.zeros(4, dtype=torch.bool))
    assert nothing.item() == 0.0


def test_it_is_inactive_up_to_the_start_and_from_the_end() -> None:
    assert [is_active(epoch, 5) for epoch in (0, 5, 6, 100)] == [False, False, True, True]
    assert [is_active(epoch, 2, 5) for epoch in range(7)] == [False, False, False, True, True, False, False]


def test_every_draw_is_recorded_once_and_compared_once() -> None:
    """And the two epochs of a draw are `lag` apart, as the store has it."""
    for lag in (1, 2, 3):
        found: dict[int, list[tuple[int, bool]]] = {}
        for epoch in range(8 * lag):
            now = replay(epoch, lag)
            found.setdefault(now.key, []).append((epoch, now.compares))
        assert list(found) == list(range(4 * lag))
        for (first, recorded), (second, compares) in found.values():
            assert (recorded, compares, second - first) == (False, True, lag)


def test_draws_depend_on_the_sample_and_not_on_its_place() -> None:
    def draws(index: list[int], key: int = 4, seed: int = 0) -> list[float]:
        streams = streams_of(torch.tensor(index), key, seed)
        return [float(torch.rand((), generator=stream)) for stream in streams]

    seven, three, nine = draws([7, 3, 9])
    assert draws([9, 7]) == [nine, seven]
    assert len({seven, three, nine, *draws([7], key=5), *draws([7], seed=1)}) == 5
    assert mix(1, 23) != mix(12, 3)


def test_the_ring_gives_back_what_was_written_lag_epochs_ago() -> None:
    store = TrajectoryStore(10, (2,), lag=3)
    for epoch in range(12):
        order = torch.randperm(10, generator=torch.Generator().manual_seed(epoch))
        past, valid = store.read(order, epoch)
        assert valid.all() == (epoch >= 3)
        if epoch >= 3:
            assert torch.equal(past, torch.stack([order.float(), torch.full((10,), epoch - 3.0)], dim=1))
        store.write(order, torch.stack([order.float(), torch.full((10,), float(epoch))], dim=1), epoch)


def test_rows_that_were_left_out_have_no_past() -> None:
    """Neither one that was never written nor one of an earlier turn of the ring."""
    store = TrajectoryStore(4, (1,), lag=1)
    everyone = torch.arange(4)
    store.write(everyone[:3], torch.ones(3, 1), 0)
    _, valid = store.read(everyone, 1)
    assert valid.tolist() == [True, True, True, False]
    store.write(everyone[1:], torch.ones(3, 1), 2)  # slot of epoch 0; sample 0 was left out
    past, valid = store.read(everyone, 3)
    assert valid.tolist() == [False, True, True, True]
    assert past[0].item() == 0.0
    assert not store.read(everyone, 2)[1].any()


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("float16", 2), ("bfloat16", 2)])
def test_outputs_are_kept_in_the_precision_asked_for(dtype: Any, size: int) -> None:
    store = TrajectoryStore(3, (4,), lag=2, dtype=dtype)
    assert store.nbytes == 3 * 3 * (4 * size + 8)
    values = torch.tensor([[1.0, 1e6, -1e6, 0.1]])
    store.write(torch.tensor([1]), values, 0)
    past, valid = store.read(torch.tensor([1]), 2)
    assert valid.all()
    kind = getattr(torch, dtype)
    limits = torch.finfo(kind)
    assert torch.equal(past, values.clamp(limits.min, limits.max).to(kind).float())


def test_a_continued_store_is_the_same() -> None:
    store, other = (TrajectoryStore(5, (2, 2), lag=2, dtype="float16") for _ in range(2))
    for epoch in range(3):
        store.write(torch.arange(5), outputs(epoch, 5, 2, 2, dtype=torch.float32), epoch)
    file = io.BytesIO()
    torch.save(store.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for epoch in (3, 4):
        one, two = (s.read(torch.tensor([4, 0]), epoch) for s in (store, other))
        assert torch.equal(one[0], two[0])
        assert torch.equal(one[1], two[1])
        assert one[1].all()


def test_what_is_refused() -> None:
    store = TrajectoryStore(4, (2,))
    with pytest.raises(ValueError, match="sample 4 is not in the store, allowed: 0 to 3"):
        store.write(torch.tensor([4]), torch.zeros(1, 2), 0)
    with pytest.raises(ValueError, match="sample -1 is not in the store"):
        store.read(torch.tensor([-1]), 0)
    with pytest.raises(ValueError, match=r"outputs have shape \(1, 3\), needed: \(B, \*\(2,\)\)"):
        store.write(torch.tensor([0]), torch.zeros(1, 3), 0)
    with pytest.raises(ValueError, match="dtype of the store is 'int8', allowed: float32"):
        TrajectoryStore(4, (2,), dtype="int8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"have shape \(4, 5, 2\), needed: \(4, 4, 2\)"):
        store.load_state_dict(TrajectoryStore(5, (2,)).state_dict())
    with pytest.raises(ValueError, match="kind of the trajectory loss is 'l1', allowed: kl, squared"):
        distance_to_past("l1", torch.zeros(1, 2), torch.zeros(1, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"tau is 0\.0, allowed: a number > 0"):
        kl_to_past(torch.zeros(1, 2), torch.zeros(1, 2), tau=0.0)
    with pytest.raises(ValueError, match=r"past outputs have shape \(1, 3\), present ones \(1, 2\)"):
        squared_to_past(torch.zeros(1, 2), torch.zeros(1, 3))
