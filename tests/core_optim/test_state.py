"""The size of an optimizer's state, without storage, is that of a real one after a step."""

import pytest
import torch
from torch import nn

from thalweg.core_optim.build import OPTIMIZERS, build
from thalweg.core_optim.config import OptimConfig, ScheduleConfig
from thalweg.core_optim.state import state_bytes


def network(device: str) -> nn.Module:
    found = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3)).to(device)
    found[1].bias.requires_grad_(False)
    return found


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_state_of_a_step(name: str) -> None:
    config = OptimConfig(name=name, schedule=ScheduleConfig(name="cosine", warmup_ratio=0.1))
    real = network("cpu")
    optimizer = build(real, config, 10)["optimizer"]
    real(torch.ones(2, 7)).sum().backward()
    optimizer.step()
    tensors = [value for state in optimizer.state.values() for value in state.values()]
    on_meta = network("meta")
    assert state_bytes(on_meta, config) == sum(value.numel() * value.element_size() for value in tensors)
    assert all(value.grad is None for value in on_meta.parameters())


def test_adamw_keeps_two_moments_and_a_count() -> None:
    assert state_bytes(network("meta"), OptimConfig()) == 4 * (2 * (7 * 5 + 5 + 5 * 3) + 3)
