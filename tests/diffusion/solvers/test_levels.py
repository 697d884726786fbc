"""Noise levels of labels: those of the noise schedule, of the nodes, and without waiting for a device."""

import numpy as np
import pytest
import torch

from thalweg.diffusion.schedules import EDM, VE, Flow, NoiseSchedule, VPCosine, VPDiscrete, VPLinear
from thalweg.diffusion.solvers.adams import adams
from thalweg.diffusion.solvers.grids import nodes
from thalweg.diffusion.solvers.levels import levels_of_labels
from thalweg.diffusion.solvers.scheduler import SearchedScheduler

SCHEDULES = [
    VPDiscrete(),
    VPDiscrete(n=4, betas=(0.1, 0.2, 0.3, 0.4)),
    VPDiscrete(rescale_zero_snr=True),
    VPLinear(label_scale=999.0),
    VPCosine(label_scale=999.0),
    VE(),
    VE(label_kind="edm"),
    EDM(),
    Flow(shift=3.0),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.kind)
def test_labels_are_turned_back_into_levels(schedule: NoiseSchedule) -> None:
    t = np.linspace(schedule.t_end, schedule.t_start, 37)
    t[1:-1] += 0.01 * (t[1] - t[0])
    alpha, sigma = levels_of_labels(schedule, torch.tensor(schedule.label(t)))
    np.testing.assert_allclose(alpha, schedule.alpha(t), rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(sigma, schedule.sigma(t), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.kind)
def test_noise_is_added_without_waiting_for_the_device(schedule: NoiseSchedule) -> None:
    """On the device "meta" tensors have no values, so that whatever asks for one fails."""
    made = adams(nodes(schedule, 3, "uniform_t"), order=1)
    scheduler = SearchedScheduler.from_schedules(
        [made], prediction_type="sample", noise_schedule=schedule.to_dict()
    )
    scheduler.set_timesteps(3, device="meta")
    x = torch.empty(2, 1, 4, 4, device="meta", dtype=torch.bfloat16)
    for labels in (scheduler.timesteps[:1], torch.empty(2, device="meta", dtype=torch.int64)):
        found = scheduler.add_noise(x, x, labels)
        assert (found.shape, found.dtype, found.device) == (x.shape, x.dtype, x.device)


def test_without_a_noise_schedule_only_nodes_have_levels() -> None:
    made = adams(nodes(VPDiscrete(), 3, "uniform_t"), order=1)
    scheduler = SearchedScheduler.from_schedules([made])
    x0, noise = torch.randn(2, 3, 1, 2, 2)
    found = scheduler.add_noise(x0, noise, scheduler.timesteps)
    for k, node in enumerate(made.nodes[:-1]):
        torch.testing.assert_close(found[k], node.alpha * x0[k] + node.sigma * noise[k])
    with pytest.raises(ValueError, match=r"label 5\.0 is no node"):
        scheduler.add_noise(x0, noise, torch.tensor([5]))


def test_labels_that_cannot_be_turned_back_are_refused() -> None:
    class Odd(VE):
        kind = "odd"

    class Other(NoiseSchedule):
        kind = "other"

    assert levels_of_labels(Odd(), torch.ones(1))[1].item() == 1.0
    with pytest.raises(ValueError, match="labels of noise schedule 'other' cannot be turned back"):
        levels_of_labels(Other(), torch.ones(1))
