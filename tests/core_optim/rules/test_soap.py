import io

import pytest
import torch
from golden_trajectory import follow, load, trajectories
from torch import nn

from thalweg.core_optim import SOAP
from thalweg.core_optim.linalg import eigenbasis


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("path", trajectories("soap_*.safetensors"), ids=lambda path: path.stem)
def test_golden_trajectory(path, keep: bool) -> None:
    entry, data = load(path)
    entry["kwargs"]["keep_momentum"] = keep
    assert follow(entry, data) < 1.0


def normal(shape, seed: int, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def run(optimizer, params, gradients) -> None:
    """One step per list of gradients, one for each parameter."""
    for step in gradients:
        for p, g in zip(params, step):
            p.grad = g.to(p.dtype, copy=True)
        optimizer.step()


def trained(shapes, gradients, dtype=torch.float64, **options):
    params = [nn.Parameter(normal(s, 50 + k, dtype)) for k, s in enumerate(shapes)]
    optimizer = SOAP(params, **{"lr": 0.1, **options})
    run(optimizer, params, gradients)
    return [p.detach() for p in params], optimizer


def noise(shapes, steps: int, start: int = 0):
    return [[normal(s, 100 * t + k) for k, s in enumerate(shapes)] for t in range(start, start + steps)]


@pytest.mark.parametrize("shape", [(), (4,), (3, 4), (2, 3, 2)])
def test_without_bases_it_is_adam_one_step_late(shape) -> None:
    gradients = noise([shape], 6)
    (found,), optimizer = trained([shape], gradients, max_precond_dim=0, eps=1e-30, weight_decay=0.0)
    p = nn.Parameter(normal(shape, 50))
    run(torch.optim.Adam([p], lr=0.1, betas=(0.95, 0.95), eps=1e-30), [p], gradients[1:])
    assert torch.allclose(found, p, atol=1e-12)
    assert not [name for name in optimizer.state[optimizer.param_groups[0]["params"][0]] if "basis" in name]


def test_axis_aligned_gradients_have_the_identity_for_a_basis() -> None:
    gradients = [[torch.diag(normal((4,), t))] for t in range(6)]
    (found,), _ = trained([(4, 4)], gradients, precondition_frequency=1, weight_decay=0.0)
    p = nn.Parameter(normal((4, 4), 50))
    run(torch.optim.Adam([p], lr=0.1, betas=(0.95, 0.95), eps=1e-8), [p], [[g] for (g,) in gradients[1:]])
    assert torch.allclose(found, p, atol=1e-12)


@pytest.mark.parametrize("frequency", [1, 3])
@pytest.mark.parametrize(("shape", "limit"), [((4, 4), 4), ((4, 6), 4), ((6, 4), 4)])
def test_rotated_gradients_give_rotated_weights(shape, limit: int, frequency: int) -> None:
    # a side above the limit has no basis and is not rotated
    u, v = (torch.linalg.qr(normal((d, d), d))[0] if d <= limit else torch.eye(d).double() for d in shape)
    gradients = noise([shape], 30)
    ends = []
    for left, right in ((torch.eye(shape[0]).double(), torch.eye(shape[1]).double()), (u, v.mT)):
        p = nn.Parameter(left @ normal(shape, 50) @ right)
        optimizer = SOAP([p], lr=0.01, precondition_frequency=frequency, max_precond_dim=limit)
        run(optimizer, [p], [[left @ g @ right] for (g,) in gradients])
        ends.append(p.detach())
    assert torch.allclose(ends[1], u @ ends[0] @ v.mT, atol=1e-12)


def test_the_first_call_moves_nothing_and_does_not_decay() -> None:
    (p,), optimizer = trained([(3, 4)], noise([(3, 4)], 1), weight_decay=0.5)
    assert torch.equal(p, normal((3, 4), 50))
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    g = noise([(3, 4)], 1)[0][0]
    assert torch.allclose(state["outer_1"], 0.05 * g.mT @ g, atol=1e-14)


def test_batches_equal_parameters_on_their_own() -> None:
    shapes = [(3, 4), (3, 4), (4, 3), (2, 3, 2), (5,)]
    gradients = noise(shapes, 8)
    options = {"precondition_frequency": 2, "precondition_1d": True}
    together, _ = trained(shapes, gradients, **options)
    for k, shape in enumerate(shapes):
        p = nn.Parameter(normal(shape, 50 + k))
        run(SOAP([p], lr=0.1, **options), [p], [[step[k]] for step in gradients])
        assert torch.allclose(p, together[k], atol=1e-10)


def test_large_matrices_follow_the_plain_formulas(monkeypatch) -> None:
    gradients = noise([(400, 410)], 4)
    options = {"precondition_frequency": 2, "max_precond_dim": 400}
    (found,), optimizer = trained([(400, 410)], gradients, **options)
    outer = optimizer.state[optimizer.param_groups[0]["params"][0]]["outer_0"]
    wanted = torch.zeros(400, 400, dtype=torch.float64)
    for (g,) in gradients:
        wanted.lerp_(g @ g.mT, 0.05)
    assert torch.allclose(outer.triu(), wanted.triu(), atol=1e-10)
    monkeypatch.setattr("thalweg.core_optim.linalg.symmetric.SMALLEST", 10**6)
    monkeypatch.setattr("thalweg.core_optim.linalg.householder.SMALLEST", 10**6)
    (plain,), _ = trained([(400, 410)], gradients, **options)
    assert torch.allclose(found, plain, atol=1e-8)


def test_refreshes_come_together_or_staggered(monkeypatch) -> None:
    real = eigenbasis.refresh_basis
    counts: list[int] = []

    def counting(average, q):
        counts[-1] += average.shape[0]
        return real(average, q)

    monkeypatch.setattr(eigenbasis, "refresh_basis", counting)
    shapes = [(3, 3)] * 3
    found = {}
    for stagger in (False, True):
        counts.clear()
        params = [nn.Parameter(torch.zeros(s, dtype=torch.float64)) for s in shapes]
        optimizer = SOAP(params, precondition_frequency=3, stagger=stagger)
        for step in noise(shapes, 7):
            counts.append(0)
            run(optimizer, params, [step])
        found[stagger] = list(counts)
    assert found[False] == [0, 0, 0, 6, 0, 0, 6]
    assert found[True] == [0, 2, 2, 2, 2, 2, 2]


@pytest.mark.parametrize("options", [{}, {"merge_dims": True, "precondition_1d": True, "max_precond_dim": 6}])
def test_zero_gradients_then_normal_ones_train(options) -> None:
    shapes = [(3, 4), (4, 3, 2, 2), (5,), ()]
    gradients = [[torch.zeros(s) for s in shapes]] * 3 + noise(shapes, 12)
    params, _ = trained(shapes, gradients, torch.float32, precondition_frequency=2, **options)
    for k, p in enumerate(params):
        assert torch.isfinite(p).all()
        assert (p - normal(shapes[k], 50 + k, torch.float32)).abs().max() > 0.05


def test_zero_gradients_alone_move_nothing() -> None:
    (p,), _ = trained([(3, 4)], [[torch.zeros(3, 4)]] * 5, precondition_frequency=1, weight_decay=0.0)
    assert torch.equal(p, normal((3, 4), 50))


def test_half_precision_keeps_outer_products_and_bases_in_fp32() -> None:
    for state_dtype in (None, "bfloat16", "parameter"):
        params, optimizer = trained(
            [(3, 4)],
            noise([(3, 4)], 6),
            torch.bfloat16,
            precondition_frequency=2,
            state_dtype=state_dtype,
        )
        state = optimizer.state[optimizer.param_groups[0]["params"][0]]
        moment = torch.float32 if state_dtype is None else torch.bfloat16
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == moment
        for mode in (0, 1):
            assert state[f"outer_{mode}"].dtype == state[f"basis_{mode}"].dtype == torch.float32
            q = state[f"basis_{mode}"]
            assert torch.allclose(q.mT @ q, torch.eye(q.shape[0]), atol=1e-5)
        assert torch.isfinite(params[0]).all()


def test_state_goes_through_a_file_bitwise() -> None:
    shapes = [(3, 4), (3, 4), (5,)]
    options = {"precondition_frequency": 2, "lr": 0.1}
    wanted, _ = trained(shapes, noise(shapes, 7), torch.float32, **options)
    halfway, optimizer = trained(shapes, noise(shapes, 4), torch.float32, **options)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    params = [nn.Parameter(p.clone()) for p in halfway]
    resumed = SOAP(params, **options)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    run(resumed, params, noise(shapes, 3, start=4))
    for p, w in zip(params, wanted):
        assert torch.equal(p, w)


def test_transposed_storage_is_the_same_matrix() -> None:
    gradients = noise([(4, 4)], 6)
    p, q = nn.Parameter(torch.zeros(4, 4).double()), nn.Parameter(torch.zeros(4, 4).double().mT)
    run(SOAP([p], precondition_frequency=2), [p], gradients)
    run(SOAP([q], precondition_frequency=2), [q], [[g.mT.contiguous().mT] for (g,) in gradients])
    assert torch.allclose(p, q, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shampoo_beta": -0.5}, "shampoo_beta is -0.5, allowed: -1"),
        ({"precondition_frequency": 0}, "allowed: an integer >= 1"),
        ({"betas": (0.9, 1.0)}, r"allowed: two numbers in \[0, 1\)"),
    ],
)
def test_refusals(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        SOAP([nn.Parameter(torch.zeros(2, 2))], **options)


def test_complex_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="no update for complex numbers"):
        SOAP([nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))])
