import pytest
import torch

from thalweg.core_optim.linalg import eigenbasis as eb


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotations(shape: tuple[int, ...], batch: int) -> list[torch.Tensor]:
    return [torch.linalg.qr(normal(batch, d, d, seed=k))[0] for k, d in enumerate(shape)]


@pytest.mark.parametrize(
    ("shape", "limit", "wanted"),
    [
        ((4, 3, 3, 3), 9, (4, 9, 3)),
        ((6, 6), 9, (6, 6)),
        ((3, 3), 10000, (9,)),
        ((20, 3), 9, (20, 3)),
        ((1, 1), 9, (1,)),
        ((5,), 0, (5,)),
    ],
)
def test_merged_shapes(shape, limit, wanted) -> None:
    assert eb.merged_shape(shape, limit) == wanted


@pytest.mark.parametrize("shape", [(4,), (3, 5), (2, 3, 4), (2, 3, 2, 2)])
def test_products_along_modes(shape) -> None:
    x, q = normal(2, *shape), rotations(shape, 2)
    y = eb.project(x, q)
    letters = "abcd"[: len(shape)]
    terms = ",".join(f"z{a}{a.upper()}" for a in letters)
    wanted = torch.einsum(f"z{letters},{terms}->z{letters.upper()}", x, *q)
    assert torch.allclose(y, wanted, atol=1e-13)
    assert torch.allclose(eb.project_back(y, q), x, atol=1e-13)
    single = [q[0], *[None] * (len(shape) - 1)]
    assert torch.allclose(eb.project(x, single), torch.einsum("za...,zab->zb...", x, q[0]), atol=1e-13)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (2, 3, 4)])
def test_change_of_bases_equals_back_and_forth(shape) -> None:
    x, old = normal(2, *shape), rotations(shape, 2)
    new = [q.flip(-1) for q in old]
    wanted = eb.project(eb.project_back(x, old), new)
    assert torch.allclose(eb.change_bases(x, old, new), wanted, atol=1e-13)


@pytest.mark.parametrize("batch", [1, 2])
def test_outer_products_contract_all_other_modes(batch: int) -> None:
    x = normal(batch, 2, 3, 4)
    for mode, size in enumerate((2, 3, 4)):
        rows = x.movedim(1 + mode, 1).reshape(batch, size, -1)
        average = torch.ones(batch, size, size, dtype=torch.float64)
        eb.average_outer_(average, x, mode, 0.25)
        assert torch.allclose(average, 0.75 + 0.25 * rows @ rows.mT, atol=1e-13)


def test_eigenbasis_falls() -> None:
    x = normal(2, 6, 6)
    average = x @ x.mT
    q = eb.eigenbasis(average)
    values = (q.mT @ average @ q).diagonal(dim1=-2, dim2=-1)
    assert (values.diff(dim=-1) < 0).all()
    assert torch.allclose(q @ torch.diag_embed(values) @ q.mT, average, atol=1e-12)


def test_eigenbasis_survives_what_is_not_finite(monkeypatch) -> None:
    average = torch.eye(3).repeat(2, 1, 1)
    average[1, 0, 0] = torch.nan
    assert torch.equal(eb.eigenbasis(average)[1], torch.eye(3))
    real, calls = torch.linalg.eigh, []

    def fails_once(matrix):
        calls.append(matrix.dtype)
        if len(calls) == 1:
            raise torch.linalg.LinAlgError("did not converge")
        return real(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", fails_once)
    q = eb.eigenbasis(average[:1])
    assert calls == [torch.float32, torch.float64]
    assert torch.allclose(q @ q.mT, torch.eye(3))


@pytest.mark.parametrize("batch", [1, 3])
def test_refreshes_converge_to_the_eigenbasis(batch: int) -> None:
    exact = rotations((5,), batch)[0]
    average = exact @ torch.diag(torch.tensor([1.0, 0.3, 0.1, 0.03, 0.01], dtype=torch.float64)) @ exact.mT
    q = torch.eye(5, dtype=torch.float64).repeat(batch, 1, 1)
    for _ in range(40):
        q, _ = eb.refresh_basis(average, q)
    assert torch.allclose(
        (q.mT @ exact).abs(), torch.eye(5, dtype=torch.float64).expand(batch, 5, 5), atol=1e-12
    )


def test_refresh_sorts_and_keeps_a_basis_that_would_break() -> None:
    average = torch.diag(torch.tensor([1.0, 3.0, 2.0]))[None]
    q, order = eb.refresh_basis(average, torch.eye(3)[None])
    assert order.tolist() == [[1, 2, 0]]
    assert torch.equal(q.abs(), torch.eye(3)[:, [1, 2, 0]][None])
    v = torch.tensor([[[10.0, 20.0, 30.0]]])
    assert eb.permute_mode(v, order, 1).tolist() == [[[20.0, 30.0, 10.0]]]
    two = eb.permute_mode(v.repeat(2, 1, 1), torch.tensor([[0, 1, 2], [2, 1, 0]]), 1)
    assert two.tolist() == [[[10.0, 20.0, 30.0]], [[30.0, 20.0, 10.0]]]
    kept, _ = eb.refresh_basis(torch.full((1, 3, 3), torch.nan), torch.eye(3)[None])
    assert torch.equal(kept.sum(-1), torch.ones(1, 3))
