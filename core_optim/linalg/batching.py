"""Which tensors are worth a batch, and how their state goes into one and comes back."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

BUDGET = 1 << 25
"""Elements of a batch; work space is a few times that."""
SMALL = 1 << 14
"""Elements up to which tensors on a CPU are batched; larger ones gain nothing from it there."""


def batches(tensors: Sequence[Tensor], keys: Sequence[Hashable]) -> list[list[int]]:
    """Numbers of tensors that go together: of one key, within the budget, on a CPU large ones alone."""
    groups: dict[Hashable, list[int]] = {}
    for number, key in enumerate(keys):
        groups.setdefault(key, []).append(number)
    found = []
    for numbers in groups.values():
        one = tensors[numbers[0]]
        size = max(1, BUDGET // max(1, one.numel()))
        if one.device.type == "cpu" and one.numel() > SMALL:
            size = 1
        found += [numbers[start : start + size] for start in range(0, len(numbers), size)]
    return found


def gathered(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape as a batch; a single contiguous one is not copied."""
    return tensors[0].contiguous()[None] if len(tensors) == 1 else torch.stack(list(tensors))


def write_back(states: Sequence[dict[str, Tensor]], batch: dict[str, Tensor]) -> None:
    """Put the entries of a batch into the states it was gathered from, unless they are the same memory."""
    for name, values in batch.items():
        for state, value in zip(states, values):
            if len(states) == 1 and state[name].data_ptr() != value.data_ptr():
                state[name] = value
            elif state[name].data_ptr() != value.data_ptr():
                state[name].copy_(value)
