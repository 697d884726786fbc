"""Facts about the Allen-Cahn and Poisson solvers and their data."""

import math

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
import torch

from thalweg.pde.solvers import allen_cahn, poisson, recipes
from thalweg.pde.solvers import spectral_checks as checks
from thalweg.pde.solvers.allen_cahn import AllenCahn, AllenCahnConfig
from thalweg.pde.solvers.seeding import generator


def test_allen_cahn_steps_are_of_fourth_order() -> None:
    assert checks.allen_cahn_order() == pytest.approx(4, abs=0.25)


def test_allen_cahn_follows_the_exact_constant_state() -> None:
    assert checks.allen_cahn_constant() < 1e-5


def test_flat_front_of_allen_cahn_is_steady() -> None:
    """tanh(eps s / sqrt 2) solves the steady equation; fronts half a period apart do not interact."""
    epsilon = 60.0
    x_N = torch.arange(128, dtype=torch.float64) / 128
    s_N = 0.25 - (x_N - 0.5).abs()
    front = torch.tanh(epsilon * s_N / math.sqrt(2))[:, None].expand(128, 128)[None]
    first, last = AllenCahn(AllenCahnConfig(resolution=128, epsilon=epsilon)).snapshots(front, (0.0, 2e-3))
    assert float((last - first).abs().max()) < 2e-4


def test_circle_of_allen_cahn_shrinks_by_its_curvature() -> None:
    """A large disk of one phase loses area at the rate 2 pi, whatever its radius (Allen and Cahn 1979)."""
    n, epsilon, radius, span = 128, 120.0, 0.3, 4e-3
    x_N = torch.arange(n, dtype=torch.float64) / n - 0.5
    r_NN = (x_N[:, None] ** 2 + x_N**2).sqrt()
    disk = torch.tanh(epsilon * (radius - r_NN) / math.sqrt(2))[None]
    first, last = AllenCahn(AllenCahnConfig(resolution=n, epsilon=epsilon)).snapshots(disk, (0.0, span))
    area_lost = float((first - last).mean()) / 2
    assert area_lost == pytest.approx(2 * math.pi * span, rel=0.02)


def test_allen_cahn_data_have_the_published_spread() -> None:
    """Published standard deviation over all frames: 0.654. With 1/K^2 as in the text it is 0.35."""
    made = recipes.get("ACE")
    solution = made.sample(made.request(tuple(range(10)), seed=0, resolution=32))["solution"]
    assert float(solution.std()) == pytest.approx(0.654, abs=0.06)
    assert float(solution.abs().max()) < 1.01


def test_allen_cahn_initial_data_vanish_where_the_sines_do() -> None:
    u_NN = allen_cahn.initial(generator(0, "ACE", 0), 32)
    assert u_NN[0].abs().max() == 0
    assert u_NN[:, 0].abs().max() == 0


def test_poisson_is_exact_for_sines() -> None:
    assert checks.poisson_sine() < 1e-13


def test_poisson_converges_with_second_order_where_the_source_meets_the_wall() -> None:
    assert checks.poisson_order() == pytest.approx(2, abs=0.1)


def test_gaussian_sources_agree_with_finite_differences_in_the_limit() -> None:
    """The five-point scheme converges to our solution with its order, two."""
    centre_2G, width_G = poisson.draw_gaussians(generator(0, "fd", 0))

    def error(n: int) -> float:
        x_N = torch.linspace(0, 1, n, dtype=torch.float64)
        bumps = torch.exp(-((x_N - centre_2G[..., None]) ** 2) / (2 * width_G[:, None] ** 2))
        source = (bumps[0].T @ bumps[1])[1:-1, 1:-1]
        line = (
            scipy.sparse.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(n - 2, n - 2))
            * (n - 1) ** 2
        )
        eye = scipy.sparse.eye_array(n - 2)
        matrix = scipy.sparse.kron(line, eye) + scipy.sparse.kron(eye, line)
        solved = scipy.sparse.linalg.spsolve(matrix.tocsc(), source.numpy().ravel()).reshape(n - 2, n - 2)
        exact = poisson.solve_gaussians(centre_2G, width_G, n)[1:-1, 1:-1].numpy()
        return float(np.linalg.norm(solved - exact) / np.linalg.norm(exact))

    assert checks.slope(error(33), error(65), 2) == pytest.approx(2, abs=0.1)


def test_poisson_data_have_the_statistics_of_the_text() -> None:
    """Mean and standard deviation of the described distribution: f 0.0612, 0.179; u 0.00234, 0.00345."""
    made = recipes.get("Poisson-Gauss")
    fields = made.sample(made.request(tuple(range(300)), seed=0, resolution=32))
    assert float(fields["source"].mean()) == pytest.approx(0.0612, rel=0.1)
    assert float(fields["source"].std()) == pytest.approx(0.179, rel=0.05)
    assert float(fields["solution"].mean()) == pytest.approx(0.00234, rel=0.1)
    assert float(fields["solution"].std()) == pytest.approx(0.00345, rel=0.1)


def test_poisson_solution_vanishes_on_the_boundary() -> None:
    made = recipes.get("Poisson-Gauss")
    u = made.sample(made.request((0, 1), seed=0, resolution=32))["solution"]
    edges = torch.cat([u[:, 0], u[:, -1], u[:, :, 0], u[:, :, -1]], dim=1)
    assert edges.abs().max() == 0
    assert u.min() > -1e-8
