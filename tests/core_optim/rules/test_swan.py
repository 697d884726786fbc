import pytest
import torch
from golden_trajectory import follow, load, trajectories
from torch import nn

from thalweg.core_optim import SWAN
from thalweg.core_optim.linalg.newton_schulz import polar_factor
from thalweg.core_optim.linalg.whitening import normalise_rows


@pytest.mark.parametrize("path", trajectories("swan_*.safetensors"), ids=lambda path: path.stem)
def test_golden_trajectory(path) -> None:
    assert follow(*load(path)) < 1.0


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def update(g: torch.Tensor, **options) -> torch.Tensor:
    """Minus the move of a parameter for lr 1."""
    p = nn.Parameter(torch.zeros_like(g))
    p.grad = g.clone()
    optimizer = SWAN([p], **{"lr": 1.0, "beta": 0.5, "ns_steps": 25, **options})
    optimizer.step()
    assert set(optimizer.state[p]) == {"step"}
    return -p.detach()


def test_half_is_the_polar_factor_of_the_normalised_gradient() -> None:
    g = normal(4, 9)
    polar = polar_factor(normalise_rows(g, 1e-20))
    assert torch.allclose(update(g), 3.0 * polar, atol=1e-10)
    assert update(g).square().mean().item() == pytest.approx(1.0)


def test_invariances() -> None:
    g = normal(4, 9)
    u = update(g)
    rows = torch.tensor([1e-4, 1.0, 30.0, 1e5], dtype=torch.float64)[:, None]
    assert torch.allclose(update(rows * g), u, atol=1e-12)
    order = [3, 0, 8, 1, 2, 7, 6, 5, 4]
    assert torch.allclose(update(g[:, order]), u[:, order], atol=1e-12)
    assert torch.allclose(update(g.mT.contiguous()), u.mT, atol=1e-12)
    centred = update(g, centre=True)
    assert torch.allclose(update(g + 7.0 * rows, centre=True), centred, atol=1e-9)
    assert not torch.allclose(update(g + 7.0 * rows), u, atol=0.1)


def test_batches_of_one_oriented_shape_equal_single_steps() -> None:
    shapes = [(3, 5), (5, 3), (3, 5, 1), (5, 1, 3)]
    gradients = [normal(*shape, seed=k) for k, shape in enumerate(shapes)]
    params = [nn.Parameter(torch.zeros_like(g)) for g in gradients]
    for p, g in zip(params, gradients):
        p.grad = g.clone()
    SWAN(params, lr=1.0, beta=0.5, ns_steps=25).step()
    for p, g in zip(params, gradients):
        assert torch.allclose(-p.detach(), update(g), atol=1e-12)


@pytest.mark.parametrize(
    "options", [{}, {"beta": 0.8, "ns_steps": 10}, {"variant": "diagonal", "ns_steps": 2}]
)
def test_zero_rows_and_zero_gradients_are_finite(options) -> None:
    g = normal(4, 6)
    g[1] = 0.0
    u = update(g, **options)
    assert torch.isfinite(u).all()
    assert not u[1].any()
    assert u[0].any()
    assert not update(torch.zeros(4, 6), **options).any()


def test_fp32_gradients_of_a_large_matrix_stay_in_the_band() -> None:
    g = normal(64, 96).float() * 1e-8
    s = torch.linalg.svdvals(update(g, beta=0.8, ns_steps=10))
    assert s.max() / s.min() <= 1.600 / 0.563


@pytest.mark.parametrize("shape", [(), (3,)])
def test_vectors_are_refused(shape) -> None:
    with pytest.raises(ValueError, match="SWAN is for matrices and convolutions"):
        SWAN([nn.Parameter(torch.zeros(shape))])


def test_complex_matrices_are_refused() -> None:
    with pytest.raises(ValueError, match="no update for complex numbers"):
        SWAN([nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))])
