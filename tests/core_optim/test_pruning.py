import pytest
import torch
from torch import nn

from thalweg.core_optim import pruning


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 1)).double()


def trained() -> tuple[nn.Sequential, torch.Tensor, torch.Tensor]:
    """A network that has learnt a smooth function of a few of its inputs."""
    source = torch.Generator().manual_seed(1)
    x = torch.randn(256, 6, generator=source, dtype=torch.float64)
    y = torch.sin(x[:, :1]) + 0.5 * x[:, 1:2] * x[:, 2:3]
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02, foreach=False)
    for _ in range(300):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    optimizer.zero_grad()
    return model, x, y


def loss_of(model, x, y) -> float:
    with torch.no_grad():
        return (model(x) - y).square().mean().item()


def weights_of(model) -> list[nn.Parameter]:
    return [m.weight for m in model.modules() if isinstance(m, nn.Linear)]


def window_of(model, x, y, rows: int = 128, **options) -> torch.Tensor:
    losses = ((model(x[i : i + 1]) - y[i : i + 1]).square().sum() for i in range(len(x)))
    return pruning.gradient_window(losses, weights_of(model), rows, **options)


def test_every_row_of_the_window_is_a_gradient() -> None:
    model, x, y = trained()
    window = window_of(model, x, y, rows=5)
    assert (window.norm(dim=1) > 0).all()
    (model(x[4:5]) - y[4:5]).square().sum().backward()
    last = torch.cat([p.grad.reshape(-1) for p in weights_of(model)])
    assert torch.allclose(window[4], last.float())


def test_gradients_of_unused_weights_are_zero_and_grad_is_left_alone() -> None:
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    window = pruning.gradient_window([used.sum()], [used, unused], 1)
    assert torch.equal(window, torch.tensor([[1.0, 1.0, 0.0, 0.0, 0.0]]))
    assert used.grad is None


def test_too_few_losses_are_refused() -> None:
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="there are 1 losses"):
        pruning.gradient_window([p.sum()], [p], 2)


@pytest.mark.parametrize("compensation", pruning.COMPENSATIONS)
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.65, 1.0])
def test_the_asked_share_is_removed(compensation, sparsity) -> None:
    model, x, y = trained()
    weights = weights_of(model)
    masks = pruning.prune_step(weights, window_of(model, x, y), sparsity, compensation=compensation)
    total = sum(w.numel() for w in weights)
    assert sum(int((w == 0).sum()) for w in weights) == int(total * sparsity)
    for w, mask in zip(weights, masks):
        assert torch.equal(w != 0, mask)


def test_removing_one_weight_is_the_surgeon() -> None:
    model, x, y = trained()
    weights, window = weights_of(model), window_of(model, x, y, dtype=torch.float64)
    before = torch.cat([w.detach().reshape(-1) for w in weights])
    exact = torch.linalg.inv(1e-3 * torch.eye(84, dtype=torch.float64) + window.T @ window / 128)
    j = (before.square() / (2 * exact.diagonal())).argmin()
    pruning.prune_step(weights, window, 1.5 / 84, damping=1e-3)
    after = torch.cat([w.detach().reshape(-1) for w in weights])
    assert torch.allclose(after - before, -before[j] / exact[j, j] * exact[:, j], atol=1e-9)
    assert after[j] == 0.0


def test_scores_and_compensation_beat_magnitude() -> None:
    model, x, y = trained()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    found = {}
    for compensation in ("none", "sum", "joint"):
        model.load_state_dict(state)
        masks = None
        for sparsity in pruning.sparsity_steps(0.0, 0.5, 4):
            window = window_of(model, x, y, 256)
            masks = pruning.prune_step(
                weights_of(model), window, sparsity, damping=1e-4, compensation=compensation, masks=masks
            )
        found[compensation] = loss_of(model, x, y)
    model.load_state_dict(state)
    magnitude = torch.cat([w.detach().abs().reshape(-1) for w in weights_of(model)])
    with torch.no_grad():
        for w in weights_of(model):
            w.mul_(w.abs() > magnitude.sort().values[42])
    assert found["sum"] < 0.5 * loss_of(model, x, y)
    assert found["joint"] < found["none"]


def test_pruned_weights_stay_gone_in_later_steps_and_after_training() -> None:
    model, x, y = trained()
    weights = weights_of(model)
    first = pruning.prune_step(weights, window_of(model, x, y), 0.3)
    second = pruning.prune_step(weights, window_of(model, x, y), 0.6)
    for a, b in zip(first, second):
        assert not (b & ~a).any()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    (model(x) - y).square().mean().backward()
    optimizer.step()
    assert any((w[~mask] != 0).any() for w, mask in zip(weights, second))
    pruning.apply_masks(weights, second)
    for w, mask in zip(weights, second):
        assert torch.equal(w != 0, mask)


def test_blocks_and_rounded_windows_prune_too() -> None:
    model, x, y = trained()
    before = loss_of(model, x, y)
    window = window_of(model, x, y, dtype=torch.bfloat16)
    assert window.dtype == torch.bfloat16
    pruning.prune_step(weights_of(model), window, 0.2, block_size=12, damping=1e-4)
    assert loss_of(model, x, y) < before + 0.1


def test_sparsity_steps_keep_a_constant_share() -> None:
    steps = pruning.sparsity_steps(0.2, 0.9, 3)
    left = [0.8, *(1.0 - s for s in steps)]
    assert steps[-1] == pytest.approx(0.9)
    assert left[1] / left[0] == pytest.approx(left[2] / left[1]) == pytest.approx(left[3] / left[2])
    with pytest.raises(ValueError, match="sparsities grow"):
        pruning.sparsity_steps(0.5, 0.4, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 0.5, "compensation": "half"}, "'half'"),
        ({"sparsity": 0.5, "compensation": "joint", "block_size": 4}, "block_size is 4"),
        ({"sparsity": 0.1}, "from 0.25"),
        ({"sparsity": 1.1}, "1.1"),
    ],
)
def test_wrong_requests_are_refused(options, message) -> None:
    p = nn.Parameter(torch.tensor([0.0, 1.0, 2.0, 3.0]))
    with pytest.raises(ValueError, match=message):
        pruning.prune_step([p], torch.ones(2, 4), **options)


def test_a_window_of_other_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="4 elements"):
        pruning.prune_step([nn.Parameter(torch.ones(4))], torch.ones(2, 5), 0.5)
