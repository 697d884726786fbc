import pytest
import torch

from thalweg.core_optim.linalg import symmetric


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("side", [5, 256, 300])
def test_product_of_commuting_symmetric_matrices(side: int) -> None:
    x = matrix(side, 40) / side
    a = x @ x.mT
    assert (symmetric.stripe_height(a) is None) == (side < symmetric.SMALLEST)
    found = symmetric.symmetric_product(a, a, a, alpha=0.5, beta=-2.0)
    assert torch.allclose(found, 0.5 * a @ a - 2.0 * a, atol=1e-14)
    assert torch.allclose(symmetric.symmetric_product(x, x.mT), a, atol=1e-14)


def test_batches_are_multiplied_whole() -> None:
    x = matrix(600, 7).view(2, 300, 7)
    assert torch.allclose(symmetric.symmetric_product(x, x.mT), x @ x.mT, atol=1e-12)


@pytest.mark.parametrize("side", [4, 290])
def test_average_of_outer_products_is_current_once_mirrored(side: int) -> None:
    x, y = matrix(side, 3, 1), matrix(side, 3, 2)
    average = torch.zeros(side, side, dtype=torch.float64)
    symmetric.mix_outer_(average, x, 0.1)
    symmetric.mix_outer_(average, y, 0.1)
    wanted = 0.09 * x @ x.mT + 0.1 * y @ y.mT
    assert torch.allclose(average.triu(), wanted.triu(), atol=1e-14)
    assert torch.allclose(symmetric.mirror_(average), wanted, atol=1e-14)
    batch = torch.stack([wanted, 2.0 * wanted])
    assert torch.allclose(symmetric.mirror_(batch.triu()), batch)
    assert torch.allclose(symmetric.mirror_(batch[:1].triu()), batch[:1])
