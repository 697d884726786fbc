"""Loop, lists of tensors and compiled kernels take the same steps, however parameters lie in memory."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from optim_cases import VARIANTS, Case, element_rules, make, matrix_rules, written
from torch import Tensor, nn

from thalweg.core_optim import registry
from thalweg.core_optim.engine import update
from thalweg.core_optim.engine.views import can_view, viewed

STEPS = 3


def dense(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "scalar": lambda: dense(),
    "single": lambda: dense(1),
    "one by one": lambda: dense(1, 1),
    "empty": lambda: dense(0, 3),
    "no columns": lambda: dense(3, 0),
    "vector": lambda: dense(7),
    "matrix": lambda: dense(5, 6),
    "transposed": lambda: dense(6, 5).t(),
    "channels last": lambda: dense(4, 3, 2, 2).to(memory_format=torch.channels_last),
    "permuted": lambda: dense(2, 3, 4).permute(2, 0, 1),
    "columns": lambda: dense(5, 12)[:, ::2],
    "rows": lambda: dense(10, 6)[::2],
    "part of a vector": lambda: dense(9)[1:8],
    "expanded rows": lambda: dense(5, 8)[:, 1:7],
}
"""Parameters by the way they lie in memory."""


def element_cases() -> list[Case]:
    found = []
    for name in element_rules():
        decay = {"weight_decay": 0.1} if "weight_decay" in registry.rule(name).options else {}
        found.append(Case(name, decay))
        found += [Case(name, {**decay, **extra}) for extra in VARIANTS.get(name, [])]
        if name != "schedulefree_adamw":
            found.append(Case(name, {**decay, "cautious": True, "decay": "after"}))
    found.append(Case("adammini", {"block": "heads", "heads": 1}))
    return found


CASES = {case.label: case for case in element_cases()}


def run(
    case: Case, layouts: list[str], *, plain: bool = False, other: bool = False, **options: Any
) -> list[Tensor]:
    """Parameters after some steps.

    ``plain`` makes everything contiguous, ``other`` gives gradients that lie in memory in another way.
    """
    torch.manual_seed(3)
    named: list[tuple[str, Tensor]] = []
    for name in layouts:
        start = LAYOUTS[name]()
        p = start.contiguous() if plain else start
        named.append((name, p.requires_grad_()))
    optimizer = make(case, named, **options)
    for step in range(STEPS):
        for name, p in named:
            torch.manual_seed(10 * step + len(name))
            g = LAYOUTS[name]()
            if other:
                g = g.flip(0).contiguous().flip(0) if g.dim() < 2 else g.mT.contiguous().mT
            p.grad = g.contiguous() if plain else g
        optimizer.step()
    return [p.detach() for _, p in named]


@functools.cache
def reference(label: str) -> list[Tensor]:
    return run(CASES[label], list(LAYOUTS), plain=True, kernel="loop")


def assert_equal(found: list[Tensor], wanted: list[Tensor], tolerance: float = 1e-13) -> None:
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.fixture
def eager_graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compiled kernels whose graphs run as they are: all but the generation of code."""
    update.compiled.cache_clear()
    torch.compiler.reset()
    monkeypatch.setattr(update.torch, "compile", functools.partial(torch.compile, backend="eager"))
    yield
    update.compiled.cache_clear()
    torch.compiler.reset()


@pytest.mark.parametrize(("kernel", "other"), [("loop", False), ("foreach", True)])
@pytest.mark.parametrize("label", CASES)
def test_kernels_and_layouts_agree(label: str, kernel: str, other: bool) -> None:
    assert_equal(run(CASES[label], list(LAYOUTS), other=other, kernel=kernel), reference(label))


@pytest.mark.parametrize("other", [False, True])
@pytest.mark.parametrize("kernel", ["auto", "fused"])
def test_fused_kernel_agrees_for_all_layouts(kernel: str, other: bool) -> None:
    label = "adamw weight_decay=0.1"
    assert_equal(run(CASES[label], list(LAYOUTS), other=other, kernel=kernel), reference(label))


@pytest.mark.parametrize(
    "label",
    [
        pytest.param(label, marks=pytest.mark.slow if len(case.options) > 1 else [])
        for label, case in CASES.items()
    ],
)
def test_graphs_agree(label: str, eager_graphs: None) -> None:
    before = graphs()
    assert_equal(run(CASES[label], list(LAYOUTS), kernel="compile"), reference(label))
    # by rows, a vector has rows of one element, which the compiler takes apart
    assert graphs() - before <= 2 * update.compiled.cache_info().currsize


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def assert_one_graph(case: Case, tolerance: float) -> None:
    """All sizes, steps and learning rates share the graph of a case; here a rule has two at most."""
    update.compiled.cache_clear()
    sizes = [(7, 5), (3, 9), (64, 33), (130, 2)]
    named = [(str(size), torch.randn(size).requires_grad_()) for size in sizes]
    copies = [(name, p.detach().clone().requires_grad_()) for name, p in named]
    optimizers = [make(case, named, compile=True), make(case, copies, kernel="loop")]
    before = graphs()
    for _ in range(8):
        for (_, p), (_, q) in zip(named, copies):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] *= 0.9
            optimizer.step()
    kernels = update.compiled.cache_info().currsize
    assert 0 < graphs() - before == kernels <= 2
    for (_, p), (_, q) in zip(named, copies):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


