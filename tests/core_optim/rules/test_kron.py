import itertools

import pytest
import torch
from drawn_steps import parameters, run, run_in_two
from golden_trajectory import follow, load, trajectories
from torch import nn

from thalweg.core_optim.registry import create
from thalweg.core_optim.rules import kron


class Probes:
    """The probes of a golden file in the place of random ones."""

    def __init__(self, data, names) -> None:
        self.data, self.names, self.drawn = data, names, []

    def normal(self, shape, *, step, index, like, stream=0):
        self.drawn.append(step - 1)
        probe = self.data[f"probe.{step - 1}.{self.names[index]}"]
        assert probe.shape == torch.Size(shape)
        return probe.to(like)


@pytest.mark.parametrize("path", trajectories("kron_*.safetensors"), ids=lambda path: path.stem)
def test_golden_trajectory(path) -> None:
    entry, data = load(path)
    probes = []

    def prescribe(optimizer, names) -> None:
        optimizer.random = Probes(data, names)
        probes.append(optimizer.random)

    assert follow(entry, data, prescribe) < 1.0
    assert sorted(set(probes[0].drawn)) == entry["update_steps"]
    balanced = [t for t in entry["update_steps"] if t + 1 in kron.balance_steps(42, 0.01)]
    assert balanced == entry["balance_steps"]


def test_constant_probabilities_fire_at_fixed_intervals() -> None:
    for probability, interval in [(1.0, 1), (0.5, 2), (0.3, 4), (0.01, 100)]:
        steps = kron.update_steps(probability)
        assert [t for t in range(1, 401) if t in steps] == list(range(interval, 401, interval))
    assert not any(t in kron.update_steps(0.0) for t in range(1, 1000))


def test_annealed_schedule_starts_dense_and_ends_at_its_floor() -> None:
    steps = kron.update_steps(tuple(sorted(kron.ANNEALED.items())))
    # asked for late steps first: what happens depends on the step alone
    late = [t for t in range(6000, 6400) if t in steps]
    assert {b - a for a, b in itertools.pairwise(late)} == {34}
    assert all(t in steps for t in range(1, 502))
    assert 0 < sum(t in steps for t in range(1000, 1100)) < 70


def test_no_update_leaves_the_momentum_alone() -> None:
    (p,) = parameters((4, 3))
    before = p.detach().clone()
    optimizer = create("kron", [p], lr=0.1, b1=0.0, preconditioner_update_probability=0.0)
    p.grad = torch.full_like(p, 5.0)
    optimizer.step()
    # clipped to a root mean square of 1.1
    assert torch.allclose(before - p, torch.full_like(p, 0.11), atol=1e-12)


def test_factors_are_triangular_or_diagonal() -> None:
    params = parameters((5, 4), (6,), (), (3, 1), (4, 3, 2, 2))
    optimizer = create("kron", params, preconditioner_update_probability=1.0)
    run(optimizer, params, 5)
    shapes = [[tuple(v.shape) for k, v in optimizer.state[p].items() if "factor" in k] for p in params]
    assert shapes == [[(5, 5), (4, 4)], [(6,)], [(1,)], [(3, 3), (1,)], [(24, 24), (2, 2)]]
    for p in params:
        for name, value in optimizer.state[p].items():
            if "factor" in name and value.ndim == 2:
                assert torch.equal(value, value.triu())
                assert not torch.equal(value, value.diag().diag())


def test_only_matrices_decay() -> None:
    params = parameters((3, 3), (3,), ())
    before = [p.detach().clone() for p in params]
    optimizer = create("kron", params, lr=0.1, weight_decay=0.5)
    run(optimizer, params, 1, scale=0.0)
    assert torch.allclose(params[0], before[0] * 0.95)
    assert torch.equal(params[1], before[1])
    assert torch.equal(params[2], before[2])


