"""Facts about the Fourier tools: derivatives, dealiased products, projection."""

import math

import pytest
import torch

from thalweg.pde.solvers.fourier import SpectralGrid


def _wave(n: int, kx: int, ky: int) -> torch.Tensor:
    x = 2 * math.pi * torch.arange(n, dtype=torch.float64) / n
    return (kx * x[:, None] + ky * x).cos()


def test_transform_round_trip_keeps_what_the_grid_resolves() -> None:
    grid = SpectralGrid(16)
    field = _wave(16, 3, -5) + _wave(16, 7, 0) + 0.5
    assert torch.allclose(grid.backward(grid.forward(field)), field, atol=1e-14)


def test_nyquist_waves_are_dropped() -> None:
    grid = SpectralGrid(16)
    for nyquist in (_wave(16, 8, 0), _wave(16, 0, 8), _wave(16, 8, 3)):
        assert grid.forward(nyquist).abs().max() < 1e-15


def test_padded_product_has_no_aliasing() -> None:
    """cos(6x) cos(5x) = (cos x + cos 11x) / 2: on 16 points the second term would appear as cos 5x."""
    grid = SpectralGrid(16)
    a, b = (grid.to_padded(grid.forward(_wave(16, k, 0))) for k in (6, 5))
    product = grid.backward(grid.from_padded(a * b))
    assert torch.allclose(product, 0.5 * _wave(16, 1, 0), atol=1e-14)
    assert not torch.allclose(_wave(16, 6, 0) * _wave(16, 5, 0), product, atol=0.1)


def test_curl_of_biot_savart_is_the_vorticity() -> None:
    grid = SpectralGrid(16)
    vorticity = grid.forward(_wave(16, 2, 3) + _wave(16, 0, 1))
    velocity = grid.velocity(vorticity, torch.tensor([0.3, -0.7]))
    assert torch.allclose(grid.curl(velocity), vorticity, atol=1e-14)
    assert torch.allclose(
        grid.backward(velocity).mean((-2, -1)), torch.tensor([0.3, -0.7], dtype=torch.float64)
    )


def test_projection_removes_gradients_and_keeps_solenoidal_fields() -> None:
    grid = SpectralGrid(32)
    potential, stream = grid.forward(_wave(32, 2, 1)), grid.forward(_wave(32, 1, -3))
    gradient = grid.backward(torch.stack([1j * grid.kx * potential, 1j * grid.ky * potential]))
    solenoidal = grid.backward(torch.stack([1j * grid.ky * stream, -1j * grid.kx * stream]))
    assert grid.project(gradient).abs().max() < 1e-13
    assert torch.allclose(grid.project(solenoidal + gradient), solenoidal, atol=1e-12)


@pytest.mark.parametrize("resolution", [2, 15])
def test_impossible_resolutions_are_refused(resolution: int) -> None:
    with pytest.raises(ValueError, match=f"got {resolution}"):
        SpectralGrid(resolution)
