"""What follows from the formulas of the element rules, without reference data."""

import math

import pytest
import torch
from torch import Tensor, nn

import thalweg.core_optim as core_optim
from thalweg.core_optim.engine.optimizer import CoreOptimizer

SHAPES = [(6, 4), (5,), (3, 2, 2, 2), ()]


def parameters(seed: int = 0, dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=dtype)) for s in SHAPES]


def follow(
    optimizer: torch.optim.Optimizer, steps: int = 8, seed: int = 1, scale: float = 1.0
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for _ in range(steps):
        for p in params:
            p.grad = scale * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        optimizer.step()
    return [p.detach() for p in params]


def assert_equal(a: list[Tensor], b: list[Tensor], atol: float = 1e-12) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=atol)


def make(name: str, **options: object) -> CoreOptimizer:
    return getattr(core_optim, name)(parameters(), **options)


@pytest.mark.parametrize("kernel", ["loop", "foreach", "fused"])
def test_adamw_is_that_of_torch(kernel: str) -> None:
    reference = torch.optim.AdamW(parameters(), lr=0.1, weight_decay=0.2, foreach=False)
    assert_equal(follow(make("AdamW", lr=0.1, weight_decay=0.2, kernel=kernel)), follow(reference), 1e-14)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_that_of_torch(nesterov: bool) -> None:
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.2, "nesterov": nesterov}
    assert_equal(follow(make("SGD", **options)), follow(torch.optim.SGD(parameters(), **options)), 1e-14)


def test_nadamw_is_not_torch_nadam() -> None:
    """torch's momentum schedule makes it another algorithm, also without its decay."""
    ours = follow(make("NAdamW", lr=1e-2, weight_decay=0.0))
    torch_nadam = follow(torch.optim.NAdam(parameters(), lr=1e-2, momentum_decay=0.0))
    assert max((a - b).abs().max() for a, b in zip(ours, torch_nadam)) > 1e-3


def test_first_step_of_adabelief() -> None:
    """The mean follows the gradient, so the residual is beta1 g; eps enters twice."""
    optimizer = make("AdaBelief", lr=0.1, eps=1e-6, rectify=False)
    before = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    after = follow(optimizer, steps=1)
    for p, old, new in zip(optimizer.param_groups[0]["params"], before, after):
        variance = 0.9**2 * p.grad**2 + 1e-6 / (1 - 0.999)
        torch.testing.assert_close(new, old - 0.1 * p.grad / (variance.sqrt() + 1e-6), rtol=1e-12, atol=1e-15)


def test_variance_of_a_constant_gradient_is_the_accumulated_eps() -> None:
    weight = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = core_optim.AdaBelief([weight], lr=0.0, eps=1e-4, betas=(0.5, 0.9), rectify=False)
    for _ in range(200):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    expected = 1e-4 * (1 - 0.9**200) / (1 - 0.9)
    torch.testing.assert_close(
        optimizer.state[weight]["exp_avg_var"], torch.full_like(weight, expected), rtol=1e-6, atol=0
    )


def test_constant_gradient_halves_the_steps_of_diffgrad() -> None:
    weight, other = (nn.Parameter(torch.zeros(4, dtype=torch.float64)) for _ in range(2))
    optimizer = core_optim.DiffGrad([weight], lr=1e-2, eps=1e-16)
    half = core_optim.AdamW([other], lr=5e-3, eps=1e-16, weight_decay=0.0)
    for step in range(5):
        weight.grad = other.grad = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64)
        old, old_other = weight.detach().clone(), other.detach().clone()
        optimizer.step()
        half.step()
        if step > 0:
            torch.testing.assert_close(weight - old, other - old_other, rtol=1e-12, atol=0)


