"""Window attention: geometry, position bias, its cache, and gradients of the memory-lean path."""

import copy
import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from thalweg.pde.poseidon import attend
from thalweg.pde.poseidon.attend import cosine_attention
from thalweg.pde.poseidon.attention import CosineAttention, PositionBias
from thalweg.pde.poseidon.windows import SHIFT_PENALTY, Windows

GEOMETRIES = [
    Windows(grid=(8, 8), window=(8, 8)),
    Windows(grid=(8, 12), window=(4, 4)),
    Windows(grid=(8, 12), window=(4, 4), shift=(2, 2)),
    Windows(grid=(7, 13), window=(4, 5), shift=(2, 2)),
    Windows(grid=(6, 9), window=(6, 4), shift=(0, 2)),
]
geometries = pytest.mark.parametrize("windows", GEOMETRIES, ids=str)


@geometries
def test_joining_undoes_splitting(windows: Windows) -> None:
    x = torch.randn(2, *windows.grid, 3)
    parts = windows.split(x)
    assert parts.shape == (2 * windows.num_windows, math.prod(windows.window), 3)
    assert torch.equal(windows.join(parts), x)


@geometries
def test_mask_separates_exactly_the_tokens_that_rolling_brought_together(windows: Windows) -> None:
    padded = [n * w for n, w in zip(windows.counts, windows.window)]
    whole = Windows(grid=tuple(padded), window=windows.window, shift=windows.shift)
    rows, cols = torch.meshgrid(*(torch.arange(n) for n in padded), indexing="ij")
    at = whole.split(torch.stack([rows, cols], -1)[None])
    # Within one window, genuine neighbours are less than a window apart on the unrolled grid.
    apart = (at[:, :, None] - at[:, None]).abs() >= torch.tensor(windows.window)
    expected = apart.any(-1) * SHIFT_PENALTY
    assert torch.equal(windows.shift_mask(torch.device("cpu"), torch.float32), expected)


