"""A policy small enough for tests: eight Gaussians on a ring, one for each label, learnt with wrong labels.

The model is a rectified flow of two numbers given a label. 45 % of the labels it learns from are wrong, so it
often misses the mode that it is asked for; the reward of a sample is 1 within 0.35 of that mode and else 0.
"""

import copy
import math
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor, nn

from thalweg.diffusion.nft import group_advantage, nft_loss
from thalweg.diffusion.nft.advantage import AdvMode
from thalweg.diffusion.nft.decay import Decay, polyak_
from thalweg.diffusion.nft.geometry import geometry
from thalweg.diffusion.nft.policy_gradient import awm_loss, grpo_loss
from thalweg.diffusion.nft.prompts import GroupBatches
from thalweg.diffusion.nft.samplers import OdeSolver
from thalweg.diffusion.nft.stochastic import rollout
from thalweg.diffusion.nft.timesteps import TrainTimes, flow_match_sigmas
from thalweg.diffusion.order import generator
from thalweg.diffusion.solvers.sample import sample
from thalweg.diffusion.solvers.schedule import Node

MODES, PROMPTS, GROUPS, COPIES = 8, 24, 24, 24
WRONG_LABELS, RADIUS, WIDTH = 0.45, 0.35, 0.1
SIGMAS = flow_match_sigmas(10)
TIMES = TrainTimes(choice="stratified", count=3)


class Policy(nn.Module):
    """Velocity of a state given a time and a label."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        sizes = [2 + 8 + MODES, width, width, width]
        layers = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.SiLU())]
        self.net = nn.Sequential(*layers, nn.Linear(width, 2))

    def forward(self, x_B2: Tensor, t_B: Tensor, label_B: Tensor) -> Tensor:
        angles = t_B[:, None] * math.pi * torch.tensor([0.5, 1.0, 2.0, 4.0])
        told = nn.functional.one_hot(label_B, MODES).to(x_B2)
        return self.net(torch.cat([x_B2, angles.sin(), angles.cos(), told], 1))


def modes() -> Tensor:
    angles = torch.arange(MODES) * 2 * math.pi / MODES
    return 1.5 * torch.stack([angles.cos(), angles.sin()], 1)


def reward(x_B2: Tensor, label_B: Tensor) -> Tensor:
    return ((x_B2 - modes()[label_B]).norm(dim=1) < RADIUS).float()


@cache
def pretrained(seed: int, steps: int = 2500) -> Policy:
    stream = generator(seed, 0)
    torch.manual_seed(seed)
    policy = Policy()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=2e-3, weight_decay=0.0)
    anneal = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        label = torch.randint(MODES, (256,), generator=stream)
        x0 = modes()[label] + WIDTH * torch.randn(256, 2, generator=stream)
        other = torch.randint(MODES, (256,), generator=stream)
        told = torch.where(torch.rand(256, generator=stream) < WRONG_LABELS, other, label)
        t, noise = torch.rand(256, generator=stream), torch.randn(256, 2, generator=stream)
        x_t = (1 - t[:, None]) * x0 + t[:, None] * noise
        loss = (policy(x_t, t, told) - (noise - x0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        anneal.step()
    return policy


def ode_samples(
    policy: Policy, solver: OdeSolver, sigmas: list[float], noise: Tensor, label: Tensor
) -> Tensor:
    def denoiser(x: Tensor, node: Node) -> Tensor:
        return x - node.sigma * policy(x, x.new_full((len(x),), node.sigma), label)

    with torch.no_grad():
        return sample(solver.schedule(sigmas), denoiser, noise)[-1]


def hit_rate(policy: Policy, count: int = 2000) -> float:
    """Mean reward of samples of Euler's method in 40 steps."""
    label = torch.arange(count) % MODES
    noise = torch.randn(count, 2, generator=generator(123))
    x = ode_samples(policy, OdeSolver(name="flow"), flow_match_sigmas(40), noise, label)
    return reward(x, label).mean().item()


RAMP = Decay(rate=0.02, cap=0.9)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One fine-tuning run."""

    method: str = "nft"
    """nft, awm or grpo."""
    adv_mode: AdvMode = "all"
    negative: bool = True
    epochs: int = 20
    lr: float = 1e-3
    beta: float = 1.0
    decay: Decay = RAMP
    seed: int = 0


def finetune(base: Policy, run: Run) -> Policy:
    """Alternate rollouts, rewards and one optimizer step, as the published algorithm does."""
    policy, old = copy.deepcopy(base), copy.deepcopy(base)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=run.lr, weight_decay=1e-4)
    prompts = GroupBatches(PROMPTS, geometry(GROUPS, COPIES, 1, GROUPS * COPIES), seed=run.seed)
    for epoch in range(run.epochs):
        (index,) = prompts
        prompt = torch.tensor(index)
        label, stream = prompt % MODES, generator(run.seed, 1, epoch)
        noise = torch.randn(len(label), 2, generator=stream)
        optimizer.zero_grad()
        _LOSSES[run.method](run, policy, old, noise, prompt, label, stream)
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        eta = 0.0 if run.method == "grpo" else run.decay(epoch + 1)
        polyak_(list(old.parameters()), list(policy.parameters()), eta)
    return policy


def _forward(
    run: Run,
    policy: Policy,
    old: Policy,
    noise: Tensor,
    prompt: Tensor,
    label: Tensor,
    stream: torch.Generator,
) -> None:
    """Gradients of the losses on the forward process: NFT and AWM."""
    x0 = ode_samples(old, OdeSolver(), SIGMAS, noise, label)
    advantage = group_advantage(reward(x0, label), prompt)
    levels = torch.tensor(SIGMAS)[TIMES.draw(10, len(label), stream)]
    for t in levels.unbind(1):
        eps = torch.randn(x0.shape, generator=stream)
        x_t = (1 - t[:, None]) * x0 + t[:, None] * eps
        v = policy(x_t, t, label)
        with torch.no_grad():
            v_old = old(x_t, t, label)
        given = (v, v_old, None, x_t, x0, t, advantage)
        if run.method == "nft":
            how = {"adv_mode": run.adv_mode, "negative": run.negative}
            loss, _ = nft_loss(*given, beta=run.beta, kl_weight=0, adv_clip_max=5, **how)
        else:
            loss, _ = awm_loss(*given, kl_weight=0, adv_clip_max=5, old_weight=1.0, noise=eps)
        (loss / levels.shape[1]).backward()


def _reverse(
    run: Run,
    policy: Policy,
    old: Policy,
    noise: Tensor,
    prompt: Tensor,
    label: Tensor,
    stream: torch.Generator,
) -> None:
    """Gradients of Flow-GRPO on every step of a rollout with noise."""
    path = rollout(
        lambda x, node: old(x, x.new_full((len(x),), node.sigma), label),
        SIGMAS,
        noise,
        noise=lambda i: torch.randn(noise.shape, generator=stream),
    )
    advantage = group_advantage(reward(path.states[-1], label), prompt)
    for i in path.noisy:
        x = path.states[i]
        mean = path.steps[i].mean(x, policy(x, x.new_full((len(x),), SIGMAS[i]), label))
        log_prob = path.steps[i].log_prob(path.states[i + 1], mean)
        loss, _ = grpo_loss(log_prob, path.log_probs_NB[i], advantage, clip_range=0.2)
        (loss / len(path.noisy)).backward()


_LOSSES = {"nft": _forward, "awm": _forward, "grpo": _reverse}
