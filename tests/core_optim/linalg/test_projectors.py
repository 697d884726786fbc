import pytest
import torch

from thalweg.core_optim.linalg import projectors as pr


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


CASES = [
    ("columns", torch.tensor([4, 0]), (5, 6)),
    ("columns", torch.tensor([2]), (4,)),
    ("columns", torch.tensor([1]), (2, 3, 3, 2)),
    ("rows", torch.tensor([3, 1]), (5, 6)),
    ("rows", torch.tensor([0]), (2, 3, 3, 2)),
    ("randk", torch.tensor([29, 4, 7]), (5, 6)),
    ("columns", torch.tensor([0]), ()),
    ("columns", torch.tensor([], dtype=torch.int64), (5, 6)),
    ("right", pr.orthonormal(normal(4, 2)), (6, 4)),
    ("left", pr.orthonormal(normal(4, 3)), (4, 6)),
]


@pytest.mark.parametrize(("way", "key", "shape"), CASES)
def test_projection_is_orthogonal(way, key, shape) -> None:
    g = normal(*shape)
    low = pr.project(g, way, key)
    # P P^T = I
    assert torch.allclose(pr.project(pr.embed(low, way, key, shape), way, key), low, atol=1e-12)
    rest = pr.residual(g, way, key)
    assert rest.shape == g.shape
    # the residual has no projected part, and both parts together have the norm of the gradient
    assert pr.project(rest, way, key).abs().sum() < 1e-12
    assert torch.allclose(rest.square().sum() + low.square().sum(), g.square().sum())


@pytest.mark.parametrize(("way", "key", "shape"), CASES)
def test_embedding_is_the_transpose(way, key, shape) -> None:
    g = normal(*shape)
    low = torch.randn_like(pr.project(g, way, key))
    left = (pr.project(g, way, key) * low).sum()
    assert torch.allclose(left, (g * pr.embed(low, way, key, shape)).sum(), atol=1e-12)


def test_chosen_coordinates_have_exactly_no_residual() -> None:
    rest = pr.residual(normal(3, 4), "columns", torch.tensor([1]))
    assert torch.equal(rest[:, 1], torch.zeros(3, dtype=torch.float64))
    assert (rest[:, [0, 2, 3]] != 0).all()


def test_unknown_ways_are_refused() -> None:
    for call in (
        lambda: pr.project(normal(2), "up", normal(1)),
        lambda: pr.coordinate_count((2,), "up", 0.5),
    ):
        with pytest.raises(ValueError, match="'up'"):
            call()
    with pytest.raises(ValueError, match="'up'"):
        pr.embed(normal(1), "up", normal(1), (2,))
    with pytest.raises(ValueError, match="'up'"):
        pr.active_blocks(3, 0.5, 0, "up")


def test_counts_are_rounded_down() -> None:
    assert pr.coordinate_count((12, 7), "columns", 0.25) == 1
    assert pr.coordinate_count((12, 7), "rows", 0.25) == 3
    assert pr.coordinate_count((12, 7), "randk", 0.25) == 21
    assert pr.coordinate_count((), "columns", 1.0) == 1


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5)])
def test_singular_basis_keeps_the_most(shape) -> None:
    g = normal(*shape)
    side = pr.subspace_side(shape)
    basis = pr.svd_basis(g, 2)
    assert basis.shape == (min(shape), 2)
    assert torch.allclose(basis.mT @ basis, torch.eye(2, dtype=torch.float64), atol=1e-12)
    values = torch.linalg.svdvals(g)
    assert torch.allclose(pr.project(g, side, basis).square().sum(), values[:2].square().sum())
    assert torch.allclose(pr.residual(g, side, basis).square().sum(), values[2:].square().sum())


def test_rank_follows_the_smaller_side() -> None:
    assert pr.subspace_rank((100, 10), 0.25) == 2
    assert pr.subspace_rank((10, 100), 0.37) == 4
    assert pr.subspace_rank((10, 100), 0.0) == 0


def test_random_basis_has_no_preferred_sign() -> None:
    first = torch.stack([pr.orthonormal(normal(6, 3, seed=seed))[0, 0] for seed in range(200)])
    assert abs(first.mean().item()) < 0.1
    basis = pr.orthonormal(normal(6, 3))
    assert torch.allclose(basis.mT @ basis, torch.eye(3, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize(
    ("order", "turns"),
    [
        ("ascending", [{0, 1}, {2, 3}, {4, 0}, {1, 2}]),
        ("descending", [{4, 3}, {2, 1}, {0, 4}, {3, 2}]),
        ("mirror", [{0, 4}, {1, 3}, {2, 0}, {4, 1}]),
    ],
)
def test_blocks_take_turns(order, turns) -> None:
    assert [pr.active_blocks(5, 0.4, turn, order) for turn in range(4)] == turns


def test_random_blocks_follow_the_permutation() -> None:
    assert pr.active_blocks(5, 0.4, 7, "random", [3, 1, 0, 2, 4]) == {3, 1}


@pytest.mark.parametrize("order", pr.BLOCK_ORDERS)
def test_densities_zero_and_one(order) -> None:
    assert pr.active_blocks(4, 0.0, 3, order, range(4)) == set()
    assert pr.active_blocks(4, 1.0, 3, order, range(4)) == {0, 1, 2, 3}
    assert pr.active_blocks(0, 1.0, 3, order, []) == set()
