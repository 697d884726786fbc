import pytest
import torch

from thalweg.core_optim.linalg.newton_schulz import polar_factor
from thalweg.core_optim.linalg.whitening import normalise_rows, whiten


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_rows_are_normalised() -> None:
    g = normal(4, 9)
    g[2] = 0.0
    rows = normalise_rows(g, 1e-20).square().mean(-1).sqrt()
    assert torch.allclose(rows, torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=torch.float64))
    centred = normalise_rows(g + 5.0, 1e-20, centre=True)
    assert torch.allclose(centred.mean(-1), torch.zeros(4, dtype=torch.float64), atol=1e-12)


def test_centred_square_matrices_lose_a_rank() -> None:
    assert torch.linalg.matrix_rank(normalise_rows(normal(5, 5), 1e-20)) == 5
    assert torch.linalg.matrix_rank(normalise_rows(normal(5, 5), 1e-20, centre=True)) == 4


@pytest.mark.parametrize("shape", [(4, 9), (2, 4, 9)])
def test_half_converges_to_the_polar_factor(shape) -> None:
    g = normal(*shape)
    out = whiten(g, 25, 0.5)
    assert torch.allclose(out, polar_factor(g) * 3.0, atol=1e-10)  # of norm 2, rescaled to 6


def test_beta_of_the_paper_keeps_singular_values_in_a_band() -> None:
    u, v = (torch.linalg.qr(normal(d, 6, seed=d))[0] for d in (6, 10))
    g = (u * torch.logspace(-2, 0, 6, dtype=torch.float64)) @ v.mT
    s = torch.linalg.svdvals(whiten(g, 10, 0.8))
    assert s.max() / s.min() <= 1.600 / 0.563
    assert s.square().sum().sqrt().item() == pytest.approx(60**0.5)


def test_without_the_frobenius_scale_it_would_overflow() -> None:
    x = normalise_rows(normal(6, 10), 1e-20)
    y, z = x @ x.mT, torch.eye(6, dtype=torch.float64)
    for _ in range(12):
        r = 3.0 * torch.eye(6, dtype=torch.float64) - z @ y
        y, z = 0.8 * y @ r, 0.8 * r @ z
    assert not torch.isfinite(z).all()
    assert torch.isfinite(whiten(x, 12, 0.8)).all()


def test_diagonal_variant_is_exact_for_orthogonal_rows_and_near_otherwise() -> None:
    g = torch.linalg.qr(normal(8, 4))[0].mT
    assert torch.allclose(whiten(3.0 * g, 2, 0.4, "diagonal"), g * 8.0**0.5, atol=1e-12)
    one = whiten(normal(4, 40), 1, 0.5, "diagonal")
    assert torch.allclose(one, whiten(normal(4, 40), 1, 0.5), atol=1e-12)  # the first step is the same
    two, full = whiten(normal(4, 400), 2, 0.4, "diagonal"), whiten(normal(4, 400), 2, 0.4)
    assert 0.0 < (two - full).norm() < 0.05 * full.norm()


def test_no_steps_rescale_and_zero_stays_zero() -> None:
    g = normal(2, 8)
    assert torch.allclose(whiten(g, 0, 0.5), g * 4.0 / g.norm())
    assert torch.equal(whiten(torch.zeros(2, 3), 10, 0.8), torch.zeros(2, 3))


def test_large_matrices_equal_batches() -> None:
    g = normal(260, 300)
    assert torch.allclose(whiten(g, 4, 0.5), whiten(g.repeat(2, 1, 1), 4, 0.5)[1], atol=1e-9)


def test_unknown_variant() -> None:
    with pytest.raises(ValueError, match="'half', allowed: full, diagonal"):
        whiten(torch.eye(2), 1, 0.5, "half")
