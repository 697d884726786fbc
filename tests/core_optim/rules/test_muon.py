import pytest
import torch
from golden_trajectory import follow, load, trajectories
from torch import nn

from thalweg.core_optim import Muon
from thalweg.core_optim.linalg.newton_schulz import muon_scale, newton_schulz


@pytest.mark.parametrize("path", trajectories("muon_*.safetensors"), ids=lambda path: path.stem)
def test_golden_trajectory(path) -> None:
    assert follow(*load(path)) < 1.0


@pytest.mark.parametrize("path", trajectories("muon_bf16_*.safetensors"), ids=lambda path: path.stem)
def test_golden_trajectory_in_bf16(path) -> None:
    entry, data = load(path)
    entry["kwargs"]["ns_dtype"] = "bf16"
    assert follow(entry, data) < 1.0


def gradient(shape: tuple[int, ...], seed: int, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def updates(gradients: list[torch.Tensor], dtype=torch.float64, **options) -> list[torch.Tensor]:
    """Minus the moves of a parameter that starts at 0, for lr 1 and one gradient after the other."""
    p = nn.Parameter(torch.zeros(gradients[0].shape, dtype=dtype))
    optimizer = Muon([p], **{"lr": 1.0, "weight_decay": 0.0, **options})
    found = []
    for g in gradients:
        before = p.detach().clone()
        p.grad = g.to(dtype, copy=True)
        optimizer.step()
        found.append(before - p.detach())
    return found


@pytest.mark.parametrize("nesterov", [True, False])
def test_follows_torch(nesterov: bool) -> None:
    gradients = [gradient((6, 4), t, torch.float32) for t in range(5)]
    p = nn.Parameter(torch.zeros(6, 4))
    theirs = torch.optim.Muon([p], lr=0.1, weight_decay=0.2, nesterov=nesterov)
    q = nn.Parameter(torch.zeros(6, 4))
    ours = Muon([q], lr=0.1, weight_decay=0.2, nesterov=nesterov, ns_dtype="bf16")
    for g in gradients:
        p.grad, q.grad = g.clone(), g.clone()
        theirs.step()
        ours.step()
    # torch rounds to bf16 before it divides by the norm
    assert (p - q).norm() < 0.03 * p.norm()


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4)])
def test_update_is_bounded_and_blind_to_scale(shape: tuple[int, int]) -> None:
    gradients = [gradient(shape, t) for t in range(4)]
    found = updates(gradients, adjust_lr="none")
    for u in found:
        s = torch.linalg.svdvals(u)
        assert s.max() <= 1.2024
        assert s.min() >= 0.3  # 0.68 from 5e-3 of the norm on
    for u, v in zip(found, updates([1e6 * g for g in gradients], adjust_lr="none")):
        assert torch.allclose(u, v, atol=1e-9)
    for u, v in zip(found, updates([g.mT for g in gradients], adjust_lr="none")):
        assert torch.allclose(u.mT, v, atol=1e-12)


def test_rotations_of_the_gradient_rotate_the_update() -> None:
    u, v = (torch.linalg.qr(gradient((d, d), d))[0] for d in (5, 7))
    gradients = [gradient((5, 7), t) for t in range(4)]
    for a, b in zip(updates(gradients), updates([u @ g @ v for g in gradients])):
        assert torch.allclose(u @ a @ v, b, atol=1e-12)


def test_bf16_without_nesterov_keeps_its_momentum() -> None:
    p = nn.Parameter(torch.zeros(4, 4, dtype=torch.bfloat16))
    optimizer = Muon([p], nesterov=False, momentum=0.9, state_dtype="bfloat16", ns_dtype="bf16")
    for wanted in (1.0, 1.9, 2.71):
        p.grad = torch.full_like(p, 10.0)
        optimizer.step()
        m = optimizer.state[p]["momentum_buffer"]
        assert m.dtype == torch.bfloat16
        assert m.float().mean().item() == pytest.approx(wanted, rel=5e-3)


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({"heads": 3}, [2, 2, 2]),
        ({"split": (4, 1, 1)}, [4, 1, 1]),
        ({"split": [2, 4], "heads": 2}, [1, 1, 2, 2]),
    ],
)
def test_blocks_of_rows_are_orthogonalised_one_by_one(options, sizes) -> None:
    g = gradient((6, 5), 0)
    (u,) = updates([g], **options)
    wanted = [newton_schulz(x) * muon_scale(*x.shape, "original") for x in g.split(sizes)]
    assert torch.allclose(u, torch.cat(wanted), atol=1e-12)


def test_other_coefficients() -> None:
    g = gradient((4, 6), 0)
    steps = [(3.4445, -4.775, 2.0315)] * 4 + [(1.875, -1.25, 0.375)]
    (u,) = updates([g], ns_steps=12, ns_coefficients=steps)
    assert torch.allclose(u @ u.mT, torch.eye(4).double(), atol=1e-10)
    for bad in ([], [(1.0, 2.0)], [1.0], [("a", 1.0, 2.0)]):
        with pytest.raises(ValueError, match="a list of three numbers per step"):
            Muon([nn.Parameter(torch.zeros(2, 2))], ns_coefficients=bad)


def test_convolutions_are_matrices_of_output_channels() -> None:
    g = gradient((4, 3, 2, 2), 0)
    (u,) = updates([g])
    assert torch.allclose(u, newton_schulz(g.reshape(4, 12)).view(4, 3, 2, 2), atol=1e-12)


def test_transposed_storage_is_the_same_matrix() -> None:
    g = gradient((4, 6), 0)
    p, q = nn.Parameter(torch.zeros(4, 6).double()), nn.Parameter(torch.zeros(6, 4).double().mT)
    for parameter, grad in ((p, g), (q, g.mT.contiguous().mT)):
        parameter.grad = grad.clone()
        Muon([parameter], lr=1.0).step()
    assert torch.allclose(p, q, atol=1e-12)


def test_zero_gradients_move_nothing_and_later_ones_train() -> None:
    zero = torch.zeros(3, 4)
    found = updates([zero, zero, zero, gradient((3, 4), 0)])
    assert not any(u.any() for u in found[:3])
    assert torch.linalg.svdvals(found[3]).min() > 0.3


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((3,), {}, "Muon is for matrices and convolutions"),
        ((), {}, "Muon is for matrices and convolutions"),
        ((6, 2), {"split": (3, 2)}, r"split \[3, 2\] sums to 5, but there are 6 rows"),
        ((6, 2), {"heads": 4}, r"blocks of \[6\] rows do not divide into 4 heads"),
        ((6, 2), {"adjust_lr": "moonlight"}, "allowed: original, match_rms_adamw, spectral, none"),
        ((6, 2), {"split": ()}, "allowed: none or a list of numbers of rows|allowed: None"),
    ],
)
def test_refusals(shape, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        Muon([nn.Parameter(torch.zeros(shape))], **options)


def test_complex_matrices_are_refused() -> None:
    with pytest.raises(ValueError, match="no update for complex numbers"):
        Muon([nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))])
