import math

import pytest
import torch

from thalweg.core_optim.linalg import newton_schulz as ns

A, B, C = ns.QUINTIC
LIMIT = 1.2024


def rotation(rows: int, columns: int, seed: int) -> torch.Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=source, dtype=torch.float64))[0]


def matrix(rows: int, columns: int, values: torch.Tensor) -> torch.Tensor:
    return (rotation(rows, rows, 1) * values) @ rotation(columns, rows, 2).mT


def spectra(rows: int) -> dict[str, torch.Tensor]:
    """Singular values, none below 5e-3 of the Frobenius norm."""
    one = torch.ones(1, dtype=torch.float64)
    found = {
        "equal": torch.ones(rows, dtype=torch.float64),
        "one large": torch.cat([one, torch.full((rows - 1,), 5.2e-3, dtype=torch.float64)]),
        "spread": torch.logspace(-1.2, 0, rows, dtype=torch.float64),
    }
    assert all((s / s.norm()).min() >= 5e-3 for s in found.values())
    return found


@pytest.mark.parametrize("steps", [1, 5, 6])
def test_each_step_maps_the_singular_values(steps: int) -> None:
    values = torch.tensor([1.0, 0.5, 0.05, 0.003], dtype=torch.float64)
    u, v = rotation(4, 4, 1), rotation(7, 4, 2)
    s = values / values.norm()
    for _ in range(steps):
        s = A * s + B * s**3 + C * s**5
    found = ns.newton_schulz((u * values) @ v.mT, steps)
    assert torch.allclose(found, (u * s) @ v.mT, atol=1e-12)


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4)])
def test_orientation_scale_and_rotations(shape: tuple[int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    o = ns.newton_schulz(x)
    u, v = rotation(shape[0], shape[0], 3), rotation(shape[1], shape[1], 4)
    assert torch.allclose(ns.newton_schulz(1e5 * x), o, atol=1e-10)
    assert torch.allclose(ns.newton_schulz(x.mT), o.mT, atol=1e-12)
    assert torch.allclose(ns.newton_schulz(u @ x @ v), u @ o @ v, atol=1e-12)
    assert torch.allclose(ns.newton_schulz(torch.stack([x, -x])), torch.stack([o, -o]), atol=1e-12)


@pytest.mark.parametrize("name", ["equal", "one large", "spread"])
@pytest.mark.parametrize(
    ("rows", "columns", "dtype", "gram", "slack"),
    [
        (16, 40, "fp64", False, 0.0),
        (16, 40, "fp64", True, 0.0),
        (16, 40, "bf16", False, 5e-3),
        (144, 300, "bf16", True, 5e-3),
        (144, 300, "fp32", True, 1e-3),
    ],
)
def test_singular_values_stay_in_bounds(name, rows, columns, dtype, gram, slack) -> None:
    x = matrix(rows, columns, spectra(rows)[name])
    assert gram is False or ns._gram_steps([ns.QUINTIC] * 5) == 3
    found = ns.newton_schulz(x.float() if dtype != "fp64" else x, dtype=ns.DTYPES[dtype], gram=gram)
    s = torch.linalg.svdvals(found.double())
    assert s.min() >= 0.68 - slack
    assert s.max() <= LIMIT + slack
    tall = ns.newton_schulz(x.mT.contiguous(), dtype=ns.DTYPES[dtype], gram=gram)
    assert torch.linalg.svdvals(tall.double()).max() <= LIMIT + slack


def test_steps_on_the_gram_matrix_equal_the_plain_iteration() -> None:
    x = torch.randn(260, 520, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain = ns.newton_schulz(x, gram=False)
    assert torch.allclose(ns.newton_schulz(x, gram=True), plain, atol=1e-11)
    assert torch.allclose(ns.newton_schulz(x), plain, atol=1e-11)
    assert torch.allclose(ns.newton_schulz(x.mT, gram=True), plain.mT, atol=1e-11)


def test_gram_matrices_are_not_carried_over_steep_steps() -> None:
    steep, mild = (8.2, -22.9, 16.5), (1.875, -1.25, 0.375)
    assert ns._gram_steps([steep, steep, mild]) == 0
    assert ns._gram_steps([steep, mild, mild, mild]) == 3
    assert ns._gram_steps([mild]) == 0


def test_other_schedules_converge_to_the_polar_factor() -> None:
    x = matrix(8, 12, torch.linspace(0.3, 1.0, 8, dtype=torch.float64))
    found = ns.newton_schulz(x, 12, coefficients=[ns.QUINTIC] * 4 + [(1.875, -1.25, 0.375)])
    assert torch.allclose(found, ns.polar_factor(x), atol=1e-12)
    loose = ns.newton_schulz(x)
    cosine = (loose * ns.polar_factor(x)).sum() / (loose.norm() * ns.polar_factor(x).norm())
    assert cosine > 0.98


def test_polar_factor_leaves_the_null_space_alone() -> None:
    x = matrix(3, 4, torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64))
    s = torch.linalg.svdvals(ns.polar_factor(x))
    assert torch.allclose(s, torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64), atol=1e-12)


def test_zero_stays_zero() -> None:
    for dtype in ns.DTYPES.values():
        assert torch.equal(ns.newton_schulz(torch.zeros(3, 5), dtype=dtype), torch.zeros(3, 5))


def test_number_type_of_the_iteration(monkeypatch) -> None:
    monkeypatch.setattr(ns, "_cpu_has_bf16", lambda: True)
    assert ns.iteration_dtype("auto", torch.zeros(128, 128)) == torch.bfloat16
    assert ns.iteration_dtype("auto", torch.zeros(127, 500)) == torch.float32
    assert ns.iteration_dtype("auto", torch.zeros(128, 128).double()) == torch.float64
    assert ns.iteration_dtype("fp32", torch.zeros(128, 128)) == torch.float32
    monkeypatch.setattr(ns, "_cpu_has_bf16", lambda: False)
    assert ns.iteration_dtype("auto", torch.zeros(128, 128)) == torch.float32
    with pytest.raises(ValueError, match="'half', allowed: auto, bf16, fp32, fp64"):
        ns.iteration_dtype("half", torch.zeros(1, 1))


def test_matrices_of_one_oriented_shape_are_batched(monkeypatch) -> None:
    source = torch.Generator().manual_seed(0)
    shapes = [(3, 5), (5, 3), (4, 4), (3, 5), (200, 150)]
    xs = [torch.randn(shape, generator=source, dtype=torch.float64) for shape in shapes]
    seen = []
    real = ns.newton_schulz
    monkeypatch.setattr(ns, "newton_schulz", lambda x, **o: seen.append(tuple(x.shape)) or real(x, **o))
    found = ns.orthogonalise(xs, "auto", steps=5, eps=1e-7)
    assert seen == [(3, 3, 5), (4, 4), (200, 150)]
    for x, o in zip(xs, found):
        assert torch.allclose(o, real(x), atol=1e-12)


@pytest.mark.parametrize(
    ("convention", "wide", "tall"),
    [
        ("original", 1.0, 2.0),
        ("match_rms_adamw", 0.8, 0.8),
        ("spectral", 0.5, 2.0),
        ("none", 1.0, 1.0),
    ],
)
def test_scales(convention: str, wide: float, tall: float) -> None:
    assert math.isclose(ns.muon_scale(4, 16, convention), wide)
    assert math.isclose(ns.muon_scale(16, 4, convention), tall)


def test_unknown_scale() -> None:
    with pytest.raises(ValueError, match="'half', allowed: original, match_rms_adamw, spectral, none"):
        ns.muon_scale(1, 1, "half")
