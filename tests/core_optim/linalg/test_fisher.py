import json

import pytest
import torch
from golden import golden_files
from safetensors.torch import load_file

from thalweg.core_optim.linalg import fisher

DAMPING = 1e-3


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(window: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    window = window.double()
    return damping * torch.eye(window.shape[1], dtype=torch.float64) + window.mT @ window / len(window)


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


def recursion(window: torch.Tensor, x: torch.Tensor, damping: float) -> torch.Tensor:
    """Static recursion of the paper: rank-one updates of the inverse, one gradient at a time."""
    vectors, scales = [], []

    def product(y: torch.Tensor) -> torch.Tensor:
        result = y / damping
        for v, q in zip(vectors, scales):
            result = result - v * (v @ y) / q
        return result

    for g in window:
        v = product(g)
        vectors.append(v)
        scales.append(len(window) + g @ v)
    return product(x)


@pytest.mark.parametrize(("rows", "columns"), [(1, 7), (8, 30), (30, 8)])
def test_products_equal_the_dense_inverse(rows, columns) -> None:
    window, x = normal(rows, columns), normal(columns, seed=1)
    exact = torch.linalg.inv(dense(window))
    inverse = fisher.FisherInverse(window, DAMPING)
    assert relative(inverse.ihvp(x), exact @ x) < 6e-10
    assert relative(inverse.diagonal(), exact.diagonal()) < 6e-10
    i, j = torch.arange(columns), torch.arange(columns).flip(0)
    assert relative(inverse.elements(i, j), exact[i, j]) < 6e-10


def test_one_gradient_is_sherman_morrison() -> None:
    g, x = normal(9), normal(9, seed=1)
    wanted = x / DAMPING - g * (g @ x) / DAMPING**2 / (1 + g @ g / DAMPING)
    assert relative(fisher.FisherInverse(g[None], DAMPING).ihvp(x), wanted) < 1e-10


def test_recursion_of_the_paper_equals_the_closed_form() -> None:
    window, x = normal(12, 20), normal(20, seed=1)
    assert relative(recursion(window, x, DAMPING), fisher.FisherInverse(window, DAMPING).ihvp(x)) < 6e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_windows_are_exact_for_what_they_hold(dtype) -> None:
    window = normal(16, 40).to(dtype)
    x = normal(40, seed=1).float()
    wanted = torch.linalg.solve(dense(window, 1e-6), x.double())
    assert relative(fisher.FisherInverse(window, 1e-6).ihvp(x), wanted) < 1e-7


def test_replacing_rows_past_the_end_equals_rebuilding() -> None:
    window, gram = torch.zeros(5, 11, dtype=torch.float64), torch.zeros(5, 5, dtype=torch.float64)
    gradients = normal(13, 11)
    for t, g in enumerate(gradients):
        fisher.replace_row(window, gram, t % 5, g)
    assert torch.equal(window, gradients[[10, 11, 12, 8, 9]])
    assert torch.allclose(gram, fisher.window_gram(window), atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_row_of_the_window_needs_no_division_by_the_damping(dtype) -> None:
    window = normal(12, 300).to(dtype)
    damping = 1e-5
    weights = fisher.row_weights(fisher.window_gram(window), 5, damping)
    found = fisher.window_combine(window, weights, dtype)
    wanted = torch.linalg.solve(dense(window, damping), window[5].double())
    assert found.dtype == dtype
    assert relative(found, wanted) < (1e-8 if dtype == torch.float64 else 1e-6)


def test_chunks_do_not_change_products(monkeypatch) -> None:
    window, x, y = normal(6, 50), normal(50, seed=1), normal(6, seed=2)
    whole = (fisher.window_gram(window), fisher.window_dot(window, x), fisher.window_combine(window, y))
    diagonal = fisher.FisherInverse(window, DAMPING).diagonal()
    blocks = fisher.BlockFisherInverse(window, DAMPING, 4).ihvp(x)
    monkeypatch.setattr(fisher, "CHUNK", 60)
    parts = (fisher.window_gram(window), fisher.window_dot(window, x), fisher.window_combine(window, y))
    for a, b in zip(whole, parts):
        assert torch.allclose(a, b, atol=1e-12)
    assert torch.allclose(fisher.FisherInverse(window, DAMPING).diagonal(), diagonal)
    assert torch.allclose(fisher.BlockFisherInverse(window, DAMPING, 4).ihvp(x), blocks)


@pytest.mark.parametrize("size", [1, 3, 5, 7])
def test_blocks_equal_the_dense_block_diagonal(size) -> None:
    window, x = normal(8, 17), normal(17, seed=1)
    place = torch.arange(17) // size
    exact = torch.linalg.inv(torch.where(place[:, None] == place, dense(window), 0.0))
    inverse = fisher.fisher_inverse(window, DAMPING, size)
    assert isinstance(inverse, fisher.BlockFisherInverse)
    assert relative(inverse.ihvp(x), exact @ x) < 6e-10
    assert relative(inverse.diagonal(), exact.diagonal()) < 6e-10
    i, j = torch.tensor([0, 16, 4, 5, 2]), torch.tensor([1, 15, 4, 6, 9])
    assert relative(inverse.elements(i, j), exact[i, j]) < 6e-10


def test_removing_one_weight_solves_the_constrained_quadratic() -> None:
    window, weights = normal(12, 20), normal(20, seed=1)
    fisher_DD = dense(window, 0.1)
    inverse = fisher.FisherInverse(window, 0.1)
    scores = fisher.obs_scores(weights, inverse.diagonal())
    for j in range(20):
        change = fisher.obs_update(inverse, weights, torch.tensor([j]))
        # Karush-Kuhn-Tucker: F d + mu e_j = 0 and d_j = -w_j
        system = torch.zeros(21, 21, dtype=torch.float64)
        system[:20, :20], system[20, j], system[j, 20] = fisher_DD, 1.0, 1.0
        wanted = torch.linalg.solve(system, torch.cat([torch.zeros(20).double(), -weights[j : j + 1]]))[:20]
        assert relative(change, wanted) < 1e-11
        rise = 0.5 * change @ fisher_DD @ change
        assert rise.item() == pytest.approx(scores[j].item(), rel=1e-10)


def test_joint_removal_solves_the_constrained_quadratic_and_is_cheapest() -> None:
    window, weights = normal(12, 20), normal(20, seed=1)
    fisher_DD = dense(window, 0.1)
    removed = torch.zeros(20, dtype=torch.bool)
    removed[[1, 4, 5, 11, 17]] = True
    change = fisher.joint_update(window, 0.1, weights, removed)
    assert torch.equal(change[removed], -weights[removed])
    assert (fisher_DD @ change)[~removed].abs().max() < 1e-12
    single = fisher.obs_update(fisher.FisherInverse(window, 0.1), weights, removed.nonzero()[:, 0])
    single[removed] = -weights[removed]
    bare = torch.where(removed, -weights, 0.0)
    rise = [0.5 * (d @ fisher_DD @ d).item() for d in (change, single, bare)]
    assert rise[0] < rise[1]
    assert rise[0] < rise[2]


@pytest.mark.parametrize(
    ("window", "damping", "message"),
    [(torch.zeros(3), 0.1, "two dimensions"), (torch.zeros(2, 3), 0.0, "damping")],
)
def test_wrong_windows_are_refused(window, damping, message) -> None:
    with pytest.raises(ValueError, match=message):
        fisher.FisherInverse(window, damping)


def test_wrong_block_size_is_refused() -> None:
    with pytest.raises(ValueError, match="block_size"):
        fisher.BlockFisherInverse(torch.zeros(2, 3), 0.1, 0)


@pytest.mark.parametrize("path", golden_files("optim", "mfac_query.safetensors"), ids=lambda path: path.stem)
def test_queries_equal_the_published_static_algorithm(path) -> None:
    entries = json.loads((path.parent / "index.json").read_text())
    entry = next(e for e in entries if e["file"] == path.name)
    data, atol = load_file(path), entry["atol_by"]
    inverse = fisher.FisherInverse(data["G"], entry["kwargs"]["damping"])
    diagonal = inverse.diagonal()
    scores = fisher.obs_scores(data["weights"], diagonal)
    found = {
        "ihvp": inverse.ihvp(data["x"]),
        "diag": diagonal,
        "elements": inverse.elements(*data["pairs"].T),
        "obs_scores": scores,
        "obs_update": fisher.obs_update(inverse, data["weights"], data["obs_index"]),
    }
    assert scores.argmin() == data["obs_index"]
    for name, value in found.items():
        torch.testing.assert_close(value, data[name], rtol=entry["rtol"], atol=atol[name])
        # everything is in float64 here
        assert relative(value, data[name]) < 1e-8
