"""The lean CPU code against the plain formulas."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thalweg.pde.poseidon import fused
from thalweg.pde.poseidon.fused import gelu_mlp, is_plain_linear, modulated_norm, runs_eagerly_on_cpu


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
