"""Every registered optimizer in two processes takes the steps of one, however the parameters are cut."""

from functools import cache
from typing import Any

import pytest
import torch
from optim_cases import SHAPES, SPECTRAL, Case, cases, element_rules
from optim_processes import EVEN, TRAINED, WIDE, alone, run, trained
from torch import Tensor

pytestmark = pytest.mark.dist

ROUNDING = {"adamw": 5e-7, "diffgrad": 5e-7, "mars": 5e-7, "sgdsai": 5e-7, "adammini": 5e-7}
"""Largest difference of any weight or state, as a share of the largest entry of its tensor; 0 for all others.

AdamW goes through torch's fused kernel, which rounds otherwise at the end of a vector, as DiffGrad's sigmoid
may. Norms and means of MARS, SGD-SaI and Adam-mini are sums in another order. All others are equal bit by
bit: sums of these gradients are exact, and matrix rules see whole matrices.
"""

CASES = {case.label: case for case in cases()}
KINDS = ("fsdp", "columns", "hybrid", "twice", "strided", "rounded", "rounded columns")
RUNS = [(kind, label) for kind in KINDS for label in CASES]
# matrix rules refuse complex parameters
RUNS += [("complex", label) for label, case in CASES.items() if case.rule in element_rules()]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(tmp_path_factory.mktemp("optim"))


@cache
def one_process(label: str, kind: str) -> dict[str, Any]:
    if kind == "complex":
        return alone(CASES[label], SPECTRAL, torch.complex64)
    shapes = WIDE if "columns" in kind else EVEN if kind == "strided" else SHAPES
    if kind.startswith("rounded"):
        return alone(CASES[label], shapes, torch.bfloat16, stochastic_rounding=True)
    return alone(CASES[label], shapes)


def assert_near(got: Tensor, wanted: Tensor, rule: str) -> None:
    assert got.dtype == wanted.dtype
    assert got.shape == wanted.shape
    if wanted.is_complex():
        got, wanted = torch.view_as_real(got), torch.view_as_real(wanted)
    if rule not in ROUNDING or not wanted.is_floating_point():
        assert torch.equal(got, wanted)
    elif wanted.numel():
        scale = wanted.double().abs().max().item()
        torch.testing.assert_close(got, wanted, rtol=0.0, atol=ROUNDING[rule] * scale)


@pytest.mark.parametrize(("kind", "label"), RUNS)
def test_cut_parameters_take_the_steps_of_whole_ones(found: list[Any], kind: str, label: str) -> None:
    wanted, rule = one_process(label, kind), CASES[label].rule
    for process in found:
        got = process[kind][label]
        if kind == "strided" and "heads" in CASES[label].options and rule == "adammini":
            assert "cut in strides by tensor parallelism" in got["error"]
            continue
        for name, weight in wanted["weights"].items():
            assert_near(got["weights"][name], weight, rule)
        assert got["state"].keys() == wanted["state"].keys()
        for name, state in wanted["state"].items():
            assert got["state"][name].keys() == state.keys()
            for key, value in state.items():
                assert_near(got["state"][name][key], value, rule)


@pytest.mark.parametrize("label", CASES)
@pytest.mark.parametrize("kind", ["ddp", "rounded ddp"])
def test_replicas_stay_equal_and_take_the_steps_of_one(found: list[Any], kind: str, label: str) -> None:
    wanted = one_process(label, "rounded" if "rounded" in kind else "fsdp")["weights"]
    for process in found:
        for name, weight in wanted.items():
            assert torch.equal(process[kind][label]["weights"][name], weight)


@pytest.mark.parametrize("label", CASES)
def test_resume_through_a_distributed_state_dict(found: list[Any], label: str) -> None:
    for process in found:
        for kind in ("resumed", "file"):
            if label in process[kind]:
                for name, weight in process["fsdp"][label]["weights"].items():
                    assert torch.equal(process[kind][label]["weights"][name], weight)


def test_every_rule_resumes_from_a_distributed_checkpoint(found: list[Any]) -> None:
    assert {CASES[label].rule for label in found[0]["file"]} == {case.rule for case in CASES.values()}


def test_compiled_kernel_on_parts(found: list[Any]) -> None:
    for name, weight in alone(Case("lion"), SHAPES)["weights"].items():
        got = found[1]["compiled"]["lion"]["weights"][name]
        torch.testing.assert_close(got, weight, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rule", TRAINED)
def test_gradients_of_fully_shard(found: list[Any], rule: str) -> None:
    for name, weight in trained(Case(rule), slice(None))["weights"].items():
        torch.testing.assert_close(found[0]["trained"][rule]["weights"][name], weight, rtol=1e-4, atol=1e-6)