def test_previous_gradients_are_copies() -> None:
    """In-place changes of ``p.grad`` after a step, as zero_grad(set_to_none=False) makes, do no harm."""
    for name in ("DiffGrad", "MARS"):
        plain, changed = make(name, lr=1e-2), make(name, lr=1e-2)
        generator = torch.Generator().manual_seed(0)
        for _ in range(4):
            for a, b in zip(plain.param_groups[0]["params"], changed.param_groups[0]["params"]):
                a.grad = torch.randn(a.shape, generator=generator, dtype=torch.float64)
                b.grad = a.grad.clone()
            plain.step()
            changed.step()
            changed.zero_grad(set_to_none=False)
        assert_equal([*plain.param_groups[0]["params"]], [*changed.param_groups[0]["params"]], 0.0)


def test_adamp_without_threshold_is_adamw() -> None:
    options = {"lr": 0.1, "weight_decay": 0.1}
    assert_equal(follow(make("AdamP", delta=0.0, **options)), follow(make("AdamW", **options)), 1e-14)


def test_projected_steps_are_orthogonal_to_rows() -> None:
    weight = nn.Parameter(torch.randn(8, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    optimizer = core_optim.AdamP([weight], lr=1e-3, delta=100.0)
    for step in range(5):
        weight.grad = torch.randn(8, 16, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        old = weight.detach().clone()
        optimizer.step()
        cosine = torch.cosine_similarity(weight.detach() - old, old, dim=1)
        assert cosine.abs().max() < 1.6e-6


def test_sgdp_does_not_project_its_momentum() -> None:
    """The released code does, through an alias, unless nesterov is on."""
    weight = nn.Parameter(torch.randn(4, 5, generator=torch.Generator().manual_seed(0)))
    optimizer = core_optim.SGDP([weight], lr=0.1, momentum=0.9, delta=100.0)
    expected = torch.zeros_like(weight)
    for step in range(4):
        weight.grad = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        optimizer.step()
        expected = 0.9 * expected + weight.grad
        torch.testing.assert_close(optimizer.state[weight]["momentum_buffer"], expected)


def test_ratio_of_sgdsai_does_not_see_the_scale_and_waits_for_a_gradient() -> None:
    ratios = []
    for scale in (1.0, 1e3):
        optimizer = make("SGDSaI", lr=1e-3, eps=1e-300)
        follow(optimizer, scale=scale)
        ratios.append(torch.stack([optimizer.state[p]["gsnr"] for p in optimizer.param_groups[0]["params"]]))
    torch.testing.assert_close(ratios[0], ratios[1], rtol=1e-6, atol=0)
    assert ratios[0][-1] == 1.0  # a single number has no spread

    weight = nn.Parameter(torch.ones(6))
    optimizer = core_optim.SGDSaI([weight], lr=1e-2, weight_decay=0.0)
    for gradient in (torch.zeros(6), torch.zeros(6), torch.arange(6.0)):
        weight.grad = gradient
        optimizer.step()
    assert optimizer.state[weight]["gsnr"] == pytest.approx(55**0.5 / 3.5**0.5, rel=1e-6)
    assert (weight != 1.0).sum() == 5


def test_normalised_ratios_are_at_most_one() -> None:
    """The paper's algorithm 1 divides by the largest ratio: a step of the plain code at lr / max."""
    plain, normalised = make("SGDSaI", lr=1e-2), make("SGDSaI", lr=1e-2, normalize=True)
    follow(plain, steps=1)
    largest = max(float(plain.state[p]["gsnr"]) for p in plain.param_groups[0]["params"])
    scaled = make("SGDSaI", lr=1e-2 / largest, weight_decay=1e-2 * largest)
    assert_equal(follow(normalised), follow(scaled), 1e-9)


def test_every_step_of_lion_has_one_size() -> None:
    optimizer = make("Lion", lr=1e-2)
    before = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    for old, new in zip(before, follow(optimizer, steps=1)):
        torch.testing.assert_close((new - old).abs(), torch.full_like(old, 1e-2), rtol=1e-12, atol=0)


def test_adammini_with_blocks_of_one_element_is_adamw() -> None:
    options = {"lr": 0.1, "weight_decay": 0.1}
    assert_equal(follow(make("AdamMini", block="full", **options)), follow(make("AdamW", **options)), 1e-14)


@pytest.mark.parametrize(("block", "numbers"), [("tensor", 1), ("rows", 6), ("heads", 3)])
def test_adammini_keeps_a_number_per_block(block: str, numbers: int) -> None:
    weight = nn.Parameter(torch.randn(6, 4))
    optimizer = core_optim.AdamMini([weight], block=block, heads=3)
    weight.grad = torch.randn(6, 4)
    optimizer.step()
    v = optimizer.state[weight]["exp_avg_sq"]
    assert v.numel() == numbers
    torch.testing.assert_close(v.mean(), 1e-3 * weight.grad.square().mean())


def test_adammini_refuses_heads_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match=r"6 rows do not split into 4 heads"):
        core_optim.AdamMini([nn.Parameter(torch.zeros(6, 2))], block="heads", heads=4)


def test_mars_without_its_change_is_adamw() -> None:
    weight, other = (nn.Parameter(torch.ones(4, 3, dtype=torch.float64)) for _ in range(2))
    mars = core_optim.MARS([weight], lr=1e-2, gamma=0.0, weight_decay=0.1)
    adamw = core_optim.AdamW([other], lr=1e-2, betas=(0.95, 0.99), weight_decay=0.1)
    assert_equal(follow(mars, scale=1e-3), follow(adamw, scale=1e-3), 1e-12)


def test_first_gradient_of_mars_counts_1_475_times_or_once() -> None:
    for first, factor in (("zero", 1.475), ("grad", 1.0)):
        weight = nn.Parameter(torch.zeros(2, 2))
        weight.grad = torch.full((2, 2), 1e-2)
        optimizer = core_optim.MARS([weight], first=first)
        optimizer.step()
        torch.testing.assert_close(
            optimizer.state[weight]["exp_avg"], torch.full((2, 2), 0.05 * factor * 1e-2), rtol=1e-6, atol=0
        )


def test_cautious_updates_keep_their_mean_share_and_agree_with_the_gradient() -> None:
    for name in ("AdamW", "NAdamW", "Lion", "AdaBelief"):
        optimizer = make(name, lr=1e-2, weight_decay=0.0, cautious=True)
        params = optimizer.param_groups[0]["params"]
        follow(optimizer, steps=5)
        before = [p.detach().clone() for p in params]
        follow(optimizer, steps=1, seed=9)
        for p, old in zip(params, before):
            moved = old - p.detach()
            assert (moved * p.grad >= 0).all()


def test_cautious_adamw_is_adamw_where_all_agree() -> None:
    weight, other = (nn.Parameter(torch.ones(5, dtype=torch.float64)) for _ in range(2))
    a, b = core_optim.CAdamW([weight], lr=1e-2), core_optim.AdamW([other], lr=1e-2)
    for _ in range(3):
        weight.grad, other.grad = torch.ones_like(weight), torch.ones_like(weight)
        a.step()
        b.step()
    assert_equal([weight.detach()], [other.detach()], 1e-15)


def test_schedule_free_follows_the_textbook_recursion() -> None:
    """x, z and y kept apart, as in the paper's algorithm 1, with a warm-up."""
    beta1, beta2, lr, decay, warm = 0.9, 0.99, 0.02, 0.1, 4
    weight = nn.Parameter(torch.linspace(-1, 1, 5, dtype=torch.float64))
    optimizer = core_optim.ScheduleFreeAdamW(
        [weight], lr=lr, betas=(beta1, beta2), weight_decay=decay, warmup_steps=warm
    )
    x = z = weight.detach().clone()
    v, total, top = torch.zeros_like(x), 0.0, 0.0
    for t in range(1, 9):
        y = (1 - beta1) * z + beta1 * x
        g = torch.randn(5, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
        v = beta2 * v + (1 - beta2) * g * g
        rate = lr * min(1.0, t / warm)
        top = max(top, rate)
        total += top**2
        z = z - rate * (g / ((v / (1 - beta2**t)).sqrt() + 1e-8) + decay * y)
        x = (1 - top**2 / total) * x + top**2 / total * z
        weight.grad = g
        optimizer.step()
        torch.testing.assert_close(weight.detach(), (1 - beta1) * z + beta1 * x, rtol=0, atol=1e-14)
    held = weight.detach().clone()
    optimizer.eval()
    torch.testing.assert_close(weight.detach(), x, rtol=0, atol=1e-14)
    with pytest.raises(RuntimeError, match=r"call optimizer.train\(\)"):
        optimizer.step()
    optimizer.train()
    torch.testing.assert_close(weight.detach(), held, rtol=0, atol=1e-14)


DECAYED = {
    "coupled": lambda p, lr, wd: p - lr * wd * p,
    "decoupled": lambda p, lr, wd: p * (1 - lr * wd),
    "after": lambda p, lr, wd: p * (1 - lr * wd),
    "independent": lambda p, lr, wd: p * (1 - wd),
    "corrected": lambda p, lr, wd: p * (1 - lr * wd * lr / 0.4),
    "cautious": lambda p, lr, wd: p,
}


@pytest.mark.parametrize("kernel", ["loop", "foreach"])
@pytest.mark.parametrize("decay", sorted(DECAYED))
def test_ways_of_decay(decay: str, kernel: str) -> None:
    """With a gradient of 0 only the decay moves SGD; half way down a schedule from 0.4."""
    weight = nn.Parameter(torch.linspace(-2, 2, 7, dtype=torch.float64))
    optimizer = core_optim.SGD([weight], lr=0.4, weight_decay=0.3, decay=decay, kernel=kernel)
    optimizer.param_groups[0]["initial_lr"] = 0.4
    optimizer.param_groups[0]["lr"] = 0.2
    old = weight.detach().clone()
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), DECAYED[decay](old, 0.2, 0.3), rtol=1e-12, atol=0)


def test_a_rate_may_be_set_to_a_whole_number() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = core_optim.SGD([weight], lr=0.1)
    optimizer.param_groups[0]["lr"] = 1
    weight.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(weight.detach(), torch.zeros(3))


def test_cautious_decay_acts_where_update_and_weight_agree() -> None:
    weight = nn.Parameter(torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64))
    optimizer = core_optim.SGD([weight], lr=0.1, weight_decay=0.5, decay="cautious")
    weight.grad = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    optimizer.step()
    expected = torch.tensor([1 - 0.05 - 0.1, 1.1, -1.1, -1 + 0.05 + 0.1], dtype=torch.float64)
    torch.testing.assert_close(weight.detach(), expected)


