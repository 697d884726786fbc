import pytest
import torch

from thalweg.core_optim.linalg.householder import SMALLEST, orthogonal_factor


def error(q: torch.Tensor) -> float:
    return (q.mT @ q - torch.eye(q.shape[-1], dtype=q.dtype)).abs().max().item()


@pytest.mark.parametrize("side", [SMALLEST, 405])
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_blocked_factor_equals_lapack(side: int, layout: str) -> None:
    a = torch.randn(side, side, generator=torch.Generator().manual_seed(side), dtype=torch.float64)
    a = a if layout == "rows" else a.mT
    before = a.clone()
    q = orthogonal_factor(a)
    assert torch.equal(a, before)
    assert torch.allclose(q, torch.linalg.qr(a)[0], atol=1e-11)
    assert error(q) < 1e-14


def test_rank_deficient_and_zero_matrices_have_an_orthogonal_factor() -> None:
    x = torch.randn(400, 30, generator=torch.Generator().manual_seed(0))
    for a in (x @ x.mT, torch.zeros(400, 400), torch.diag(torch.arange(400.0))):
        assert error(orthogonal_factor(a)) < 1e-5


def test_batches_and_small_matrices() -> None:
    a = torch.randn(3, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(orthogonal_factor(a), torch.linalg.qr(a)[0])
    assert torch.allclose(orthogonal_factor(a[:1])[0], torch.linalg.qr(a[0])[0])
