"""Facts about the wave solver: exact solutions, energy, absorbing sides, media and pulses."""

import math

import pytest
import torch

from thalweg.pde.solvers import wave, wave_checks
from thalweg.pde.solvers.seeding import generator
from thalweg.pde.solvers.wave_solver import Wave, norm, stiffness


def test_travelling_pulse_converges_with_order_four() -> None:
    assert wave_checks.travelling_pulse_order() == pytest.approx(4, abs=0.25)


def test_standing_wave_in_time_is_of_order_four() -> None:
    """A frozen space operator with c dt / h = 0.5, 0.25: the error against a tiny step falls by 16."""
    x = torch.linspace(0, 1, 24, dtype=torch.float64)
    u = wave_checks.round_pulse(x, 0.1)
    c = 1 + 0.5 * (x[:, None] * x)[None]

    def at(cfl: float) -> torch.Tensor:
        return Wave(c, cfl=cfl).advance(u, torch.zeros_like(u), 0.4)[0]

    exact = at(0.02)
    errors = [float((at(cfl) - exact).norm()) for cfl in (0.4, 0.2)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(4, abs=0.25)


def test_operators_sum_by_parts() -> None:
    """M is symmetric and semidefinite, u M u is the exact energy of a line, H integrates cubics exactly."""
    m, h = stiffness(21, width=2.0), norm(21, width=2.0)
    x = torch.linspace(0, 2, 21, dtype=torch.float64)
    assert torch.allclose(m, m.T, rtol=0, atol=1e-12)
    assert torch.linalg.eigvalsh(m)[0] > -1e-12
    assert float(x @ m @ x) == pytest.approx(2.0, rel=1e-12)
    assert float((h * x**3).sum()) == pytest.approx(4.0, rel=1e-12)


def test_energy_is_conserved_until_the_sides_are_reached() -> None:
    assert 0 <= wave_checks.early_loss() < 1e-4


@pytest.mark.parametrize("name", list(wave.MEDIA))
def test_energy_never_grows(name: str) -> None:
    medium, n = wave.MEDIA[name], 48
    both = [
        torch.stack([wave.pulses(generator(5, name, i), n), medium.speed(generator(6, name, i), n)])
        for i in range(3)
    ]
    u, c = torch.stack(both).unbind(1)
    solver, v = Wave(c, medium.width), torch.zeros_like(u)
    energies = [solver.energy(u, v)]
    for _ in range(12):
        u, v = solver.advance(u, v, 0.15)
        energies.append(solver.energy(u, v))
    history = torch.stack(energies)
    assert (history.diff(dim=0) <= 1e-12 * history[0]).all()
    assert (history[-1] < 0.1 * history[0]).all()


def test_sides_absorb_a_front_that_meets_them_head_on() -> None:
    assert wave_checks.plane_reflection(65) < 0.01


def test_sides_reflect_little_of_a_round_front() -> None:
    """Engquist and Majda's first-order condition reflects 0.17 at 45 degrees and nothing head-on."""
    assert wave_checks.round_reflection(65) < 0.1


def test_solution_does_not_depend_on_the_company_in_the_batch() -> None:
    for dtype in ("float32", "float64"):
        made = wave.recipe("Wave-Layer")
        together = made.sample(made.request((0, 1, 2), seed=2, resolution=32, dtype=dtype))
        for index in range(3):
            alone = made.sample(made.request((index,), seed=2, resolution=32, dtype=dtype))
            assert torch.equal(alone["solution"][0], together["solution"][index])


def test_pulses_are_apart_and_have_height_one() -> None:
    for index in range(20):
        u = wave.pulses(generator(0, "pulses", index), 64)
        # Six pulses at most; neighbours overlap, yet none is lost.
        assert 0.9 < float(u.max()) < 4.0
        assert float(u.min()) >= 0.0


def test_layers_have_three_to_six_speeds_in_range() -> None:
    counts = set()
    for index in range(40):
        c = wave.layered_medium(generator(0, "layers", index), 64)
        speeds = c.unique()
        assert 2000 <= float(speeds[0]) <= float(speeds[-1]) <= 5000
        counts.add(len(speeds))
        # Along y the layers follow each other in one order, at every x.
        orders = {tuple(column.unique_consecutive().tolist()) for column in c}
        assert len(orders) == 1
    assert counts == {3, 4, 5, 6}


def test_bumps_only_raise_the_speed() -> None:
    for index in range(20):
        c = wave.bumpy_medium(generator(0, "bumps", index), 64)
        assert float(c.min()) >= 1500
        assert float(c.max()) <= 2500 + 4 * 2500


def test_speeds_must_be_positive() -> None:
    with pytest.raises(ValueError, match="wave speeds must be positive, got a minimum of -1"):
        Wave(torch.full((1, 16, 16), -1.0))


def test_grid_must_hold_the_closures() -> None:
    with pytest.raises(ValueError, match="at least 12 points per axis, got 11"):
        Wave(torch.ones(1, 11, 11))
