"""MeZO: golden trajectory, exactness on quadratics, replays, and steps that leave every bit in place."""

import copy
import io
import json
from typing import Any

import pytest
import torch
from golden import golden_files
from torch import Tensor, nn

from thalweg.core_optim.mezo import MeZO
from thalweg.core_optim.zeroth import GaussianDirections, rounded, stream

load_file = pytest.importorskip("safetensors.torch").load_file
GOLDEN = golden_files("optim", "mezo_*.safetensors")


def network(seed: int = 0, **kwargs: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 3)).to(
            **kwargs
        )


def batch_loss(net: nn.Module, step: int, dtype: torch.dtype = torch.float32) -> Any:
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step)).to(dtype)
    return lambda: (net(x) - x[:, :3].sin()).square().mean()


def weights(net: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


class Given:
    """Directions from a golden file."""

    def __init__(self, data: dict[str, Tensor], names: list[str]) -> None:
        self.data, self.names = data, names

    def draw(self, step: int, index: int, like: Tensor, sample: int = 0) -> Tensor:
        return self.data[f"z.{step}.{self.names[index]}"].to(like, copy=True)


@pytest.mark.skipif(not GOLDEN, reason="no golden data: set THALWEG_ORACLES")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_trajectory(path: Any, dtype: torch.dtype) -> None:
    entry = next(e for e in json.loads((path.parent / "index.json").read_text()) if e["file"] == path.name)
    data = load_file(path)
    h, m, b, a, c = (data[f"problem.{name}"].to(dtype) for name in "hMbAc")
    names = entry["params"]
    params = {name: nn.Parameter(data[f"param.{name}.init"].to(dtype)) for name in names}

    def loss() -> Tensor:
        x = torch.cat([params[name].flatten() for name in names])
        return 0.5 * (h * x * x).sum() + 0.5 * (m @ x).square().sum() - b @ x + (c * (a @ x).tanh()).sum()

    optimizer = MeZO(list(params.values()), directions=Given(data, names), **entry["kwargs"])
    exact = dtype == torch.float64
    for step in range(entry["steps"]):
        optimizer.step(loss)
        tolerance = 1e-6 if exact else entry["scalar_atol"]
        wanted = data[f"projected_grad.{step}"].item()
        assert optimizer.projected_gradient == pytest.approx(wanted, abs=tolerance)
        if exact:
            assert optimizer.loss_plus[0] == pytest.approx(data[f"loss_plus.{step}"].item(), abs=1e-6)
            assert optimizer.loss_minus[0] == pytest.approx(data[f"loss_minus.{step}"].item(), abs=1e-6)
        for name in names:
            wanted_p = data[f"param.{name}.{step}"].to(dtype)
            torch.testing.assert_close(
                params[name].detach(), wanted_p, rtol=entry["rtol"], atol=entry["atol"]
            )


@pytest.mark.parametrize("eps", [1e-4, 1e-2, 10.0])
def test_projected_gradient_of_a_quadratic_is_exact_for_any_eps(eps: float) -> None:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(7, 7, generator=generator, dtype=torch.float64)
    p = nn.Parameter(torch.randn(7, generator=generator, dtype=torch.float64))
    gradient = (h + h.T) @ p.detach()
    z = GaussianDirections(3).draw(0, 0, p)
    optimizer = MeZO([p], lr=0.0, eps=eps, seed=3)
    optimizer.step(lambda: p @ h @ p)
    assert optimizer.projected_gradient == pytest.approx((z @ gradient).item(), rel=1e-9, abs=1e-9)


def test_mean_over_directions_is_the_gradient() -> None:
    """E[(z . g) z] = g; the standard error over n draws is about |g| sqrt(2 / n)."""
    p = nn.Parameter(torch.zeros(5, dtype=torch.float64))
    gradient = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0], dtype=torch.float64)
    optimizer = MeZO([p], lr=1.0, eps=0.1, num_directions=1000)
    optimizer.step(lambda: p @ gradient)
    torch.testing.assert_close(
        -p.detach(), gradient, rtol=0.0, atol=4 * gradient.norm().item() * (2 / 1000) ** 0.5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rate_zero_leaves_every_bit_for_300_steps(dtype: torch.dtype) -> None:
    """+1, -2, +1 in place walks 7 % away in bfloat16."""
    net = network(dtype=dtype)
    before = weights(net)
    optimizer = MeZO(net.parameters(), lr=0.0, weight_decay=0.1)
    moved = []
    for step in range(300):
        optimizer.step(batch_loss(net, step, dtype))
        moved.append(optimizer.projected_gradient != 0.0)
    assert equal(before, weights(net))
    assert any(moved)


def test_bfloat16_follows_float32_on_average() -> None:
    """Updates far below half a unit in the last place: nearest rounding loses all of them."""
    start = torch.full((20000,), 1.0)

    def moved(stochastic: bool) -> float:
        p = nn.Parameter(start.to(torch.bfloat16))
        optimizer = MeZO([p], lr=1e-6, weight_decay=100.0, stochastic_rounding=stochastic)
        for _ in range(20):  # each step decays by 1e-4, a 78th of the spacing 2**-7 of bfloat16 at 1
            optimizer.step(lambda: p.float().sum() * 0.0)
        return p.detach().float().mean().item()

    assert moved(stochastic=False) == 1.0
    assert moved(stochastic=True) == pytest.approx((1 - 1e-4) ** 20, abs=2e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_takes_one_of_two_neighbours_and_is_unbiased(dtype: torch.dtype) -> None:
    values = torch.tensor([0.3, -0.3, 1.001, -1.001, 3e-8, -3e-8, 0.0, -1.0, 100.3])
    drawn = rounded(values.repeat(100_000, 1), dtype, stream("cpu", 0)).float()
    spacing = drawn.max(dim=0).values - drawn.min(dim=0).values
    assert (drawn.min(dim=0).values <= values).all()
    assert (drawn.max(dim=0).values >= values).all()
    for column, gap in zip(drawn.T, spacing, strict=True):
        assert column.unique().numel() == (1 if gap == 0 else 2)
    error = (drawn.double().mean(dim=0) - values.double()).abs()
    assert (error <= 4 * spacing * 0.5 / 100_000**0.5 + 1e-12).all()
    exact = torch.randn(1000).to(dtype)
    assert torch.equal(rounded(exact.float(), dtype, stream("cpu", 1)), exact)
    large = torch.tensor([3.4e38, -3.4e38])
    assert rounded(large, torch.float16, stream("cpu", 2)).tolist() == [65504.0, -65504.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_directions", [1, 2])
def test_resumed_run_equals_straight_run_bitwise(dtype: torch.dtype, num_directions: int) -> None:
    options = {"lr": 1e-3, "weight_decay": 0.1, "num_directions": num_directions}
    straight = network(dtype=dtype)
    optimizer = MeZO(straight.parameters(), seed=5, **options)
    for step in range(6):
        optimizer.step(batch_loss(straight, step, dtype))

    first = network(dtype=dtype)
    optimizer = MeZO(first.parameters(), seed=5, **options)
    for step in range(3):
        optimizer.step(batch_loss(first, step, dtype))
    file = io.BytesIO()
    torch.save({"net": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second = network(seed=9, dtype=dtype)
    second.load_state_dict(saved["net"])
    optimizer = MeZO(second.parameters(), seed=0, **options)
    optimizer.load_state_dict(saved["optimizer"])
    for step in range(3, 6):
        optimizer.step(batch_loss(second, step, dtype))
    assert equal(weights(straight), weights(second))
    assert not equal(weights(straight), weights(network(dtype=dtype)))


def test_it_lowers_a_loss() -> None:
    net = network()
    optimizer = MeZO(net.parameters(), lr=3e-2, num_directions=4)
    probe = batch_loss(net, 999)
    before = probe().item()
    for step in range(300):
        optimizer.step(batch_loss(net, step))
    assert probe().item() < 0.5 * before


def test_both_evaluations_have_the_same_dropout_and_the_stream_goes_on_once() -> None:
    net = nn.Sequential(nn.Linear(6, 64), nn.Dropout(0.5), nn.Linear(64, 1))
    x = torch.randn(4, 6)
    torch.manual_seed(1)
    net(x)
    after_one = torch.get_rng_state()
    seen = []
    net[1].register_forward_hook(lambda _, args, out: seen.append(out == 0))
    torch.manual_seed(1)
    MeZO(net.parameters(), num_directions=2).step(lambda: net(x).mean())
    assert len(seen) == 4
    assert all(torch.equal(mask, seen[0]) for mask in seen)
    assert torch.equal(torch.get_rng_state(), after_one)


def test_no_direction_comes_from_the_global_generator() -> None:
    results = []
    for seed in (1, 2):
        net = network()
        optimizer = MeZO(net.parameters(), lr=1e-3, seed=7)
        torch.manual_seed(seed)
        optimizer.step(batch_loss(net, 0))
        results.append(weights(net))
    assert equal(*results)


def test_losses_of_micro_batches_are_added() -> None:
    whole, parts = network(), network()
    first, second = batch_loss(whole, 0), batch_loss(whole, 1)
    MeZO(whole.parameters(), lr=1e-3).step(lambda: first() + second())
    MeZO(parts.parameters(), lr=1e-3).step([batch_loss(parts, 0), batch_loss(parts, 1)])
    for a, b in zip(weights(whole), weights(parts), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_frozen_parameters_stay_and_do_not_change_the_directions_of_others() -> None:
    free, partly = network(), network()
    partly[0].requires_grad_(False)
    before = weights(partly)
    for net in (free, partly):
        MeZO(net.parameters(), lr=1e-3, eps=1e-2).step(lambda net=net: net[4].weight.sum())
    assert equal(weights(partly)[:2], before[:2])
    assert torch.equal(free[4].weight, partly[4].weight)
    assert not torch.equal(partly[4].weight, before[4])


def test_tied_parameters_move_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight

    net = Tied()
    with torch.no_grad():
        net.a.weight.zero_()
    optimizer = MeZO(net.parameters(), lr=1.0, eps=0.5, seed=2)
    z = GaussianDirections(2).draw(0, 0, net.a.weight)
    optimizer.step(lambda: net.a.weight[0, 0])
    torch.testing.assert_close(net.b.weight.detach(), -z * z[0, 0])


def test_memory_that_two_parameters_share_is_refused() -> None:
    p = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="parameters 0 and 1 share memory"):
        MeZO([p, nn.Parameter(p.detach())])


def test_complex_parameters_are_pairs_of_real_ones() -> None:
    p = nn.Parameter(torch.tensor([1.0 + 2.0j, -1.0 + 0.5j], dtype=torch.complex128))
    optimizer = MeZO([p], lr=0.0, eps=0.1)
    z = GaussianDirections(0).draw(0, 0, torch.view_as_real(p.detach()))
    optimizer.step(lambda: p.abs().square().sum())
    gradient = 2.0 * torch.view_as_real(p.detach())
    assert optimizer.projected_gradient == pytest.approx((gradient * z).sum().item(), rel=1e-9)


def test_groups_have_their_own_decay_and_rate() -> None:
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = MeZO([{"params": [a]}, {"params": [b], "weight_decay": 0.0}], lr=0.1, weight_decay=0.5)
    optimizer.step(lambda: torch.zeros(()))
    torch.testing.assert_close(a.detach(), torch.full((3,), 0.95))
    assert torch.equal(b.detach(), torch.ones(3))


def test_weights_are_restored_if_the_closure_fails_or_the_loss_is_not_finite() -> None:
    net = network()
    before = weights(net)
    optimizer = MeZO(net.parameters(), lr=1e-3)
    calls = []

    def fails() -> Tensor:
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return batch_loss(net, 0)()

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(fails)
    with pytest.raises(ValueError, match=r"the loss at the shifted weights is \[nan, nan\] at step 0"):
        optimizer.step(lambda: torch.tensor(float("nan")))
    assert equal(before, weights(net))
    assert optimizer.steps_done == 0


def test_kept_weights_may_lie_elsewhere_and_copies_go_on_alike() -> None:
    net, other = network(), network()
    optimizer = MeZO(net.parameters(), lr=1e-3)
    elsewhere = MeZO(other.parameters(), lr=1e-3, snapshot_device="cpu")
    for step in range(2):
        optimizer.step(batch_loss(net, step))
        elsewhere.step(batch_loss(other, step))
    assert equal(weights(net), weights(other))
    copied, twin = copy.deepcopy((net, optimizer))
    optimizer.step(batch_loss(net, 2))
    twin.step(batch_loss(copied, 2))
    assert equal(weights(net), weights(copied))


def test_one_region_of_autocast_around_a_step_does_not_hide_the_shift() -> None:
    """Autocast keeps casts of weights while its region lasts: the second evaluation would be the first."""
    inside, outside = network(), network()
    first = MeZO(inside.parameters(), eps=1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        inside(torch.zeros(1, 6))  # fills the cache
        first.step(batch_loss(inside, 0))
        assert torch.is_autocast_cache_enabled()
    second = MeZO(outside.parameters(), eps=1e-2)

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return batch_loss(outside, 0)()

    second.step(loss)
    assert first.projected_gradient != 0.0
    assert first.projected_gradients == second.projected_gradients


def test_no_gradient_is_made() -> None:
    net = network()
    MeZO(net.parameters()).step(batch_loss(net, 0))
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 0.0}, "eps is 0.0, allowed: a number > 0"),
        ({"num_directions": 0}, "num_directions is 0"),
        ({"lr": -1.0}, "lr of group 0 is -1.0"),
        ({"weight_decay": -1.0}, "weight_decay of group 0 is -1.0"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MeZO([nn.Parameter(torch.zeros(2))], **options)


def test_bad_closures_are_named() -> None:
    optimizer = MeZO([nn.Parameter(torch.zeros(2))])
    with pytest.raises(ValueError, match=r"MeZO\.step needs a closure"):
        optimizer.step()
    with pytest.raises(ValueError, match=r"the closure returned shape \(2,\)"):
        optimizer.step(lambda: torch.zeros(2))
    with pytest.raises(ValueError, match="no state of MeZO"):
        optimizer.load_state_dict({"state": {}, "param_groups": []})
