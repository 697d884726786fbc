"""Facts about the Helmholtz solver."""

import math

import pytest
import torch

from thalweg.pde.solvers import helmholtz
from thalweg.pde.solvers.seeding import generator


def test_manufactured_solution_converges_with_order_two() -> None:
    assert helmholtz.order() == pytest.approx(2, abs=0.25)


def test_generated_sample_satisfies_the_discrete_equation() -> None:
    assert helmholtz.relative_residual(64) < 1e-10


def test_sine_is_the_discrete_eigenfunction_it_should_be() -> None:
    """u = sin(pi x) sin(2 pi y) is found to round-off with a = 1 and the eigenvalue of the scheme in f."""
    n = 33
    h = 1 / (n - 1)
    x = torch.linspace(0, 1, n, dtype=torch.float64)
    u = torch.sin(math.pi * x)[:, None] * torch.sin(2 * math.pi * x)
    eigenvalue = (4 * math.sin(math.pi * h / 2) ** 2 + 4 * math.sin(math.pi * h) ** 2) / h**2
    one = torch.ones_like(u)
    found = helmholtz.solve(one, torch.zeros_like(u), (eigenvalue - helmholtz.OMEGA**2) * u)
    assert torch.allclose(found, u, rtol=0, atol=1e-11)


def test_boundary_values_are_kept_exactly() -> None:
    edge = torch.arange(16 * 16, dtype=torch.float64).reshape(16, 16)
    u = helmholtz.solve(torch.zeros(16, 16), edge)
    for side in ((0, slice(None)), (-1, slice(None)), (slice(None), 0), (slice(None), -1)):
        assert torch.equal(u[side], edge[side])
    # With a = 0 a field linear in x and y is harmonic.
    assert torch.allclose(u, edge, rtol=0, atol=1e-10)


def test_coefficient_spans_zero_to_one_with_its_wells_inside() -> None:
    for index in range(20):
        a = helmholtz.wells(generator(0, "wells", index), 64)
        assert float(a.min()) == 0.0
        assert float(a.max()) == 1.0
        assert float(a[0, 0]) > 0.9


def test_sample_is_in_the_published_layout() -> None:
    made = helmholtz.recipe("Helmholtz")
    fields = made.sample(made.request((0, 1), seed=0, resolution=32))
    assert {name: tuple(field.shape) for name, field in fields.items()} == {
        "a": (2, 32, 32),
        "u": (2, 32, 32),
        "bc": (2,),
    }
    assert all(field.dtype == torch.float64 for field in fields.values())
    assert ((fields["bc"] >= 0.25) & (fields["bc"] <= 0.5)).all()
    assert torch.equal(fields["u"][:, 0, 5], fields["bc"])


def test_grid_needs_an_interior() -> None:
    with pytest.raises(ValueError, match="at least 3 points per axis, got 2"):
        helmholtz.solve(torch.ones(2, 2), torch.ones(2, 2))
