import pytest
import torch
from drawn_steps import gradients, parameters, run, run_in_two
from golden_trajectory import follow, load, trajectories
from torch import nn

from thalweg.core_optim.registry import create


@pytest.mark.parametrize(
    "path",
    [p for p in trajectories("mfac_*.safetensors") if p.stem != "mfac_query"],
    ids=lambda path: path.stem,
)
def test_golden_trajectory(path) -> None:
    assert follow(*load(path)) < 1.0


SHAPES = [(3, 4), (5,), ()]


def flat(tensors) -> torch.Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


@pytest.mark.parametrize("scope", ["joint", "tensor"])
def test_steps_equal_the_dense_inverse_past_a_full_window(scope) -> None:
    params = parameters(*SHAPES)
    m, damping, lr, decay, momentum = 4, 1e-2, 0.01, 0.1, 0.6
    optimizer = create(
        "mfac",
        params,
        lr=lr,
        num_grads=m,
        damping=damping,
        momentum=momentum,
        weight_decay=decay,
        scope=scope,
    )
    place = torch.tensor([0] * 12 + [1] * 5 + [2]) if scope == "tensor" else torch.zeros(18)
    wanted, window = flat(params), torch.zeros(m, 18, dtype=torch.float64)
    mean = torch.zeros(18, dtype=torch.float64)
    for t in range(10):
        x = flat(gradients(params, t)) + decay * wanted
        window[t % m] = x
        fisher = damping * torch.eye(18, dtype=torch.float64) + window.T @ window / m
        fisher = torch.where(place[:, None] == place, fisher, 0.0)
        mean = momentum * mean + (1 - momentum) * torch.linalg.solve(fisher, x)
        wanted = wanted - lr * mean
        run(optimizer, params, 1, start=t)
        assert torch.allclose(flat(params), wanted, rtol=0.0, atol=1e-11)


def test_first_step_has_the_documented_length() -> None:
    params = parameters(*SHAPES)
    before = flat(params)
    optimizer = create("mfac", params, lr=0.1, num_grads=5, damping=1e-3)
    run(optimizer, params, 1)
    g = flat([p.grad for p in params])
    assert torch.allclose(before - flat(params), 0.1 * g / (1e-3 + g @ g / 5), atol=1e-12)


def test_stored_products_are_those_of_the_window() -> None:
    params = parameters(*SHAPES)
    optimizer = create("mfac", params, num_grads=3)
    run(optimizer, params, 8)
    for p in params:
        window = optimizer.state[p]["window"]
        assert window.shape == (3, p.numel())
        assert torch.allclose(optimizer.state[p]["gram"], window @ window.T, atol=1e-13)


def test_rounded_window_is_the_rule_on_rounded_gradients() -> None:
    ours, theirs = parameters(*SHAPES, dtype=torch.float32), parameters(*SHAPES, dtype=torch.float32)
    options = {"lr": 0.01, "num_grads": 4, "damping": 1e-5}
    first = create("mfac", ours, window_dtype="bfloat16", **options)
    second = create("mfac", theirs, **options)
    for t in range(9):
        for p, q, g in zip(ours, theirs, gradients(ours, t)):
            p.grad, q.grad = g, g.bfloat16().float()
        first.step()
        second.step()
    assert torch.allclose(flat(ours), flat(theirs), atol=1e-6)
    state = first.state[ours[0]]
    assert state["window"].element_size() == 2
    assert torch.equal(state["window"].view(torch.bfloat16).float(), second.state[theirs[0]]["window"])


