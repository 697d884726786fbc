"""Averages of weights: closed forms, the integral of a profile, and any profile from snapshots of two."""

import io
import math
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

from thalweg.core_optim.ema import EMA, PowerEMA
from thalweg.core_optim.power_ema import (
    LARGEST_STD,
    Snapshot,
    coefficients,
    distance,
    gamma_of,
    product,
    reconstruct,
    std_of,
)


class Wander(nn.Module):
    """Weights that move on a known path."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3, dtype=dtype))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("count", torch.tensor(0))

    def go(self, t: int) -> Tensor:
        with torch.no_grad():
            self.w.copy_(self.place(t))
            self.mean.fill_(float(t))
            self.count.fill_(t)
        return self.w.detach().double().clone()

    @staticmethod
    def place(t: int) -> Tensor:
        noise = torch.randn(3, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
        return torch.tensor([math.log1p(t), math.cos(t / 40), 1.0]).double() + 0.1 * noise


def test_the_average_is_the_closed_form() -> None:
    """With constant d: a_n = d^(n-1) w_1 + (1 - d) sum_k d^(n-k) w_k."""
    net = Wander(torch.float64)
    ema = EMA(net, 0.8, warmup=False)
    places = []
    for t in range(1, 8):
        places.append(net.go(t))
        ema.update(net)
    expected = 0.8**6 * places[0] + 0.2 * sum(0.8 ** (7 - k) * places[k - 1] for k in range(2, 8))
    torch.testing.assert_close(ema.average["w"], expected, rtol=1e-13, atol=1e-13)


def test_the_decay_warms_up_and_updates_are_counted() -> None:
    net = Wander(torch.float64)
    ema = EMA(net, 0.5, update_every=3)
    expected = net.w.detach().clone()
    for t in range(1, 40):
        place = net.go(t)
        ema.update(net)
        if t % 3 == 0:
            n = t // 3
            keep = min(0.5, (1 + n) / (10 + n))
            expected = keep * expected + (1 - keep) * place
    assert (ema.step, ema.updates) == (39, 13)
    torch.testing.assert_close(ema.average["w"], expected, rtol=1e-12, atol=1e-12)


def test_half_precision_weights_are_averaged_in_float32() -> None:
    """Steps of (1 - d) (w - a) = 0.001 would be lost in bfloat16, where numbers near 1 are 0.008 apart."""
    net = Wander(torch.bfloat16)
    with torch.no_grad():
        net.w.fill_(1.0)
    ema = EMA(net, 0.999, warmup=False)
    ema.update(net)
    with torch.no_grad():
        net.w.fill_(2.0)
    for _ in range(100):
        ema.update(net)
    assert ema.average["w"].dtype == torch.float32
    torch.testing.assert_close(ema.average["w"], torch.full((3,), 2 - 0.999**100), rtol=1e-5, atol=0.0)


def test_what_is_averaged() -> None:
    net = Wander()
    assert list(EMA(net).average) == ["w"]
    ema = EMA(net, 0.5, warmup=False, buffers=True)
    for t in (1, 2):
        net.go(t)
        ema.update(net)
    assert sorted(ema.average) == ["count", "mean", "w"]
    assert ema.average["mean"].tolist() == [1.5, 1.5]
    assert ema.average["count"].item() == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_averages_are_swapped_in_and_weights_come_back(dtype: torch.dtype) -> None:
    net = Wander(dtype)
    ema = EMA(net, 0.9)
    for t in range(5):
        net.go(t)
        ema.update(net)
    before, held = net.w.detach().clone(), ema.average["w"].clone()
    with ema.swap(net):
        assert torch.equal(net.w, held.to(dtype))
    assert torch.equal(net.w, before)
    assert torch.equal(ema.average["w"], held)
    with pytest.raises(RuntimeError, match="interrupted"):
        fail_inside(ema, net)
    assert torch.equal(net.w, before)
    ema.copy_to(net)
    assert torch.equal(net.w, held.to(dtype))


def fail_inside(ema: EMA, net: Wander) -> None:
    with ema.swap(net):
        raise RuntimeError("interrupted")


@pytest.mark.parametrize("kind", ["ema", "power"])
def test_a_continued_average_is_the_whole_one(kind: str) -> None:
    def made(net: Wander) -> EMA | PowerEMA:
        return EMA(net, 0.7, update_every=2, device="cpu") if kind == "ema" else PowerEMA(net, device="cpu")

    def run(net: Wander, average: EMA | PowerEMA, steps: range) -> None:
        for t in steps:
            net.go(t)
            average.update(net)

    net = Wander()
    whole, first = made(net), made(net)
    run(net, whole, range(9))
    run(net, first, range(5))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    net.go(99)
    second = made(net)
    second.load_state_dict(torch.load(file, weights_only=True))
    run(net, second, range(5, 9))
    if isinstance(whole, EMA):
        assert isinstance(second, EMA)
        assert torch.equal(whole.average["w"], second.average["w"])
        assert whole.step == second.step == 9
    else:
        assert isinstance(second, PowerEMA)
        pairs = zip(whole.averages, second.averages, strict=True)
        assert all(torch.equal(one["w"], other["w"]) for one, other in pairs)


@pytest.mark.parametrize("std", [0.01, 0.05, 0.1, 0.2, LARGEST_STD])
def test_the_exponent_has_the_standard_deviation_asked_for(std: float) -> None:
    """Also by integration of the profile over [0, 1]."""
    gamma = gamma_of(std)
    assert std_of(gamma) == pytest.approx(std, rel=1e-12)
    tau = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    p = (gamma + 1) * tau**gamma / 200_000
    mean = (p * tau).sum()
    assert float((p * (tau - mean) ** 2).sum().sqrt()) == pytest.approx(std, rel=1e-6)


def test_published_exponents() -> None:
    """Karras et al. 2024: gamma is 16.97 and 6.94 for the tracked 0.05 and 0.10."""
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.005)
    assert gamma_of(0.10) == pytest.approx(6.94, abs=0.005)


@pytest.mark.parametrize("times", [range(1, 31), (2.5, 3.0, 7.0, 20.0)])
def test_the_recursion_is_the_integral_of_the_profile(times: Iterable[float]) -> None:
    """Weights of (t_{k-1}, t_k] count with the integral over it, (t_k^(g+1) - t_{k-1}^(g+1)) / T^(g+1)."""
    net = Wander(torch.float64)
    power = PowerEMA(net, (0.05, 0.2))
    places, edges = [], [0.0]
    for t in times:
        places.append(net.go(int(t)))
        edges.append(float(t))
        power.update(net, t)
    for gamma, average in zip(power.gammas, power.averages):
        expected = sum(
            (edges[k + 1] ** (gamma + 1) - edges[k] ** (gamma + 1)) / edges[-1] ** (gamma + 1) * place
            for k, place in enumerate(places)
        )
        torch.testing.assert_close(average["w"], expected, rtol=1e-11, atol=1e-11)


def test_inner_products_are_integrals() -> None:
    tau = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 100_000

    def profile(gamma: float, time: float) -> Tensor:
        return torch.where(tau <= time, (gamma + 1) * tau**gamma / time ** (gamma + 1), 0.0)

    for one, other in [((0.0, 1.0), (6.94, 4.0)), ((16.97, 3.0), (6.94, 2.0)), ((5.0, 4.0), (5.0, 4.0))]:
        integral = float((profile(*one) * profile(*other)).sum() / 100_000)
        assert product(one, other) == pytest.approx(integral, rel=1e-4)
        assert product(one, other) == product(other, one)


def snapshots(steps: int, every: int, wanted: tuple[float, ...]) -> tuple[list[Snapshot], list[Tensor]]:
    """Snapshots of two profiles along a run, and directly tracked averages at its end."""
    net = Wander(torch.float64)
    power, direct = PowerEMA(net, (0.05, 0.1)), PowerEMA(net, wanted)
    kept = []
    for t in range(1, steps + 1):
        net.go(t)
        power.update(net)
        direct.update(net)
        if t % every == 0:
            for gamma, average in zip(power.gammas, power.averages):
                copy = {name: w.clone() for name, w in average.items()}
                kept.append(Snapshot(gamma=gamma, time=t, read=lambda copy=copy: copy))
    return kept, [average["w"] for average in direct.averages]


def test_other_profiles_are_found_afterwards() -> None:
    """The error falls with the number of snapshots; a tracked profile is found exactly."""
    wanted = (0.05, 0.075, 0.15, 0.25)
    errors = []
    for every in (400, 100, 25):
        kept, direct = snapshots(400, every, wanted)
        found = [reconstruct(kept, std=std)["w"] for std in wanted]
        errors.append([float((a - b).norm() / b.norm()) for a, b in zip(found, direct)])
    assert all(row[0] < 1e-9 for row in errors)
    for coarse, fine in zip(errors[0][1:], errors[2][1:]):
        assert fine < 0.5 * coarse
    assert max(errors[2][:3]) < 1e-4
    assert errors[2][3] < 1e-2  # a profile this wide reaches back before the first snapshot


def test_earlier_averages_use_earlier_snapshots_only() -> None:
    kept, _ = snapshots(200, 50, (0.1,))
    profiles = [(s.gamma, s.time) for s in kept]
    wanted = (gamma_of(0.12), 150.0)
    shares = coefficients(profiles, wanted)
    assert all(share == 0.0 for share, (_, time) in zip(shares.tolist(), profiles) if time > 150)
    assert distance(profiles, shares, wanted) < 0.1
    assert float(shares.sum()) == pytest.approx(1.0, abs=1e-12)
    nudge = 1e-3 * torch.randn(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    nudged = shares.clone()
    nudged[:6] += nudge - nudge.mean()
    assert distance(profiles, nudged, wanted) > distance(profiles, shares, wanted)


def test_what_is_refused() -> None:
    net = Wander()
    with pytest.raises(ValueError, match=r"decay of the average is 1\.0, allowed: 0 <= decay < 1"):
        EMA(net, 1.0)
    with pytest.raises(ValueError, match="update_every is 0"):
        EMA(net, update_every=0)
    with pytest.raises(ValueError, match=r"std of the profile is 0\.3, allowed: 0 < std <= 0\.2887"):
        PowerEMA(net, (0.3,))
    with pytest.raises(ValueError, match=r"\[0\.1, 0\.1\], needed: some, and no two alike"):
        PowerEMA(net, (0.1, 0.1))
    with pytest.raises(ValueError, match="'bias' is not averaged"):
        EMA(net).update(nn.Linear(2, 2))
    power = PowerEMA(net)
    power.update(net, 5)
    with pytest.raises(ValueError, match=r"time of the average is 4\.0, allowed: any after 5\.0"):
        power.update(net, 4)
    with pytest.raises(ValueError, match=r"tracks the profiles \[0\.05, 0\.1\], not \[0\.2\]"):
        PowerEMA(net, (0.2,)).load_state_dict(power.state_dict())
    with pytest.raises(ValueError, match="no snapshot up to time 3, the first is at 5"):
        reconstruct([Snapshot(gamma=7.0, time=5.0, read=dict)], std=0.1, time=3)