def slow_attention(module: CosineAttention, x: Tensor) -> Tensor:
    """Attention written per head and pair of tokens from the equations of Swin v2."""
    heads, (h, w) = module.num_heads, module.windows.window
    q, k, v = (linear(x).unflatten(-1, (heads, -1)) for linear in (module.query, module.key, module.value))
    cosine = torch.einsum("xnhe,xmhe->xhnm", q, k)
    cosine = cosine / q.norm(dim=-1).permute(0, 2, 1)[..., None] / k.norm(dim=-1).permute(0, 2, 1)[:, :, None]
    places = list(itertools.product(range(h), range(w)))
    mlp = module.continuous_position_bias_mlp
    bias = torch.empty(heads, h * w, h * w, dtype=x.dtype)
    for (i, a), (j, b) in itertools.product(enumerate(places), repeat=2):
        offset = torch.tensor([(a[0] - b[0]) / max(h - 1, 1), (a[1] - b[1]) / max(w - 1, 1)], dtype=x.dtype)
        coordinate = offset.sign() * (1 + 8 * offset.abs()).log2() / 3
        bias[:, i, j] = 16 * mlp[2](mlp[1](mlp[0](coordinate))).sigmoid()
    logits = cosine * module.logit_scale.clamp(max=math.log(100)).exp() + bias
    if module.windows.shifted:
        mask = module.windows.shift_mask(x.device, x.dtype)
        logits = logits + mask.repeat(len(x) // len(mask), 1, 1)[:, None]
    return torch.einsum("xhnm,xmhe->xnhe", logits.softmax(-1), v).flatten(2)


def make_attention(windows: Windows) -> CosineAttention:
    module = CosineAttention(12, 3, windows, scaled_by=windows.window).double()
    with torch.no_grad():
        # One head's scale lies beyond the clamp at ln 100.
        module.logit_scale.copy_(torch.tensor([0.3, 2.0, 5.0])[:, None, None])
        module.continuous_position_bias_mlp[2].weight.normal_()
    return module


@geometries
@pytest.mark.parametrize("training", [True, False])
def test_attention_equals_its_equations(windows: Windows, training: bool) -> None:
    module = make_attention(windows).train(training)
    x = torch.randn(2 * windows.num_windows, math.prod(windows.window), 12, dtype=torch.float64)
    expected = slow_attention(module, x)
    # The reference code computes offsets in float32, so agreement ends there.
    assert torch.allclose(module(x), expected, atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(module(x), expected, atol=1e-6)


SHIFTED = pytest.mark.parametrize("windows", [w for w in GEOMETRIES if w.shifted], ids=str)


@SHIFTED
def test_tiles_are_the_parts_of_windows_that_the_mask_keeps_apart(windows: Windows) -> None:
    padded = [n * w for n, w in zip(windows.counts, windows.window)]
    whole = Windows(grid=tuple(padded), window=windows.window, shift=windows.shift)
    number = torch.arange(math.prod(padded)).view(1, *padded, 1)
    sees = torch.zeros(2, number.numel(), number.numel(), dtype=torch.bool)
    mask = whole.shift_mask(torch.device("cpu"), torch.float32)
    for tokens, hidden in zip(whole.split(number)[..., 0], mask):
        sees[0, tokens[:, None], tokens] = hidden == 0
    in_tiles = whole.split_tiles(number)[0, :, 0]
    for (h, w), count in whole.tiles.items():
        for _ in range(count):
            tokens, in_tiles = in_tiles[: h * w], in_tiles[h * w :]
            sees[1, tokens[:, None], tokens] = True
    assert len(in_tiles) == 0
    assert torch.equal(sees[0], sees[1])


@SHIFTED
def test_tiles_can_be_joined_and_have_gradients(windows: Windows) -> None:
    x = torch.randn(2, *windows.grid, 3, dtype=torch.float64, requires_grad=True)
    assert torch.equal(windows.join_tiles(windows.split_tiles(x)), x)
    weights = torch.randn(windows.split_tiles(x).shape, dtype=torch.float64)
    (grad,) = torch.autograd.grad((windows.split_tiles(x) * weights).sum(), x)
    assert torch.equal(grad, windows.join_tiles(weights))


@SHIFTED
@pytest.mark.parametrize("training", [True, False])
def test_attention_in_tiles_equals_masked_windows(windows: Windows, training: bool) -> None:
    module = make_attention(windows).train(training)
    with torch.no_grad():
        module.logit_scale.clamp_(max=math.log(74.0))
    assert module.separates()
    x = torch.randn(2, *windows.grid, 12, dtype=torch.float64, requires_grad=True)
    inputs = [x, *module.parameters()]

    def masked() -> Tensor:
        return windows.join(module(windows.split(x)))

    def tiled() -> Tensor:
        return windows.join_tiles(module(windows.split_tiles(x), tiled=True))

    assert torch.allclose(tiled(), masked(), atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(f().sin().sum(), inputs) for f in (tiled, masked))):
        assert torch.allclose(a, b, atol=1e-12 * b.abs().max().clamp_min(1))
    with torch.no_grad():
        assert torch.allclose(tiled(), masked(), atol=1e-12)
        module.logit_scale[1] = math.log(76.0)
    assert not module.separates()


@pytest.mark.parametrize(("num_windows", "at_once"), [(1, 1), (1, 4), (1, 6), (3, 1)])
def test_memory_lean_attention_has_exact_gradients(
    num_windows: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attend, "_CHUNK_ELEMENTS", at_once * 2 * 5**2)
    q, k, v = (torch.randn(6, 5, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    scale = torch.rand(2, 1, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(num_windows, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    inputs = (q, k, v, scale, bias)
    assert torch.autograd.gradcheck(cosine_attention, inputs)

    def plain(q: Tensor, k: Tensor, v: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        q, k = (nn.functional.normalize(t, dim=-1) for t in (q * scale.sign(), k))
        logits = torch.einsum("xnhe,xmhe->xhnm", scale * q, k) + bias.repeat(6 // num_windows, 1, 1, 1)
        return torch.einsum("xhnm,xmhe->xnhe", logits.softmax(-1), v)

    assert torch.allclose(cosine_attention(*inputs), plain(*inputs), atol=1e-12)
    grads = [torch.autograd.grad(f(*inputs).sin().sum(), inputs) for f in (cosine_attention, plain)]
    for a, b in zip(*grads):
        assert torch.allclose(a, b, atol=1e-12)


def test_zero_tokens_have_finite_gradients() -> None:
    q, k, v = (torch.zeros(1, 4, 2, 3, requires_grad=True) for _ in range(3))
    bias = torch.zeros(1, 2, 4, 4)
    for with_grad in (True, False):
        out = cosine_attention(q, k, v, torch.ones(2, 1), bias.clone().requires_grad_(with_grad))
        grads = torch.autograd.grad(out.sum(), (q, k, v))
        assert all(g.isfinite().all() for g in grads)


def test_attention_with_frozen_bias_still_trains_the_rest() -> None:
    module = make_attention(GEOMETRIES[2])
    module.continuous_position_bias_mlp.requires_grad_(False)
    x = torch.randn(6, 16, 12, dtype=torch.float64, requires_grad=True)
    module(x).sum().backward()
    assert module.logit_scale.grad[:2].abs().min() > 0
    assert module.logit_scale.grad[2] == 0  # beyond the clamp
    assert module.continuous_position_bias_mlp[0].weight.grad is None


def test_attention_dropout_acts_in_training_only() -> None:
    windows = GEOMETRIES[0]
    module = CosineAttention(12, 3, windows, scaled_by=windows.window, dropout=0.5)
    x = torch.randn(1, 64, 12)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


def fresh_table(bias: PositionBias) -> Tensor:
    return copy.deepcopy(bias)()


CHANGES = {
    "in place": lambda b: b[2].weight.mul_(2),
    "through data": lambda b: b[2].weight.data.mul_(2),
    "replaced data": lambda b: setattr(b[2].weight, "data", torch.randn(3, 512)),
    "load_state_dict": lambda b: b.load_state_dict({k: v + 0.1 for k, v in b.state_dict().items()}),
    "assigned": lambda b: b.load_state_dict({k: v * 2 for k, v in b.state_dict().items()}, assign=True),
    "double": lambda b: b.double(),
    "bfloat16": lambda b: b.bfloat16(),
    "new parameter": lambda b: setattr(b[2], "weight", nn.Parameter(torch.randn(3, 512))),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_cached_bias_follows_every_change_of_parameters(change: object) -> None:
    bias = PositionBias(3, (4, 4), (4, 4)).eval()
    with torch.no_grad():
        before = bias()
        assert bias._cache.table is not None
        change(bias)
        after, expected = bias(), fresh_table(bias)
    assert torch.equal(after, expected)
    assert after.dtype == expected.dtype
    assert not torch.equal(before.double(), after.double())


def test_bias_cached_under_autocast_is_full_precision() -> None:
    bias = PositionBias(3, (4, 4), (4, 4)).eval()
    with torch.no_grad():
        expected = fresh_table(bias)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(bias(), expected)
        assert torch.equal(bias(), expected)


def test_bias_is_not_cached_when_it_needs_gradients_or_trains() -> None:
    bias = PositionBias(3, (4, 4), (4, 4)).eval()
    bias().sum().backward()
    assert bias[2].weight.grad is not None
    assert bias._cache.table is None
    with torch.no_grad():
        bias()
        assert bias._cache.table is not None
        assert bias.train()._cache.table is None
        bias()
        assert bias._cache.table is None


def test_bias_cached_in_inference_mode_does_not_reach_training() -> None:
    bias = PositionBias(3, (4, 4), (4, 4)).eval()
    with torch.inference_mode():
        bias()
    with torch.no_grad():
        plain = bias()
    (plain.requires_grad_() * 2).sum().backward()
    assert torch.equal(plain.grad, torch.full_like(plain, 2))
