import pytest
import torch

from thalweg.core_optim.linalg import psgd


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def triangular(batch: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.eye(size, dtype=torch.float64) + 0.3 * normal(batch, size, size, seed=seed).triu()


@pytest.mark.parametrize(
    ("shape", "merge", "merged"),
    [
        ((), True, (1,)),
        ((5,), True, (5,)),
        ((5, 7), "square", (5, 7)),
        ((4, 3, 3, 3), True, (36, 3)),
        ((4, 3, 3, 3), "square", (4, 27)),
        ((4, 3, 3, 3), False, (4, 3, 3, 3)),
        ((8, 2, 8), True, (16, 8)),
    ],
)
def test_shapes_are_merged_to_matrices(shape, merge, merged) -> None:
    assert psgd.merged_shape(shape, merge) == merged


def test_unknown_merge_is_refused() -> None:
    with pytest.raises(ValueError, match="'cube'"):
        psgd.merged_shape((2, 2, 2), "cube")


@pytest.mark.parametrize(
    ("shape", "options", "diagonal"),
    [
        ((6, 4), {}, (False, False)),
        ((7,), {}, (True,)),
        ((7,), {"min_ndim": 1}, (False,)),
        ((6, 1), {}, (False, True)),
        ((6, 40), {"max_size": 39}, (False, True)),
        ((6, 4), {"memory_save_mode": "one_diag"}, (True, False)),
        ((4, 4), {"memory_save_mode": "one_diag"}, (False, True)),
        ((4, 4), {"memory_save_mode": "smart_one_diag"}, (False, False)),
        ((4, 6), {"memory_save_mode": "smart_one_diag"}, (False, True)),
        ((6, 4), {"memory_save_mode": "all_diag"}, (True, True)),
    ],
)
def test_which_factors_are_diagonal(shape, options, diagonal) -> None:
    assert psgd.diagonal_modes(shape, **options) == diagonal


def test_unknown_memory_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="two_diag"):
        psgd.diagonal_modes((2, 2), memory_save_mode="two_diag")


def test_precondition_is_the_kronecker_product() -> None:
    factors = [triangular(2, 3, seed=1), normal(2, 4, seed=2).abs() + 0.5, triangular(2, 2, seed=3)]
    g = normal(2, 3, 4, 2, seed=4)
    found = psgd.precondition(factors, g)
    for b in range(2):
        whole = torch.kron(torch.kron(factors[0][b], factors[1][b].diag()), factors[2][b])
        assert torch.allclose(found[b].flatten(), whole.mT @ whole @ g[b].flatten(), atol=1e-12)


@pytest.mark.parametrize("mode", [0, 1, 2])
@pytest.mark.parametrize("diagonal", [True, False])
def test_inverse_transpose_undoes_transpose(mode, diagonal) -> None:
    x = normal(2, 3, 4, 5)
    size = x.shape[mode + 1]
    factor = normal(2, size, seed=5).abs() + 0.5 if diagonal else triangular(2, size, seed=5)
    there = psgd.apply_factor(x, factor, mode, transpose=True)
    assert torch.allclose(psgd.apply_inverse_transpose(there, factor, mode), x, atol=1e-12)


def test_norm_lower_bound_is_below_the_norm_and_close_for_a_dominant_direction() -> None:
    x = normal(50, 6, 6)
    symmetric = x @ x.mT
    bound = psgd.norm_lower_bound(symmetric)
    exact = torch.linalg.matrix_norm(symmetric, 2)
    assert (bound <= exact * (1 + 1e-12)).all()
    assert (bound >= 0.7 * exact).all()
    vector = normal(6, seed=1)
    single = vector.outer(vector)[None]
    assert torch.allclose(psgd.norm_lower_bound(single), vector.square().sum()[None])
    assert psgd.norm_lower_bound(torch.zeros(1, 3, 3)).item() == 0.0


def test_balance_equalises_entries_and_keeps_the_product() -> None:
    factors = [triangular(1, 3) * 50.0, normal(1, 4).abs() * 0.01]
    balanced = psgd.balance(factors)
    sizes = [factor.abs().max() for factor in balanced]
    assert torch.allclose(sizes[0], sizes[1])
    before = torch.kron(factors[0][0], factors[1][0].diag())
    assert torch.allclose(torch.kron(balanced[0][0], balanced[1][0].diag()), before)


def test_update_keeps_factors_triangular_and_ignores_a_zero_gradient() -> None:
    factors = [triangular(2, 4, seed=1), triangular(2, 3, seed=2)]
    g = normal(2, 4, 3, seed=3)
    g[1] = 0.0
    updated = psgd.update_factors(factors, g, normal(2, 4, 3, seed=4), 0.1)
    for old, new in zip(factors, updated):
        assert torch.equal(new, new.triu())
        assert not torch.equal(new[0], old[0])
        assert torch.equal(new[1], old[1])


def test_update_stands_still_where_the_gradient_is_already_white() -> None:
    # A = B means that the fit sees no difference between P^(1/2) g and white noise
    factors = [torch.eye(4, dtype=torch.float64)[None], torch.ones(1, 3, dtype=torch.float64)]
    v = normal(1, 4, 3)
    for old, new in zip(factors, psgd.update_factors(factors, v, v, 0.1)):
        assert torch.allclose(old, new, atol=1e-14)


def test_batch_equals_one_by_one() -> None:
    factors = [triangular(3, 4, seed=1), normal(3, 5, seed=2).abs() + 0.1]
    g, v = normal(3, 4, 5, seed=3), normal(3, 4, 5, seed=4)
    together = psgd.update_factors(factors, g, v, 0.1)
    for b in range(3):
        one = slice(b, b + 1)
        alone = psgd.update_factors([f[one] for f in factors], g[one], v[one], 0.1)
        for x, y in zip(together, alone):
            assert torch.allclose(x[one], y, atol=1e-13)


def test_noise_is_small_against_each_gradient() -> None:
    g = torch.stack([torch.full((3, 3), 2.0), torch.zeros(3, 3)])
    v = torch.ones_like(g)
    noisy = psgd.add_noise(g, v)
    assert torch.allclose(noisy[0], torch.full((3, 3), 2.0 + 2.0 * 2.0**-11.5))
    assert torch.equal(noisy[1], g[1])


def test_clip_rms_only_shrinks() -> None:
    u = torch.stack([torch.full((2, 2), 4.0), torch.full((2, 2), 0.5)])
    clipped = psgd.clip_rms(u)
    assert torch.allclose(clipped[0], torch.full((2, 2), 1.1))
    assert torch.equal(clipped[1], u[1])
    assert torch.equal(psgd.clip_rms(torch.zeros(1, 3)), torch.zeros(1, 3))


def test_scaled_identity_is_the_start() -> None:
    like = torch.zeros((), dtype=torch.float64)
    factors = [psgd.initial_factor(3, False, 4.0, 2, like), psgd.initial_factor(2, True, 4.0, 2, like)]
    assert torch.equal(factors[0], 2.0 * torch.eye(3, dtype=torch.float64))
    assert torch.equal(factors[1], torch.full((2,), 2.0, dtype=torch.float64))
