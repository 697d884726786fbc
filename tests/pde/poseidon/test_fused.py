"""The lean CPU code against the plain formulas."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thalweg.pde.poseidon import fused
from thalweg.pde.poseidon.fused import (
    depthwise_convolution,
    gelu_mlp,
    is_plain_linear,
    linear,
    modulated_norm,
    runs_eagerly_on_cpu,
    slide_back,
)


def plain_norm(y: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    return shift + gain * F.layer_norm(y, y.shape[-1:], eps=1e-5)


def norm_inputs(samples: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    y = torch.randn(2, 3, 4, 5, dtype=dtype, requires_grad=True)
    gain, shift = (torch.randn(samples, 1, 1, 5, dtype=dtype, requires_grad=True) for _ in range(2))
    return y, gain, shift


@pytest.mark.parametrize("samples", [1, 2])
def test_modulated_norm_and_its_gradients(samples: int) -> None:
    inputs = norm_inputs(samples)
    assert torch.autograd.gradcheck(lambda *a: modulated_norm(*a, 1e-5), inputs)
    actual, expected = modulated_norm(*inputs, 1e-5), plain_norm(*inputs)
    assert torch.allclose(actual, expected, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(y.cos().sum(), inputs) for y in (actual, expected))):
        assert torch.allclose(a, b, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(modulated_norm(*inputs, 1e-5), actual)


def test_modulated_norm_survives_a_large_mean() -> None:
    """E[x^2] - E[x]^2 would cancel to nothing here."""
    y = 100 + 0.01 * torch.randn(1, 8, 8, 48, dtype=torch.float64)
    ones, zeros = torch.ones(1, 1, 1, 48), torch.zeros(1, 1, 1, 48)
    actual = modulated_norm(y.float(), ones, zeros, 1e-5)
    assert torch.allclose(actual.double(), plain_norm(y.float().double(), ones, zeros), atol=2e-2)


def plain_mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)


def mlp_inputs() -> tuple[Tensor, ...]:
    shapes = [(2, 5, 7, 3), (6, 3), (6,), (3, 6), (3,)]
    return tuple(torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)


@pytest.mark.parametrize("elements", [1, 6 * 32, 10**6])
def test_mlp_and_its_gradients_whatever_the_pieces(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_CHUNK_ELEMENTS", elements)
    inputs = mlp_inputs()
    actual, expected = gelu_mlp(*inputs), plain_mlp(*inputs)
    assert torch.allclose(actual, expected, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(y.sin().sum(), inputs) for y in (actual, expected))):
        assert torch.allclose(a, b, atol=1e-12)
    with torch.no_grad():
        assert torch.allclose(gelu_mlp(*inputs), expected, atol=1e-12)


def test_frozen_parameters_get_no_gradient() -> None:
    inputs = mlp_inputs()
    for p in inputs[1:]:
        p.requires_grad_(False)
    gelu_mlp(*inputs).sum().backward()
    assert inputs[0].grad is not None
    assert all(p.grad is None for p in inputs[1:])


def test_transforms_and_autocast_take_the_plain_formulas() -> None:
    x = torch.randn(3)
    assert runs_eagerly_on_cpu(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not runs_eagerly_on_cpu(x)
    inputs = mlp_inputs()
    actual = torch.func.vmap(lambda x: gelu_mlp(x, *inputs[1:]))(inputs[0])
    assert torch.allclose(actual, plain_mlp(*inputs))


def test_hooked_and_replaced_layers_are_called() -> None:
    assert is_plain_linear(nn.Linear(2, 2))
    hooked = nn.Linear(2, 2)
    hooked.register_forward_hook(lambda *_: None)
    assert not is_plain_linear(hooked)
    assert not is_plain_linear(nn.Sequential(nn.Linear(2, 2)))


LINEARS = {
    "small": (nn.Linear(3, 5), (2, 4, 3)),
    "large": (nn.Linear(64, 96, bias=False), (2, 400, 64)),
    "double": (nn.Linear(64, 96).double(), (2, 400, 64)),
}


@pytest.mark.parametrize(("layer", "shape"), LINEARS.values(), ids=LINEARS.keys())
@pytest.mark.parametrize("strided", [False, True])
def test_linear_and_its_gradients(layer: nn.Linear, shape: tuple[int, ...], strided: bool) -> None:
    x = torch.randn(shape, dtype=layer.weight.dtype).requires_grad_()
    y = x.flip(0).transpose(0, 1) if strided else x
    weights = torch.randn(layer.out_features, dtype=x.dtype)
    inputs = [x, *layer.parameters()]
    # The expanded gradient of a sum is no ordinary memory.
    for reduce in (lambda out: out.sum(), lambda out: (out * weights).square().sum()):
        actual, expected = linear(layer, y), layer(y)
        assert torch.allclose(actual, expected, atol=1e-5)
        for a, b in zip(*(torch.autograd.grad(reduce(out), inputs) for out in (actual, expected))):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-4 * b.abs().max())
    with torch.no_grad():
        assert torch.allclose(linear(layer, y), expected, atol=1e-5)


def test_linear_skips_gradients_nobody_asked_for_and_calls_what_is_not_a_plain_layer() -> None:
    layer = nn.Linear(3, 5).requires_grad_(False)
    x = torch.randn(2, 3, requires_grad=True)
    linear(layer, x).sum().backward()
    assert layer.weight.grad is None
    assert torch.equal(linear(nn.Identity(), x), x)


@pytest.mark.parametrize("dim", [1, 2])
def test_sliding_back_takes_windows_in_reverse(dim: int) -> None:
    x = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    size = (x.shape[dim] + 1) // 2
    out = slide_back(x, dim, size)
    for i in range(size):
        assert torch.equal(out[:, i], x.narrow(dim, size - 1 - i, size))
    assert torch.autograd.gradcheck(lambda x: slide_back(x, dim, size), (x,))
    mapped = torch.func.vmap(lambda x: slide_back(x[None], dim, size)[0])(x)
    assert torch.equal(mapped, out)


@pytest.mark.parametrize("grid", [(4, 6), (9, 2)])
def test_depthwise_convolution_and_its_gradients(grid: tuple[int, int]) -> None:
    conv = nn.Conv2d(3, 3, 7, padding=3, groups=3).double()
    x = torch.randn(2, *grid, 3, dtype=torch.float64, requires_grad=True)
    actual = depthwise_convolution(x, conv)
    expected = conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    assert torch.allclose(actual, expected, atol=1e-12)
    inputs = [x, conv.weight, conv.bias]
    for a, b in zip(*(torch.autograd.grad(y.sin().sum(), inputs) for y in (actual, expected))):
        assert torch.allclose(a, b, atol=1e-12)
    conv.requires_grad_(False)
    depthwise_convolution(x, conv).sum().backward()
    assert conv.weight.grad is None


@pytest.mark.parametrize("samples", [1, 2])
def test_norm_adds_its_residual_and_leaves_it_as_it_is(samples: int) -> None:
    inputs = (*norm_inputs(samples), torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True))
    before = inputs[-1].detach().clone()

    def norm(*inputs: Tensor) -> Tensor:
        return modulated_norm(*inputs[:3], 1e-5, inputs[3])

    assert torch.autograd.gradcheck(norm, inputs)
    with torch.no_grad():
        assert torch.allclose(norm(*inputs), plain_norm(*inputs[:3]) + before, atol=1e-12)
    assert torch.equal(inputs[-1], before)