def test_zero_gradients_at_first_do_not_inflate_the_preconditioner() -> None:
    params = parameters((4, 3), (5,), (), dtype=torch.float32)
    optimizer = create("kron", params, lr=0.01, preconditioner_update_probability=1.0)
    run(optimizer, params, 3, scale=0.0)
    assert torch.equal(optimizer.state[params[0]]["factor_0"], torch.eye(4))
    before = [p.detach().clone() for p in params]
    run(optimizer, params, 3, start=3)
    for p, old in zip(params, before):
        assert p.isfinite().all()
        assert 1e-3 < (p - old).abs().max() < 0.2


def test_batches_of_equal_shapes_equal_separate_groups() -> None:
    together, apart = parameters((4, 3), (4, 3), (4, 3)), parameters((4, 3), (4, 3), (4, 3))
    first = create("kron", together, lr=0.05)
    second = create("kron", [{"params": [p]} for p in apart], lr=0.05)
    run(first, together, 6)
    run(second, apart, 6)
    for a, b in zip(together, apart):
        assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("probability", [0.3, None, {"flat_start": 2.0, "decay": 0.5, "min": 0.2}])
def test_resume_is_bitwise(probability, tmp_path) -> None:
    options = {"lr": 0.02, "preconditioner_update_probability": probability, "balance_probability": 0.5}
    straight, resumed = parameters((4, 3), (5,)), parameters((4, 3), (5,))
    run(create("kron", straight, **options), straight, 9)
    run_in_two(lambda p: create("kron", p, **options), resumed, 9, 4, tmp_path / "state.pt")
    for a, b in zip(straight, resumed):
        assert torch.equal(a, b)


def test_probes_are_those_of_seed_step_and_parameter() -> None:
    results = []
    for seed, noise in [(0, 1), (0, 2), (1, 1)]:
        torch.manual_seed(noise)
        params = parameters((4, 3))
        run(create("kron", params, lr=0.1, seed=seed), params, 3)
        results.append(params[0].detach())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    "options",
    [
        {"memory_save_mode": "some_diag"},
        {"preconditioner_update_probability": 1.5},
        {"preconditioner_update_probability": {"maximum": 1.0}},
        {"merge_dims": "cube"},
        {"b1": 1.0},
    ],
)
def test_wrong_options_are_refused(options) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        create("kron", parameters((2, 2)), **options)


@pytest.mark.parametrize(("mode", "updates"), [(None, 3000), ("smart_one_diag", 1000)])
def test_gradients_become_white(mode, updates) -> None:
    """The property that the oracle states in words: gradients L N R with normal N."""
    source = torch.Generator().manual_seed(0)

    def mixing(size: int) -> torch.Tensor:
        return torch.eye(size) + 0.3 * torch.randn(size, size, generator=source)

    left, right = mixing(8), mixing(6)
    if mode:
        # a diagonal factor cannot undo a mixture of rows, only their scales
        left = left.diag().abs().diag()
    p = nn.Parameter(torch.zeros(8, 6))
    optimizer = create(
        "kron",
        [p],
        lr=0.0,
        b1=0.0,
        preconditioner_update_probability=1.0,
        precond_lr=0.1,
        memory_save_mode=mode,
    )
    for _ in range(updates):
        p.grad = left @ torch.randn(8, 6, generator=source) @ right
        optimizer.step()
    state = optimizer.state[p]
    factors = [f.diag() if f.ndim == 1 else f for f in (state["factor_0"], state["factor_1"])]
    samples = left @ torch.randn(20000, 8, 6, generator=source) @ right
    white = (factors[0].T @ factors[0] @ samples @ factors[1].T @ factors[1]).flatten(1)
    covariance = white.T @ white / len(white)
    diagonal = covariance.diagonal()
    assert 0.8 < diagonal.mean() < 1.5
    off = covariance - diagonal.diag()
    assert (off.square().sum() / (48 * 47)).sqrt() < 0.15
