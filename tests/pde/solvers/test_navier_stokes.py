"""Facts about the Navier-Stokes solver: exact solutions, order, conservation, an independent trajectory."""

import itertools
from pathlib import Path

import pytest
import torch
from golden import golden_files
from safetensors.torch import load_file

from thalweg.pde.solvers import flow_initial
from thalweg.pde.solvers import spectral_checks as checks
from thalweg.pde.solvers.navier_stokes import NavierStokes, NavierStokesConfig
from thalweg.pde.solvers.seeding import generator

GOLDEN = golden_files("poseidon", "*ns_shear_layer*.safetensors")


def test_taylor_green_vortex_drifts_and_decays_exactly() -> None:
    assert checks.taylor_green() < 1e-8


def test_time_stepping_is_of_third_order() -> None:
    assert checks.navier_stokes_order() == pytest.approx(3, abs=0.15)


def test_inviscid_truncation_conserves_energy_and_enstrophy_up_to_the_time_error() -> None:
    energy, enstrophy, _ = checks.invariants(0.1)
    assert energy < 1e-7
    assert enstrophy < 1e-6
    assert checks.energy_order() == pytest.approx(3, abs=0.15)


def test_velocity_is_free_of_divergence() -> None:
    assert checks.divergence() < 1e-13


def test_mean_tracer_is_conserved() -> None:
    assert checks.tracer_drift() < 1e-13


def test_mean_velocity_is_conserved() -> None:
    velocity = (
        flow_initial.sines(generator(0, "mean", 0), 32)[None] + torch.tensor([0.4, -0.1])[:, None, None]
    )
    first, last = NavierStokes(NavierStokesConfig(resolution=32)).snapshots(velocity, (0.0, 0.2))
    assert torch.allclose(first.mean((-2, -1)), last.mean((-2, -1)), atol=1e-14)


@pytest.mark.parametrize("path", GOLDEN, ids=[path.stem for path in GOLDEN])
def test_agrees_with_an_independent_solver(path: Path) -> None:
    """A vorticity solver with 2/3 dealiasing and RK4 on 256^2 points made the file."""
    golden = load_file(path)
    velocity_T2NN = golden["velocity"].double()
    config = NavierStokesConfig(resolution=64, viscosity=1e-3, hyperviscosity=0)
    solved = NavierStokes(config).snapshots(velocity_T2NN[:1], golden["time"].tolist())
    for snapshot, expected in itertools.zip_longest(solved, velocity_T2NN):
        assert checks.relative_l2(snapshot[0], expected) < 1e-6


def test_forcing_accelerates_by_its_divergence_free_part() -> None:
    """A (cos s, sin s), s = 2 pi (x + y), projects onto A/2 (cos s - sin s) (1, -1); from rest u = t P f."""
    n, amplitude, time = 32, 0.1, 1e-3
    forcing = flow_initial.kolmogorov_forcing(n, amplitude)
    solver = NavierStokes(NavierStokesConfig(resolution=n))
    *_, last = solver.snapshots(torch.zeros(1, 2, n, n), (0.0, time), forcing_2NN=forcing)
    expected = time / 2 * (forcing[0] - forcing[1])
    assert torch.allclose(last[0], torch.stack([expected, -expected]), atol=1e-9)


def test_hyperviscosity_acts_above_sqrt_n_only() -> None:
    solver = NavierStokes(NavierStokesConfig(resolution=64))
    untouched = solver.damping_NK == 0
    assert torch.equal(untouched, solver.grid.n2 <= 64)
    highest = solver.grid.n2.max()
    assert float(-solver.damping_NK.min()) == pytest.approx(0.05 / 64 * (float(highest) - 64))


def test_samples_do_not_feel_their_batch() -> None:
    """Samples of different speed need different steps, yet each result is bitwise that of the lone run."""
    fields = [0.3 * (i + 1) * flow_initial.sines(generator(0, "batch", i), 32) for i in range(4)]
    tracer = flow_initial.disk(32).expand(4, 32, 32)
    solver = NavierStokes(NavierStokesConfig(resolution=32))

    def run(chosen: slice) -> torch.Tensor:
        return torch.stack(list(solver.snapshots(torch.stack(fields)[chosen], (0, 0.1, 0.3), tracer[chosen])))

    together = run(slice(None))
    for i in range(4):
        assert torch.equal(together[:, i], run(slice(i, i + 1))[:, 0])


def test_single_precision_stays_close_to_double() -> None:
    velocity = flow_initial.sines(generator(0, "precision", 0), 32)[None]
    ends = []
    for dtype in (torch.float32, torch.float64):
        solver = NavierStokes(NavierStokesConfig(resolution=32), dtype=dtype)
        *_, last = solver.snapshots(velocity, (0.0, 0.25))
        assert last.dtype == dtype
        ends.append(last.double())
    assert checks.relative_l2(*ends) < 2e-5


def test_blow_up_is_reported() -> None:
    velocity = torch.stack([flow_initial.sines(generator(0, "nan", i), 16) for i in range(2)])
    velocity[1] = torch.nan
    with pytest.raises(FloatingPointError, match=r"samples \[1\] of the batch blew up"):
        list(NavierStokes(NavierStokesConfig(resolution=16)).snapshots(velocity, (0.0, 0.1)))
