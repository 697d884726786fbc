import pytest
import torch
from drawn_steps import parameters, run, run_in_two
from golden_trajectory import follow, load, trajectories

from thalweg.core_optim.engine.random import Randomness
from thalweg.core_optim.registry import create


class Draws(Randomness):
    """The recorded indices of a golden file in the place of random ones."""

    def __init__(self, data, names) -> None:
        super().__init__()
        self.data, self.names = data, names

    def permutation(self, n, *, step, index, stream=0):
        return self.data[f"index.{step - 1}.{self.names[index]}"]


@pytest.mark.parametrize("path", trajectories("frugal_*.safetensors"), ids=lambda path: path.stem)
def test_golden_trajectory(path) -> None:
    entry, data = load(path)

    def prescribe(optimizer, names) -> None:
        if entry["kwargs"]["split"] == "coord":
            optimizer.random = Draws(data, names)

    assert follow(entry, data, prescribe) < 1.0


SPLITS = [
    {"split": "blocks", "block_order": "random"},
    {"split": "blocks", "block_order": "mirror"},
    {"split": "coord", "coord_choice": "columns"},
    {"split": "coord", "coord_choice": "rows"},
    {"split": "coord", "coord_choice": "randk"},
    {"split": "svd"},
    {"split": "random"},
]
SHAPES = [(4, 6), (6, 4), (5, 5)]


@pytest.mark.parametrize("order", ["random", "ascending", "descending", "mirror"])
def test_all_blocks_without_reset_are_adamw(order) -> None:
    ours, theirs, reset = parameters(*SHAPES), parameters(*SHAPES), parameters(*SHAPES)
    options = {"lr": 0.01, "rho": 1.0, "update_gap": 4, "block_order": order}
    run(create("frugal", ours, reset_statistics=False, **options), ours, 11)
    run(create("frugal", reset, **options), reset, 11)
    run(torch.optim.AdamW(theirs, lr=0.01, weight_decay=0.01, foreach=False), theirs, 11)
    for a, b, c in zip(ours, theirs, reset):
        assert torch.allclose(a, b, rtol=0.0, atol=1e-12)
        assert not torch.allclose(c, b, rtol=0.0, atol=1e-2)


@pytest.mark.parametrize("way", ["columns", "rows", "randk"])
def test_all_coordinates_are_adamw_until_they_are_drawn_again(way) -> None:
    ours, theirs = parameters(*SHAPES), parameters(*SHAPES)
    optimizer = create("frugal", ours, lr=0.01, rho=1.0, split="coord", coord_choice=way)
    run(optimizer, ours, 11)
    run(torch.optim.AdamW(theirs, lr=0.01, weight_decay=0.01, foreach=False), theirs, 11)
    for a, b in zip(ours, theirs):
        assert torch.allclose(a, b, rtol=0.0, atol=1e-12)


