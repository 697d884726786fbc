import pytest
import torch
from golden_trajectory import follow, load, trajectories
from torch import nn

from thalweg.core_optim import Scion
from thalweg.core_optim.linalg import lmo


@pytest.mark.parametrize("path", trajectories("scion_*.safetensors"), ids=lambda path: path.stem)
def test_golden_trajectory(path) -> None:
    assert follow(*load(path)) < 1.0


def normal(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(optimizer, p: nn.Parameter, gradients) -> None:
    for g in gradients:
        p.grad = g.clone()
        optimizer.step()


SIZES = {
    "Spectral": lambda p: torch.linalg.svdvals(p).max() / (p.shape[0] / p.shape[1]) ** 0.5,
    "Sign": lambda p: p.abs().max() * p.shape[1],
    "ColNorm": lambda p: p.square().mean(0).sqrt().max(),
    "RowNorm": lambda p: p.norm(dim=1).max() * p.shape[1] ** 0.5,
}


@pytest.mark.parametrize(
    ("norm", "limit"), [("Spectral", 1.2024), ("Sign", 1.0), ("ColNorm", 1.0), ("RowNorm", 1.0)]
)
def test_constrained_weights_stay_in_the_ball(norm: str, limit: float) -> None:
    p = nn.Parameter(lmo.init_(torch.empty(5, 4).double(), norm, generator=torch.Generator().manual_seed(0)))
    p.data *= 3.0
    optimizer = Scion([p], lr=0.1, norm=norm, scale=3.0)
    for t in range(40):
        run(optimizer, p, [normal((5, 4), t)])
        assert SIZES[norm](p.detach()) <= 3.0 * limit * (1.0 + 1e-6)


def test_a_steady_gradient_leads_to_the_surface() -> None:
    p = nn.Parameter(torch.zeros(5, 4).double())
    run(Scion([p], lr=0.1, norm="RowNorm", scale=3.0), p, [normal((5, 4), 0)] * 200)
    rows = p.detach().norm(dim=1) * 2.0
    assert torch.allclose(rows, torch.full((5,), 3.0, dtype=torch.float64), rtol=1e-6)


def test_weight_one_keeps_no_state_and_forgets() -> None:
    p = nn.Parameter(torch.zeros(3, 4).double())
    optimizer = Scion([p], lr=1.0, momentum=1.0, norm="Sign", constrained=False)
    run(optimizer, p, [normal((3, 4), 0), normal((3, 4), 1)])
    assert set(optimizer.state[p]) == {"step"}
    assert torch.equal(p.detach(), -(normal((3, 4), 0).sign() + normal((3, 4), 1).sign()) / 4)


def test_weight_decay_is_for_unconstrained_weights() -> None:
    for constrained, wanted in [(True, 0.9), (False, 0.95)]:
        p = nn.Parameter(torch.ones(3).double())
        optimizer = Scion([p], lr=0.1, weight_decay=0.5, constrained=constrained)
        run(optimizer, p, [torch.zeros(3).double()])
        assert torch.allclose(p.detach(), torch.full((3,), wanted, dtype=torch.float64))


def test_the_default_norm_handles_every_shape() -> None:
    shapes = [(), (3,), (4, 3), (3, 4, 2), (4, 3, 2, 2)]
    params = [nn.Parameter(normal(s, 1)) for s in shapes]
    optimizer = Scion(params, lr=0.1)
    for t in range(6):
        for p in params:
            p.grad = torch.zeros_like(p) if t < 3 else normal(p.shape, t)
        optimizer.step()
    for p in params:
        assert torch.isfinite(p).all()
        assert not torch.allclose(p.detach(), 0.9**6 * normal(p.shape, 1))


def test_transposed_storage_is_the_same_matrix() -> None:
    p, q = nn.Parameter(torch.zeros(4, 6).double()), nn.Parameter(torch.zeros(6, 4).double().mT)
    for parameter in (p, q):
        run(Scion([parameter], lr=0.1), parameter, [normal((4, 6), 0), normal((4, 6), 1)])
    assert torch.allclose(p, q, atol=1e-14)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((3,), {"norm": "Spectral"}, "Spectral is for matrices, not for 1 dimensions"),
        ((3, 3), {"norm": "SpectralConv"}, "SpectralConv is for kernels of 3 or more dimensions, not 2"),
        ((3, 3), {"norm": "L2"}, "allowed: Auto, Spectral"),
        ((3, 3), {"norm": "Sign", "norm_kwargs": {"steps": 5}}, r"steps: 5, allowed: normalized \(bool\)"),
        ((3, 3), {"momentum": 0.0}, r"allowed: a number in \(0, 1\]"),
    ],
)
def test_refusals(shape, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        Scion([nn.Parameter(torch.zeros(shape))], **options)


def test_complex_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="no update for complex numbers"):
        Scion([nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))])
