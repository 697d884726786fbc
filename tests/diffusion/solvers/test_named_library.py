"""Coefficient methods that no recorded run covers, against the installed diffusers."""

import math

import pytest
import torch
from solver_runs import golden, mixture
from torch import Tensor

from thalweg.diffusion.solvers.named import named
from thalweg.diffusion.solvers.sample import sample
from thalweg.diffusion.solvers.schedule import Node

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def start() -> Tensor:
    return golden("baselines")[1]["x_T"]


def vp(variance: float) -> Node:
    """Node with a cumulative alpha."""
    return Node(alpha=math.sqrt(variance), sigma=math.sqrt(1 - variance))


def noise(x: Tensor, node: Node) -> Tensor:
    return (x - node.alpha * mixture("gm16")(x, node)) / node.sigma


def close(ours: Tensor, theirs: Tensor) -> None:
    """Equal but for the float32 tables of the library."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 * max(1.0, float(theirs.abs().max())))


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_lms(order: int) -> None:
    from diffusers import LMSDiscreteScheduler

    scheduler = LMSDiscreteScheduler(**BETAS)
    scheduler.set_timesteps(8)
    nodes = [vp(1 / (1 + rho**2)) for rho in scheduler.sigmas.tolist()]
    y = start() * float(scheduler.sigmas[0])
    ours = sample(named("lms", nodes, order=order), mixture("gm16"), y * nodes[0].alpha)[-1]
    for t, node in zip(scheduler.timesteps, nodes):
        scheduler.is_scale_input_called = True
        y = scheduler.step(noise(y * node.alpha, node), t, y, order=order).prev_sample
    close(ours, y)


def test_pndm_with_its_runge_kutta_start() -> None:
    from diffusers import PNDMScheduler

    scheduler = PNDMScheduler(**BETAS, skip_prk_steps=False, set_alpha_to_one=False)
    scheduler.set_timesteps(10)
    nodes = {t: vp(float(scheduler.alphas_cumprod[t])) for t in range(1000)}
    # The library's last step goes from label 0 to the same noise level, which is none.
    grid = [nodes[t] for t in range(900, -1, -100)]
    solver = named("pndm", grid, middle=[nodes[t] for t in (850, 750, 650)])
    ours = sample(solver, mixture("gm16"), start())[-1]
    x = start()
    for t in scheduler.timesteps.tolist()[:-1]:
        x = scheduler.step(noise(x, nodes[t]), t, x).prev_sample
    close(ours, x)
    assert solver.nfe == len(scheduler.timesteps) - 1


def test_ipndm() -> None:
    from diffusers import IPNDMScheduler

    nodes = [vp(1 / (1 + math.exp(-2 * lam))) for lam in torch.linspace(-4, 3, 9).tolist()]
    scheduler = IPNDMScheduler(trained_betas=[node.sigma for node in nodes])
    scheduler.set_timesteps(8)
    ours = sample(named("ipndm", nodes), mixture("gm16"), start())[-1]
    x = start()
    for t, node in zip(scheduler.timesteps, nodes):
        data = mixture("gm16")(x, node)
        velocity = node.alpha * noise(x, node) - node.sigma * data
        x = scheduler.step(velocity, t, x).prev_sample
    close(ours, x)