def test_window_on_the_host_makes_the_same_steps() -> None:
    ours, theirs = parameters(*SHAPES), parameters(*SHAPES)
    run(create("mfac", ours, num_grads=4, window_device="cpu"), ours, 6)
    run(create("mfac", theirs, num_grads=4), theirs, 6)
    assert torch.equal(flat(ours), flat(theirs))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_window_on_the_host_of_a_gpu(dtype) -> None:
    ours = [nn.Parameter(p.detach().cuda()) for p in parameters(*SHAPES, dtype=torch.float32)]
    theirs = parameters(*SHAPES, dtype=torch.float32)
    options = {"num_grads": 4, "window_dtype": dtype}
    first, second = create("mfac", ours, window_device="cpu", **options), create("mfac", theirs, **options)
    for t in range(6):
        for p, q, g in zip(ours, theirs, gradients(theirs, t)):
            p.grad, q.grad = g.cuda(), g
        first.step()
        second.step()
        if t == 3:
            saved = first.state_dict()
            first = create("mfac", ours, window_device="cpu", **options)
            first.load_state_dict(saved)
    assert first.state[ours[0]]["window"].device.type == "cpu"
    assert torch.allclose(flat(ours).cpu(), flat(theirs), atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"scope": "tensor"},
        {"window_dtype": "bfloat16"},
        {"sparse": True},
        {"window_device": "cpu"},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_bitwise(options, dtype, tmp_path) -> None:
    options = {"lr": 0.02, "num_grads": 3, **options}
    straight, resumed = parameters(*SHAPES, dtype=dtype), parameters(*SHAPES, dtype=dtype)
    run(create("mfac", straight, **options), straight, 8)
    optimizer = run_in_two(lambda p: create("mfac", p, **options), resumed, 8, 5, tmp_path / "state.pt")
    assert torch.equal(flat(straight), flat(resumed))
    assert optimizer.state[resumed[0]]["gram"].dtype == torch.float64


def test_zero_gradients_at_first_then_training() -> None:
    params = parameters(*SHAPES, dtype=torch.float32)
    optimizer = create("mfac", params, lr=0.1, num_grads=8)
    before = flat(params)
    run(optimizer, params, 3, scale=0.0)
    assert torch.equal(flat(params), before)
    run(optimizer, params, 2, start=3)
    assert flat(params).isfinite().all()
    assert ((flat(params) - before).abs() > 1e-4).all()


def test_a_parameter_may_miss_steps() -> None:
    first, second = parameters((3,), (4,))
    optimizer = create("mfac", [first, second], lr=0.01, num_grads=4)
    run(optimizer, [first, second], 3)
    second.grad = None
    before = second.detach().clone()
    run(optimizer, [first], 3, start=3)
    assert torch.equal(second, before)
    second.grad = torch.ones_like(second)
    optimizer.step()
    assert second.isfinite().all()
    assert not torch.equal(second, before)


def test_pruned_weights_stay_pruned() -> None:
    (p,) = parameters((4, 4))
    with torch.no_grad():
        p[0] = 0.0
    before = p.detach().clone()
    optimizer = create("mfac", [p], lr=0.1, num_grads=4, sparse=True, weight_decay=0.1, momentum=0.5)
    run(optimizer, [p], 5)
    assert torch.equal(p[0], torch.zeros(4, dtype=torch.float64))
    assert (p[1:] != before[1:]).all()
    assert torch.equal(optimizer.state[p]["mask"], before != 0)


def excess_of_regression(name: str, **options) -> float:
    """Excess risk after 200 steps of least squares whose curvatures span four orders of magnitude."""
    source = torch.Generator().manual_seed(0)
    scale = torch.logspace(0, -2, 10, dtype=torch.float64)
    p, target = nn.Parameter(torch.zeros(10, dtype=torch.float64)), 1.0 / scale
    optimizer = create(name, [p], **options)
    for _ in range(200):
        x = torch.randn(8, 10, generator=source, dtype=torch.float64) * scale
        y = x @ target + torch.randn(8, generator=source, dtype=torch.float64)
        p.grad = x.T @ (x @ p.detach() - y) / 8
        optimizer.step()
    return (scale * (p.detach() - target)).square().sum().item()


def test_ill_conditioned_regression_is_learnt_faster_than_by_descent() -> None:
    descent = min(excess_of_regression("sgd", lr=lr) for lr in (0.1, 0.3, 0.6, 1.0))
    assert excess_of_regression("mfac", lr=0.03, damping=1e-4) < 0.2 * descent


@pytest.mark.parametrize(
    "options",
    [{"num_grads": 0}, {"damping": 0.0}, {"scope": "block"}, {"window_dtype": "float16"}, {"momentum": 1.0}],
)
def test_wrong_options_are_refused(options) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        create("mfac", parameters((2, 2)), **options)
