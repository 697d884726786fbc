"""Complex parameters: two real numbers each, or one modulus for both."""

import pytest
import torch
from optim_cases import element_rules, matrix_rules
from torch import Tensor, nn

from thalweg.core_optim import registry
from thalweg.core_optim.engine.optimizer import CoreOptimizer

SHAPE = (4, 3, 2)
MODULI = [name for name in element_rules() if registry.rule(name).moduli]


APART = ("adabelief", "adamp", "adamw", "cadamw", "mars", "nadamw", "schedulefree_adamw")
"""Rules with a second moment for each real number unless told otherwise."""


def numbers(seed: int, dtype: torch.dtype = torch.complex128) -> Tensor:
    return torch.randn(SHAPE, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def run(rule: str, p: nn.Parameter, gradient: list[Tensor], **options: object) -> CoreOptimizer:
    optimizer = registry.create(rule, [p], **options)
    for g in gradient:
        p.grad = g.clone()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("rule", element_rules())
def test_complex_equals_its_real_view(rule: str, foreach: bool) -> None:
    whole, pairs = nn.Parameter(numbers(0)), nn.Parameter(torch.view_as_real(numbers(0)).clone())
    gradients = [numbers(step) for step in range(1, 6)]
    options = {"weight_decay": 0.1, "foreach": foreach}
    # rows, and the length that a threshold is relative to, are those of the view with one more dimension
    run(rule, whole, gradients, **options)
    run(rule, pairs, [torch.view_as_real(g) for g in gradients], **options)
    torch.testing.assert_close(torch.view_as_real(whole.detach()), pairs.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("rule", MODULI)
def test_modulus_turns_with_the_phase(rule: str, foreach: bool) -> None:
    phase = torch.polar(torch.ones((), dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64))
    gradients = [numbers(step) for step in range(1, 9)]  # AdaBelief's first 5 have no denominator

    def moved(complex_: str, by: Tensor) -> Tensor:
        p = nn.Parameter(numbers(0) * by)
        run(rule, p, [g * by for g in gradients], complex=complex_, weight_decay=0.1, foreach=foreach, lr=0.1)
        return p.detach()

    one = torch.ones_like(phase)
    torch.testing.assert_close(moved("modulus", phase), moved("modulus", one) * phase, rtol=1e-12, atol=1e-12)
    if rule in APART:
        assert (moved("real", phase) - moved("real", one) * phase).abs().max() > 1e-3


@pytest.mark.parametrize("rule", MODULI)
def test_modulus_leaves_real_parameters_alone(rule: str) -> None:
    a, b = (nn.Parameter(numbers(0).real.clone()) for _ in range(2))
    gradients = [numbers(step).real for step in range(1, 4)]
    run(rule, a, gradients, complex="modulus")
    run(rule, b, gradients, complex="real")
    assert torch.equal(a, b)


@pytest.mark.parametrize("rule", ["diffgrad", "lion", "sgdsai"])
def test_modulus_is_refused_where_it_means_nothing(rule: str) -> None:
    with pytest.raises(ValueError, match=r"complex.*modulus.*allowed: real"):
        registry.create(rule, [nn.Parameter(numbers(0))], complex="modulus")
    registry.create(rule, [nn.Parameter(numbers(0).real.clone())], complex="modulus")


@pytest.mark.parametrize("rule", matrix_rules())
def test_matrix_rules_refuse(rule: str) -> None:
    p = nn.Parameter(torch.zeros(4, 4, dtype=torch.complex64))
    with pytest.raises(
        ValueError, match=f"group 0 \\({rule}\\), parameter number 0 of shape .4, 4.:.*complex"
    ):
        registry.create(rule, [p])


def test_state_is_complex_in_the_precision_of_the_parameter() -> None:
    for dtype in (torch.complex64, torch.complex128):
        p = nn.Parameter(numbers(0, dtype))
        state = run("adamw", p, [numbers(1, dtype)], complex="modulus").state[p]
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == dtype
        p = nn.Parameter(numbers(0, dtype))
        rows = run("adammini", p, [numbers(1, dtype)]).state[p]["exp_avg_sq"]
        assert rows.dtype == dtype.to_real()
        assert rows.shape == (4, 1)


def test_scalars_vectors_and_slices() -> None:
    for make in (
        lambda: torch.tensor(1 + 2j),
        lambda: torch.ones(3) * 1j,
        lambda: (torch.ones(4, 6) * 1j)[:, ::2],
    ):
        p = make().requires_grad_()
        before = p.detach().clone()
        optimizer = registry.create("adamw", [p], lr=0.1, weight_decay=0.0)
        p.grad = torch.ones_like(p) * (1 - 1j)
        optimizer.step()
        torch.testing.assert_close(p.detach(), before - 0.1 * (1 - 1j), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_equals_torch_adamw(dtype: torch.dtype) -> None:
    ours, theirs = nn.Parameter(numbers(0, dtype)), nn.Parameter(numbers(0, dtype))
    gradients = [numbers(step, dtype) for step in range(1, 6)]
    run("adamw", ours, gradients, lr=1e-2, weight_decay=0.1)
    reference = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1, foreach=False)
    for g in gradients:
        theirs.grad = g
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_cautious_mask_is_of_real_numbers() -> None:
    a, b = nn.Parameter(numbers(0)), nn.Parameter(torch.view_as_real(numbers(0)).clone())
    gradients = [numbers(step) for step in range(1, 4)]
    run("cadamw", a, gradients)
    run("cadamw", b, [torch.view_as_real(g) for g in gradients])
    torch.testing.assert_close(torch.view_as_real(a.detach()), b.detach(), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("options", [{"block": "full"}, {"block": "tensor"}, {"block": "heads", "heads": 2}])
def test_blocks_of_moduli(options: dict[str, object]) -> None:
    """With every entry equal, each kind of block has the second moment of a single modulus."""
    found = []
    for block in (options, {"block": "rows"}):
        p = nn.Parameter(numbers(0))
        run("adammini", p, [torch.full(SHAPE, 3 - 4j, dtype=torch.complex128)], complex="modulus", **block)
        found.append(p.detach() - numbers(0))
    torch.testing.assert_close(found[0], found[1])
    assert found[0].abs().mean().item() == pytest.approx(1e-3)


def test_cautious_decay_turns_with_the_phase() -> None:
    found = []
    for by in (1.0 + 0j, 0.6 - 0.8j):
        p = nn.Parameter(numbers(0) * by)
        gradients = [numbers(step) * by for step in range(1, 4)]
        run("adamw", p, gradients, complex="modulus", decay="cautious", weight_decay=0.5, lr=0.1)
        found.append(p.detach())
    torch.testing.assert_close(found[1], found[0] * (0.6 - 0.8j), rtol=1e-12, atol=1e-12)


def test_mars_with_signs_is_of_real_numbers() -> None:
    with pytest.raises(ValueError, match="allowed with variant lion: real"):
        registry.create("mars", [nn.Parameter(numbers(0))], complex="modulus", variant="lion")