def test_without_projection_it_is_adamw() -> None:
    ours, theirs = parameters(*SHAPES, (3,), ()), parameters(*SHAPES, (3,), ())
    run(create("frugal", ours, lr=0.01, proj=False, update_gap=3), ours, 8)
    run(torch.optim.AdamW(theirs, lr=0.01, weight_decay=0.01, foreach=False), theirs, 8)
    for a, b in zip(ours, theirs):
        assert torch.allclose(a, b, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("options", SPLITS, ids=lambda o: "-".join(o.values()))
def test_nothing_projected_is_sign_descent_without_state(options) -> None:
    params = parameters(*SHAPES)
    optimizer = create("frugal", params, lr=0.01, rho=0.0, weight_decay=0.1, update_gap=3, **options)
    for t in range(7):
        before = [p.detach().clone() for p in params]
        run(optimizer, params, 1, start=t)
        for p, old in zip(params, before):
            assert torch.allclose(p, old * (1 - 0.01 * 0.1) - 0.01 * p.grad.sign(), rtol=0.0, atol=1e-15)
            assert optimizer.state[p]["exp_avg"].numel() == 0


@pytest.mark.parametrize("split", ["svd", "random"])
def test_subspace_steps_have_a_projected_and_a_signed_part(split) -> None:
    (p,) = parameters((6, 4))
    before = p.detach().clone()
    options = {"split": split, "rho": 0.5, "weight_decay": 0.0}
    optimizer = create("frugal", [p], lr=0.01, inactive_lr_scale=0.5, proj_lr_scale=2.0, **options)
    run(optimizer, [p], 1)
    basis = optimizer.state[p]["key"]
    assert basis.shape == (4, 2)
    assert torch.allclose(basis.T @ basis, torch.eye(2, dtype=torch.float64), atol=1e-12)
    low = p.grad @ basis
    # the first step of Adam is a sign too
    wanted = low.sign() @ basis.T + 0.5 * (p.grad - low @ basis.T).sign()
    assert torch.allclose(before - p, 0.02 * wanted, atol=1e-8)


@pytest.mark.parametrize("split", ["svd", "random"])
def test_full_subspace_has_no_rest(split) -> None:
    (p,) = parameters((6, 4))
    before = p.detach().clone()
    optimizer = create("frugal", [p], lr=0.01, split=split, rho=1.0, weight_decay=0.0)
    run(optimizer, [p], 1)
    basis = optimizer.state[p]["key"]
    assert torch.allclose(before - p, 0.01 * (p.grad @ basis).sign() @ basis.T, atol=1e-8)


def test_only_active_blocks_have_moments_and_each_gets_its_turn() -> None:
    params = parameters((3, 3), (2, 5), (4,), ())
    optimizer = create("frugal", params, rho=0.5, update_gap=2, block_order="ascending")
    active = []
    for t in range(6):
        run(optimizer, params, 1, start=t)
        active.append([i for i, p in enumerate(params) if optimizer.state[p]["exp_avg"].shape == p.shape])
        assert all(optimizer.state[p]["exp_avg"].numel() in (0, p.numel()) for p in params)
    assert active == [[0, 1], [0, 1], [2, 3], [2, 3], [0, 1], [0, 1]]


def test_moments_restart_with_a_new_projection_unless_told_otherwise() -> None:
    for reset, counts in [(True, [1, 2, 3, 1]), (False, [1, 2, 3, 4])]:
        (p,) = parameters((4, 4))
        optimizer = create("frugal", [p], split="coord", rho=0.5, update_gap=3, reset_statistics=reset)
        found = []
        for t in range(4):
            run(optimizer, [p], 1, start=t)
            found.append(int(optimizer.state[p]["count"]))
        assert found == counts


def test_a_parameter_without_gradients_stops_no_other() -> None:
    first, second = parameters((4, 4), (4, 4))
    optimizer = create("frugal", [first, second], split="coord", rho=0.25, update_gap=2)
    keys = []
    for t in range(8):
        run(optimizer, [second], 1, start=t)
        keys.append(tuple(optimizer.state[second]["key"].tolist()))
    assert first not in optimizer.state
    assert keys[0] == keys[1]
    assert len(set(keys)) > 1


@pytest.mark.parametrize("rule", ["sgd", "none"])
def test_other_rules_for_the_rest(rule) -> None:
    (p,) = parameters((3, 3))
    before = p.detach().clone()
    optimizer = create("frugal", [p], lr=0.1, rho=0.0, weight_decay=0.0, inactive_update_rule=rule)
    run(optimizer, [p], 1)
    assert torch.allclose(before - p, 0.1 * p.grad if rule == "sgd" else torch.zeros_like(p))


@pytest.mark.parametrize("options", SPLITS, ids=lambda o: "-".join(o.values()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_bitwise(options, dtype, tmp_path) -> None:
    options = {"lr": 0.02, "rho": 0.5, "update_gap": 3, **options}
    straight, resumed = parameters(*SHAPES, dtype=dtype), parameters(*SHAPES, dtype=dtype)
    run(create("frugal", straight, **options), straight, 8)
    optimizer = run_in_two(lambda p: create("frugal", p, **options), resumed, 8, 5, tmp_path / "state.pt")
    for a, b in zip(straight, resumed):
        assert torch.equal(a, b)
    for p in resumed:
        assert optimizer.state[p]["count"].dtype == torch.int64
        if options["split"] == "coord":
            assert optimizer.state[p]["key"].dtype == torch.int64


@pytest.mark.parametrize("options", SPLITS, ids=lambda o: "-".join(o.values()))
def test_zero_gradients_at_first_then_training(options) -> None:
    params = parameters(*SHAPES, dtype=torch.float32)
    optimizer = create("frugal", params, lr=0.01, weight_decay=0.0, rho=0.5, **options)
    before = [p.detach().clone() for p in params]
    run(optimizer, params, 3, scale=0.0)
    for p, old in zip(params, before):
        assert torch.equal(p, old)
    run(optimizer, params, 1, start=3)
    for p, old in zip(params, before):
        assert p.isfinite().all()
        assert (p != old).all()
        assert (p - old).abs().max() > 1e-3


def test_bases_stay_orthonormal_with_moments_in_low_precision() -> None:
    (p,) = parameters((6, 4), dtype=torch.float32)
    optimizer = create("frugal", [p], split="random", rho=0.5, state_dtype="bfloat16")
    run(optimizer, [p], 2)
    key = optimizer.state[p]["key"]
    assert key.dtype == torch.float32
    assert torch.allclose(key.T @ key, torch.eye(2), atol=1e-6)
    assert optimizer.state[p]["exp_avg"].dtype == torch.bfloat16


def test_draws_are_those_of_seed_step_and_parameter() -> None:
    keys = []
    for seed, noise in [(0, 1), (0, 2), (1, 1)]:
        torch.manual_seed(noise)
        params = parameters((4, 64), (4, 64))
        optimizer = create("frugal", params, split="coord", seed=seed)
        run(optimizer, params, 1)
        keys.append([optimizer.state[p]["key"].tolist() for p in params])
    assert keys[0] == keys[1]
    assert keys[0] != keys[2]
    assert keys[0][0] != keys[0][1]


def test_subspaces_refuse_what_is_no_matrix() -> None:
    with pytest.raises(ValueError, match="needs a matrix"):
        create("frugal", parameters((3,)), split="svd")
    create("frugal", parameters((3,)), split="svd", proj=False)


@pytest.mark.parametrize(
    "options", [{"rho": 1.5}, {"split": "half"}, {"block_order": "up"}, {"update_gap": 0}]
)
def test_wrong_options_are_refused(options) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        create("frugal", parameters((2, 2)), **options)
