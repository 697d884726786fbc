import pytest
import torch

from thalweg.core_optim.linalg import lmo


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def one(m: torch.Tensor, norm: str, **given) -> torch.Tensor:
    return lmo.directions([m], norm, given or None, "auto")[0]


def test_column_and_row_norms() -> None:
    m = normal(5, 4)
    ones = torch.ones(4, dtype=torch.float64)
    assert torch.allclose(one(m, "ColNorm").square().mean(0).sqrt(), ones, atol=1e-7)
    assert torch.allclose(one(m, "ColNorm", normalized=True).square().mean(0).sqrt(), ones / 4, atol=1e-7)
    rows = one(m, "RowNorm").norm(dim=1)
    assert torch.allclose(rows, torch.full((5,), 0.5, dtype=torch.float64), atol=1e-7)
    assert torch.allclose(one(m, "RowNorm", normalized=False).norm(dim=1), 2 * rows, atol=1e-7)
    assert torch.allclose(one(m, "ColNorm", transpose=True), one(m.mT, "ColNorm").mT)


def test_sign_and_bias() -> None:
    m = normal(3, 4)
    assert torch.equal(one(m, "Sign"), m.sign() / 4)
    assert torch.equal(one(m, "Sign", normalized=False), m.sign())
    assert one(m[0], "BiasRMS").square().mean().item() == pytest.approx(1.0, rel=1e-6)
    assert one(normal(), "BiasRMS").abs().item() == pytest.approx(1.0, rel=1e-6)


def test_spectral_directions_are_scaled_orthogonal() -> None:
    for shape, scale in [((6, 24), 0.5), ((24, 6), 2.0)]:
        s = torch.linalg.svdvals(one(normal(*shape), "Spectral", steps=10))
        assert s.min() >= 0.68 * scale
        assert s.max() <= 1.2024 * scale
    assert torch.allclose(one(normal(6, 24), "Spectral", max=True), 2 * one(normal(6, 24), "Spectral"))
    assert lmo.spectral_scale((9, 4), "Spectral", {"normalized": False}) == 3.0
    kernel = normal(8, 2, 3, 3)
    flat = one(kernel.reshape(8, 18), "Spectral", normalized=False) / 8**0.5
    assert torch.allclose(one(kernel, "SpectralConv"), (flat * 2 / 9).view(8, 2, 3, 3))


def test_auto_goes_by_dimensions() -> None:
    shapes = [(), (3,), (3, 4), (3, 4, 2), (3, 4, 2, 2)]
    found = lmo.directions([normal(*s) for s in shapes], "Auto", None, "auto")
    kinds = ["BiasRMS", "BiasRMS", "Spectral", "SpectralConv", "SpectralConv"]
    for shape, kind, u in zip(shapes, kinds, found):
        assert torch.allclose(u, one(normal(*shape), kind))


@pytest.mark.parametrize("norm", ["Sign", "ColNorm", "RowNorm", "Spectral", "BiasRMS"])
def test_zero_momenta_have_no_direction(norm: str) -> None:
    assert torch.equal(one(torch.zeros(2, 3), norm), torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("shape", "norm", "given"),
    [
        ((5, 4), "ColNorm", {"normalized": True}),
        ((5, 4), "RowNorm", {"transpose": True}),
        ((5, 4), "Sign", {}),
        ((5, 4), "Spectral", {"max": True}),
        ((4, 5), "Spectral", {}),
    ],
)
def test_initial_weights_are_fixed_points_of_their_direction(shape, norm, given) -> None:
    w = lmo.init_(
        torch.empty(shape, dtype=torch.float64), norm, given, generator=torch.Generator().manual_seed(1)
    )
    if norm == "Spectral":
        s = torch.linalg.svdvals(w)
        assert torch.allclose(s, torch.full_like(s, lmo.spectral_scale(shape, norm, given)))
    else:
        assert torch.allclose(one(w, norm, **given), w, atol=1e-7)
    again = lmo.init_(
        torch.empty(shape, dtype=torch.float64), norm, given, generator=torch.Generator().manual_seed(1)
    )
    assert torch.equal(w, again)


def test_initial_kernels_and_biases() -> None:
    w = lmo.init_(torch.empty(8, 2, 3, 3))
    s = torch.linalg.svdvals(w[:, :, 1, 2])
    assert torch.allclose(s, torch.full((2,), 2.0 / 9))
    assert torch.equal(lmo.init_(torch.ones(3)), torch.zeros(3))


def test_errors() -> None:
    with pytest.raises(ValueError, match="norm is 'L2', allowed: Auto, Spectral"):
        lmo.settings("L2", None)
    with pytest.raises(
        ValueError, match=r"ColNorm has max: 1, allowed: normalized \(bool\), transpose \(bool\)"
    ):
        lmo.settings("ColNorm", {"max": 1})
    with pytest.raises(ValueError, match="steps: 0"):
        lmo.settings("Spectral", {"steps": 0})
    with pytest.raises(ValueError, match="ColNorm is for matrices, not for 1 dimensions"):
        lmo.init_(torch.zeros(3), "ColNorm")
    with pytest.raises(ValueError, match="SpectralConv is for kernels of 3 or more dimensions, not 2"):
        lmo.init_(torch.zeros(3, 3), "SpectralConv")
