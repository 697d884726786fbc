"""Facts about the initial data: statistics of the released sets, independence of the resolution."""

from collections.abc import Callable

import pytest
import torch

from thalweg.pde.solvers import flow_initial as initial
from thalweg.pde.solvers.fourier import SpectralGrid
from thalweg.pde.solvers.navier_stokes_recipes import recipe
from thalweg.pde.solvers.seeding import draw, generator, geometric

MAKERS = [
    initial.sines,
    initial.gaussian_vortices,
    initial.piecewise_constant,
    initial.brownian_bridge,
    initial.shear_layer,
    initial.vortex_sheet,
]
Maker = Callable[[torch.Generator, int], torch.Tensor]


def _ensemble(make: Maker, resolution: int, count: int) -> torch.Tensor:
    return torch.stack([make(generator(0, make.__name__, i), resolution) for i in range(count)])


@pytest.mark.parametrize(
    ("make", "std", "tolerance"),
    [
        (initial.sines, 0.385, 0.01),
        (initial.gaussian_vortices, 0.58, 0.04),
        (initial.piecewise_constant, 0.2155, 0.01),
    ],
)
def test_velocity_has_the_known_standard_deviation(make: Maker, std: float, tolerance: float) -> None:
    velocity = _ensemble(make, 64, 64)
    assert float(velocity.square().mean().sqrt()) == pytest.approx(std, abs=tolerance)


def test_patches_of_unit_vorticity_would_be_ten_times_too_weak(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published standard deviation is 0.220; the distribution in the paper's text gives a tenth."""
    monkeypatch.setattr(initial, "PATCH_VORTICITY", 1.0)
    velocity = _ensemble(initial.piecewise_constant, 64, 64)
    assert float(velocity.square().mean().sqrt()) == pytest.approx(0.0216, abs=0.001)


@pytest.mark.parametrize(
    "make", [initial.sines, initial.gaussian_vortices, initial.shear_layer, initial.vortex_sheet]
)
def test_sample_is_the_same_at_every_resolution(make: Maker) -> None:
    coarse, fine = (make(generator(3, "resolution", 1), n) for n in (128, 256))
    assert float((fine[:, ::2, ::2] - coarse).norm() / coarse.norm()) < 2e-3


def test_brownian_bridge_has_the_spectrum_of_its_hurst_index() -> None:
    """Mean power per mode falls like |k|^-3; axes are left out, where half of the products vanish."""
    grid = SpectralGrid(64)
    power = grid.forward(_ensemble(initial.brownian_bridge, 64, 64)).abs().square().mean((0, 1))
    low, high = float(power[3, 3]), float(power[12, 12])
    assert low / high == pytest.approx(4**3, rel=0.25)


def test_shear_layer_flows_along_x_with_unit_speed() -> None:
    velocity = _ensemble(initial.shear_layer, 64, 4)
    assert velocity[:, 1].abs().max() == 0
    assert 0.99 < velocity[:, 0].max() <= 1
    assert -1 <= velocity[:, 0].min() < -0.95


def test_vortex_sheet_has_the_circulation_of_its_length() -> None:
    """Off the sheet the vorticity is constant and cancels the sheet's, one per unit of length."""
    grid = SpectralGrid(128)
    velocity = initial.vortex_sheet(generator(0, "sheet", 0), 128)
    far = grid.backward(grid.curl(grid.forward(velocity)))[:, :16]
    angle = 2 * torch.pi * initial.points(1000)
    # The perturbation adds at most ten modes of amplitude 1/320 to the amplitude 0.2.
    shortest, longest = ((1 + (2 * torch.pi * a * angle.cos()) ** 2).sqrt().mean() for a in (0.17, 0.23))
    assert shortest < -far.mean() < longest
    assert far.std() < 0.01 * far.mean().abs()


def test_disk_covers_its_area() -> None:
    assert float(initial.disk(256).mean()) == pytest.approx(torch.pi / 16, rel=5e-3)


def test_draws_depend_on_seed_stream_and_index_alone() -> None:
    draws = {
        key: float(torch.rand((), generator=generator(*key)))
        for key in [(0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1)]
    }
    assert len(set(draws.values())) == 4
    assert draws[0, "a", 0] == float(torch.rand((), generator=generator(0, "a", 0)))


def test_draw_stacks_the_requested_samples() -> None:
    made = recipe("NS-PwC")
    both = draw(made.request((4, 7), seed=2, resolution=16), lambda rng: torch.rand(3, generator=rng))
    lone = draw(made.request((7,), seed=2, resolution=16), lambda rng: torch.rand(3, generator=rng))
    assert torch.equal(both[1:], lone)


def test_geometric_draws_have_mean_one_over_p() -> None:
    rng = generator(0, "geometric", 0)
    counts = [geometric(rng, 0.4) for _ in range(4000)]
    assert min(counts) == 1
    assert sum(counts) / len(counts) == pytest.approx(2.5, abs=0.1)
