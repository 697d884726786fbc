"""Decay schedules: golden values, counters, and averages in place."""

import json
from itertools import pairwise
from typing import Any

import pytest
import torch
from golden import golden_files

from thalweg.diffusion.nft.decay import DECAY_TYPES, DECAYS, Decay, decay, ema_decay, polyak_

(GOLDEN,) = (json.loads(path.read_text()) for path in golden_files("nft", "schedules.json"))


def close(value: float) -> Any:
    return pytest.approx(value, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("number", DECAY_TYPES)
def test_golden_decays(number: int) -> None:
    for steps, expected in GOLDEN["soft_update_decay"][str(number)]:
        assert decay(number)(steps) == close(expected)


@pytest.mark.parametrize("cap", ["0.9", "0.99"])
def test_golden_average(cap: str) -> None:
    for steps, expected in GOLDEN["ema_decay"][cap]:
        assert ema_decay(steps, float(cap)) == close(expected)


@pytest.mark.parametrize("case", GOLDEN["ema_trajectory"], ids=lambda case: str(case["cap"]))
def test_golden_path_of_the_average(case: dict[str, Any]) -> None:
    average = [torch.tensor(case["init"], dtype=torch.float64)]
    for step, theta, expected in zip(case["steps"], case["theta"], case["ema"], strict=True):
        if (step + 1) % case["interval"] == 0:  # every second step: after the first, the third, ...
            polyak_(average, [torch.tensor(theta, dtype=torch.float64)], ema_decay(step, case["cap"]))
        assert average[0].tolist() == close(expected)


@pytest.mark.parametrize("case", GOLDEN["soft_update_trajectory"])
def test_golden_path_of_the_sampling_policy(case: dict[str, Any]) -> None:
    old = [torch.tensor(case["init"], dtype=torch.float64)]
    for (step, eta, expected), theta in zip(case["rows"], case["theta"], strict=True):
        assert decay(case["decay_type"])(step) == close(eta)
        polyak_(old, [torch.tensor(theta, dtype=torch.float64)], eta)
        assert old[0].tolist() == close(expected)


@pytest.mark.parametrize("case", GOLDEN["counters"], ids=lambda case: str(case["gradient_steps_per_epoch"]))
def test_schedules_count_optimizer_steps(case: dict[str, Any]) -> None:
    steps = 0
    for row in case["rows"]:
        averages = []
        for _ in range(case["gradient_steps_per_epoch"]):
            steps += 1
            averages.append(ema_decay(steps))
        assert steps == row["optimizer_steps"]
        assert averages == close(row["ema_decay"])
        assert decay(case["decay_type"])(steps) == close(row["soft_update_decay"])


@pytest.mark.parametrize("name", DECAYS)
def test_decays_by_name_rise_from_zero_to_their_cap(name: str) -> None:
    found = decay(name)
    etas = [found(i) for i in range(1000)]
    assert decay(found) is found
    assert etas[0] == 0
    assert etas[-1] == found.cap
    assert all(a <= b for a, b in pairwise(etas))


def test_no_decay_is_an_exact_copy_in_any_precision() -> None:
    for dtype in (torch.float32, torch.float64):
        old, new = [torch.randn(50, dtype=dtype)], [torch.randn(50, dtype=dtype) * 1e-9]
        polyak_(old, new, 0.0)
        assert torch.equal(old[0], new[0])
        polyak_(old, [torch.randn(50, dtype=dtype)], 1.0)
        assert torch.equal(old[0], new[0])


def test_wrong_settings() -> None:
    with pytest.raises(ValueError, match=r"decay is 3, allowed: hard_copy \(0\), linear_to_0_5 \(1\)"):
        decay(3)
    with pytest.raises(ValueError, match="decay is 'cosine'"):
        decay("cosine")
    for wrong in ({"cap": 1.0}, {"rate": -0.1}, {"flat": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is -?[01]"):
            Decay(**wrong)  # type: ignore[arg-type]
    tensors = [torch.zeros(2)]
    with pytest.raises(ValueError, match=r"eta is 1\.5"):
        polyak_(tensors, tensors, 1.5)
    with pytest.raises(ValueError, match="1 tensors cannot follow 2"):
        polyak_(tensors, tensors * 2, 0.5)
    with pytest.raises(ValueError, match=r"found torch\.bfloat16"):
        polyak_([torch.zeros(2, dtype=torch.bfloat16)], tensors, 0.5)