def some(*rules: str) -> list[Any]:
    """All element rules, those that are not named marked as slow."""
    return [pytest.param(rule, marks=[] if rule in rules else pytest.mark.slow) for rule in element_rules()]


@pytest.mark.parametrize("rule", some("adabelief", "schedulefree_adamw"))
def test_one_graph_for_all_sizes(rule: str, eager_graphs: None) -> None:
    assert_one_graph(Case(rule), 1e-5)


@pytest.mark.parametrize("rule", some("adamw", "lion"))
@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")
def test_compiled_code_agrees(rule: str) -> None:
    assert_one_graph(Case(rule), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("rule", element_rules())
@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")
def test_compiled_code_rounds_as_the_loop_does(rule: str) -> None:
    found = []
    for kernel in ("loop", "foreach", "compile"):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(40, 30).bfloat16())
        optimizer = make(Case(rule), [("p", p)], kernel=kernel, stochastic_rounding=True)
        for _ in range(3):
            p.grad = torch.randn(40, 30).bfloat16()
            optimizer.step()
        found.append(p.detach())
    assert torch.equal(found[0], found[1])
    # another order of operations may tip a number over the threshold of its draw
    assert (found[0] != found[2]).double().mean() < 1e-3


@pytest.mark.parametrize("rule", matrix_rules())
def test_layouts_of_matrix_rules_agree(rule: str) -> None:
    layouts = [name for name in LAYOUTS if name not in ("empty", "no columns")]
    case = Case(rule)
    assert_equal(run(case, layouts), run(case, layouts, plain=True), 1e-9)
    assert_equal(run(case, layouts, other=True), run(case, layouts, plain=True), 1e-9)


@pytest.mark.parametrize("kernel", ["loop", "foreach"])
@pytest.mark.parametrize("rule", element_rules())
def test_mixed_dtypes_take_their_own_steps(rule: str, kernel: str) -> None:
    """Parameters of several dtypes in one group, each as if it were alone."""
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

    def run_some(chosen: tuple[torch.dtype, ...]) -> list[Tensor]:
        some = [(str(d), nn.Parameter(torch.linspace(-1, 1, 12, dtype=torch.float64).to(d))) for d in chosen]
        optimizer = make(Case(rule), some, kernel=kernel)
        for step in range(1, 4):
            for _, p in some:
                p.grad = torch.linspace(-step, 1, 12, dtype=torch.float64).to(p.dtype)
            optimizer.step()
        return [p.detach() for _, p in some]

    together = run_some(dtypes)
    for dtype, found in zip(dtypes, together):
        assert found.dtype == dtype
        assert torch.equal(found, run_some((dtype,))[0])


@pytest.mark.parametrize("kernel", ["loop", "foreach"])
@pytest.mark.parametrize("rule", written())
def test_nothing_reads_a_number_from_the_device(rule: str, kernel: str) -> None:
    """Tensors without storage raise where a value is asked for."""
    named = [(str(s), nn.Parameter(torch.empty(s, device="meta"))) for s in ((5, 4), (7,), (3, 2, 2, 2))]
    optimizer = make(Case(rule), named, kernel=kernel)
    for _ in range(3):
        for _, p in named:
            p.grad = torch.empty_like(p)
        optimizer.step()


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["auto", "loop", "foreach"])
@pytest.mark.parametrize("rule", element_rules())
def test_no_step_waits_for_the_gpu(rule: str, kernel: str) -> None:
    named = [(str(s), nn.Parameter(torch.randn(s, device="cuda"))) for s in ((5, 4), (7,), (3, 2, 2, 2))]
    optimizer = make(Case(rule), named, kernel=kernel)
    for step in range(3):
        for _, p in named:
            p.grad = torch.randn_like(p)
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", LAYOUTS)
def test_views_share_memory_or_say_they_cannot(name: str) -> None:
    x = LAYOUTS[name]()
    for view in ("flat", "rows"):
        if can_view(x, view):
            v = viewed(x, view)
            assert v.data_ptr() == x.data_ptr()
            assert sorted(v.reshape(-1).tolist()) == sorted(x.reshape(-1).tolist())
            if view == "rows" and x.dim():
                for row, wanted in zip(v, x):
                    assert sorted(row.tolist()) == sorted(wanted.reshape(-1).tolist())


def test_unknown_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="kernel is 'quick', allowed: auto, fused, foreach, loop, compile"):
        registry.create("adamw", [nn.Parameter(torch.zeros(2))], kernel="quick")
    with pytest.raises(ValueError, match="compile and foreach exclude each other"):
        registry.create("adamw", [nn.Parameter(torch.zeros(2))], compile=True, foreach=True)