def test_rectification_starts_when_it_is_defined() -> None:
    """RAdam's length passes 5 at the sixth step for beta2 = 0.999."""
    from thalweg.core_optim.registry import rule

    belief = rule("adabelief")
    options = {"betas": (0.9, 0.999), "rectify": True}
    flags = [belief.scalars(t, options)["rectified"] for t in range(1, 9)]
    limit = 2 / (1 - 0.999) - 1
    lengths = [limit - 2 * t * 0.999**t / (1 - 0.999**t) for t in range(1, 9)]
    assert flags == [float(length >= 5) for length in lengths]
    assert math.isclose(sum(flags), 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["AdamW", "DiffGrad", "Lion", "ScheduleFreeAdamW"])
def test_pieces_of_a_large_parameter_make_the_whole(name: str, dtype: torch.dtype) -> None:
    """The loop cuts what is longer than a piece; rounding counts elements, so that it does not matter."""
    from thalweg.core_optim.engine.buckets import PIECE

    ends = []
    for kernel in ("loop", "foreach"):
        weight = nn.Parameter(torch.linspace(-1, 1, 2 * PIECE + 77).to(dtype))
        optimizer = getattr(core_optim, name)([weight], lr=1e-2, stochastic_rounding=True, kernel=kernel)
        for step in range(3):
            weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step)).to(dtype)
            optimizer.step()
        ends.append(weight.detach().float())
    # sigmoid is not the same function in a vector register and in the rest of a loop
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-7 if dtype == torch.float32 else 0)
