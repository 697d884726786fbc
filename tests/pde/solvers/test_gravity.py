"""Facts about the scheme with gravity: equilibria at rest, small perturbations, order, instability."""

import math

import pytest
import torch

from thalweg.pde.solvers import rayleigh_taylor as rt
from thalweg.pde.solvers.euler import to_conserved, to_primitive
from thalweg.pde.solvers.gravity import GravityEuler, on_square
from thalweg.pde.solvers.marching import march


def run(scheme: GravityEuler, w_CBXY: torch.Tensor, times: tuple[float, ...]) -> torch.Tensor:
    """Primitive states (B, T, C, X, Y) on the unit square."""
    q = march(
        scheme,
        to_conserved(w_CBXY, scheme.gamma),
        times,
        spacing=1.0 / w_CBXY.shape[2],
        cfl=0.8,
        store=lambda q_CBXY: q_CBXY,
    )
    return to_primitive(q.movedim(2, 0), scheme.gamma).movedim(0, 2)


def star() -> rt.Polytrope:
    return rt.Polytrope(
        density=torch.full((1, 1, 1), 1.1, dtype=torch.float64),
        pressure=torch.full((1, 1, 1), 0.9, dtype=torch.float64),
    )


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("cells", [16, 33])
def test_polytrope_stays_at_rest_to_round_off(cells: int, dtype: torch.dtype, bound: float) -> None:
    assert rt.speed_at_rest(cells, time=2.0, dtype=dtype) <= bound


def test_polytrope_is_in_hydrostatic_equilibrium() -> None:
    """Central differences of the closed-form pressure against -rho grad phi, also next to the centre."""
    x = torch.tensor([0.4, 0.2, 1e-2, 1e-3, 2e-4], dtype=torch.float64)[:, None]
    y, h = torch.tensor([[0.3, -0.1]], dtype=torch.float64), 1e-5
    rho = star().rest(x, y)[0]
    slope_x = (star().rest(x + h, y)[1] - star().rest(x - h, y)[1]) / (2 * h)
    slope_y = (star().rest(x, y + h)[1] - star().rest(x, y - h)[1]) / (2 * h)
    assert torch.allclose(torch.stack([slope_x, slope_y]), -rho * star().pull(x, y), rtol=1e-6, atol=1e-9)


def test_small_perturbation_is_followed_linearly() -> None:
    """A pressure bump of 1e-6 answers as one of 1e-4 does, a hundred times smaller: nothing drowns it."""
    scheme = star().scheme(32, torch.float64)
    rho, p = scheme.rest_2BXY[..., 2:-2, 2:-2]
    x = (torch.arange(32, dtype=torch.float64) + 0.5) / 32 - 0.5
    bump = torch.exp(-50 * (x[:, None] ** 2 + (x - 0.1) ** 2))
    answers = []
    for size in (1e-6, 1e-4):
        w = torch.stack([rho, 0 * rho, 0 * rho, p + size * bump])
        answers.append(run(scheme, w, (0.2,))[0, 0, 1:3] / size)
    assert answers[1].abs().max() > 0.02
    assert torch.allclose(answers[0], answers[1], rtol=0, atol=2e-2 * float(answers[1].abs().max()))


def test_moving_exact_solution_converges_with_order_two() -> None:
    """rho = 1 + 0.2 sin s, u = v = 1, p = 8 + (0.2 cos s - s) / pi with s = pi (x + y - 2 t) and phi = x + y.

    Errors count in the part of the square that waves from the boundary have not reached (Chandrashekar and
    Klingenberg 2015, SIAM J. Sci. Comput. 37, section 5).
    """

    def exact(cells: int, t: float) -> torch.Tensor:
        x = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells - 0.5
        s = math.pi * (x[:, None] + x - 2 * t)
        rho, one = 1 + 0.2 * torch.sin(s), torch.ones_like(s)
        return torch.stack([rho, one, one, 8 + 2 * t - (x[:, None] + x) + 0.2 * torch.cos(s) / math.pi])

    def error(cells: int) -> float:
        scheme = on_square(
            cells,
            1.4,
            rest=lambda x, y: torch.stack([0 * x + 0 * y + 1.0, 8.0 - x - y])[:, None],
            pull=lambda x, y: torch.ones(2, 1, len(x), y.shape[1]),
            slope=lambda x, y: torch.zeros(2, 1, len(x), y.shape[1]),
            dtype=torch.float64,
        )
        w = run(scheme, exact(cells, 0.0)[:, None], (0.05,))[0, 0]
        inside = slice(5 * cells // 16, 11 * cells // 16)
        return float((w - exact(cells, 0.05))[:, inside, inside].abs().mean())

    assert math.log2(error(64) / error(128)) == pytest.approx(2, abs=0.25)


def test_denser_gas_on_top_is_unstable_and_below_is_not() -> None:
    """The same wave grows or not, depending on the sign of the Atwood number alone."""
    ratio = {}
    for atwood in (0.1, -0.1):
        numbers = torch.tensor([[1.0, 1.0, atwood, 0.02, 0.0]], dtype=torch.float64)
        scheme = rt.Polytrope(density=numbers[:, :1, None], pressure=numbers[:, 1:2, None]).scheme(
            32, torch.float64
        )
        speed = run(scheme, rt.initial_state(numbers, 32), (1.0, 5.0))[0, :, 1:3].std((1, 2, 3))
        ratio[atwood] = float(speed[1] / speed[0])
    assert ratio[0.1] > 3 * ratio[-0.1]
    assert ratio[0.1] > 3


def test_random_numbers_stay_in_their_ranges() -> None:
    rng = torch.Generator().manual_seed(0)
    numbers = torch.stack([rt.draw_numbers(rng) for _ in range(500)])
    low = torch.tensor([0.8, 0.8, 0.04, -rt.AMPLITUDE, 0.0], dtype=torch.float64)
    high = torch.tensor([1.2, 1.2, 0.06, rt.AMPLITUDE, 2 * math.pi], dtype=torch.float64)
    assert (numbers >= low).all()
    assert (numbers <= high).all()
    # The draws fill their ranges: 500 of them come within two per cent of both ends.
    assert (numbers.amin(0) < low + 0.02 * (high - low)).all()
    assert (numbers.amax(0) > high - 0.02 * (high - low)).all()


def test_pressure_is_continuous_and_density_jumps_at_the_border() -> None:
    numbers = torch.tensor([[1.0, 1.0, 0.05, 0.0, 0.0]], dtype=torch.float64)
    rho, _, _, p, tracer = rt.initial_state(numbers, 256)[:, 0, :, 128]
    jump = (tracer.diff() != 0).nonzero()[0, 0]
    assert float(rho[jump] / rho[jump + 1]) == pytest.approx(1.05 / 0.95, rel=0.02)
    assert float(p[jump] / p[jump + 1]) == pytest.approx(1.0, rel=0.01)
