"""Strict loading names every kind of mismatch and changes nothing on error."""

import pytest
import torch
from torch import nn

from thalweg.checkpoints.strict import check_finite, compare, load_strict


def test_equal_state_is_loaded() -> None:
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    assert not compare(target, source.state_dict())
    load_strict(target, source.state_dict(), "file")
    assert torch.equal(source.weight, target.weight)


def test_all_kinds_of_mismatch_are_in_one_message() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state = {"0.weight": torch.zeros(2, 4), "0.bias": torch.zeros(2), "1.weight": torch.zeros(2, 2)}
    state["1.biass"] = torch.zeros(2)
    with pytest.raises(ValueError) as info:
        load_strict(module, state, "m.safetensors")
    message = str(info.value)
    assert message.startswith("m.safetensors does not fit Sequential: 1 tensors are missing (1.bias)")
    assert "1 tensors are not part of the model (1.biass, perhaps 1.bias)" in message
    assert "0.weight is (2, 4) but the model has (2, 3)" in message
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_long_lists_are_cut_and_counted() -> None:
    module = nn.Sequential(*(nn.Linear(1, 1) for _ in range(5)))
    with pytest.raises(ValueError, match=r"10 tensors are missing \(.*, and 6 more\)"):
        load_strict(module, {}, "empty")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(value: float) -> None:
    state = {"good": torch.ones(2), "count": torch.tensor(3), "bad": torch.tensor([1.0, value])}
    with pytest.raises(ValueError, match=r"file holds NaN or infinity in 1 tensors \(bad\)"):
        check_finite(state, "file")
    del state["bad"]
    check_finite(state, "file")
