"""The first half of an epoch: draw its images, have them rewarded, share the rewards.

Rewards are computed by threads while the next images are drawn.

Shapes: M images of this process, N images of all processes, latents C x H x W.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thalweg.diffusion.nft.config import GRPOObjective, RolloutConfig
from thalweg.diffusion.nft.data import EpochPlan
from thalweg.diffusion.nft.policy import Condition, Policy, Who
from thalweg.diffusion.nft.rollout import Sampler, decode, noisy_rollout, rollout
from thalweg.diffusion.nft.stochastic import Trajectory
from thalweg.diffusion.nft.text_to_image import TextToImage
from thalweg.diffusion.rewards.base import RewardResult
from thalweg.diffusion.rewards.pool import RewardPool

Progress = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and how much there is."""


@dataclass(frozen=True, kw_only=True)
class Artist:
    """Draws images of a policy."""

    scene: TextToImage
    """Pipeline."""
    policy: Policy
    """Policies of its transformer."""
    rollout: RolloutConfig
    """How."""
    seed: int
    """Of the noise."""
    noise: GRPOObjective | None = None
    """Noise in rollouts, for policy gradients."""

    def sampler(self) -> Sampler:
        """The solver."""
        return self.scene.sampler(self.rollout)

    def sigmas(self) -> list[float]:
        """Noise levels of the steps, the last one 0."""
        return [node.sigma for node in self.sampler().schedule.nodes]

    def draw(
        self, prompts: Sequence[str], numbers: Sequence[int], *, epoch: int, who: Who, device: torch.device
    ) -> tuple[Tensor, Tensor, Trajectory | None]:
        """Latents (B, C, H, W) and images (B, 3, height, width), and how noisy rollouts came about.

        Args:
            prompts: A prompt for each image; they have embeddings.
            numbers: Numbers of the images within the epoch.
            epoch: Whose noise is another one.
            who: The policy.
            device: Where the network is.
        """
        shape = self.scene.latents(self.rollout)
        condition = self.scene.condition(prompts, device)
        guided = self.rollout.guidance != 1.0
        negative = self.scene.condition([""] * len(prompts), device) if guided else None
        how = {"shape": shape, "seed": self.seed, "epoch": epoch, "who": who}
        extra = {"guidance": self.rollout.guidance, "negative": negative}
        if self.noise is None:
            found = rollout(self.policy, self.sampler(), condition, numbers, **how, **extra)
            latents, trajectory = found.latents, None
        else:
            trajectory = self._noisy(condition, numbers, how | extra)
            latents = trajectory.states[-1]
        return latents, decode(self.scene.vae, latents, slice_size=self.rollout.slice_size), trajectory

    def _noisy(self, condition: Condition, numbers: Sequence[int], how: dict) -> Trajectory:
        assert self.noise is not None
        sigmas = self.sigmas()
        return noisy_rollout(
            self.policy,
            sigmas,
            condition,
            numbers,
            solver=self.noise.solver,
            eta=self.noise.eta,
            noisy=noisy_steps(self.noise, len(sigmas) - 1),
            **how,
        )


def noisy_steps(noise: GRPOObjective, count: int) -> range:
    """Steps of a rollout that have noise: those of the window, or all but the last.

    Raises:
        ValueError: If the window is not within the steps that can have noise.
    """
    start, stop = noise.window or (0, count - 1)
    if not 0 <= start < stop <= count - 1:
        raise ValueError(
            f"window is {noise.window}, allowed for {count} steps: 0 <= first < end <= {count - 1}"
        )
    return range(start, stop)


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Images of an epoch on this process."""

    plan: EpochPlan
    """What they were to show."""
    latents: Tensor
    """Clean samples (M, C, H, W), float32, where the network is."""
    trajectory: Trajectory | None
    """States and probabilities of noisy rollouts."""
    rewards: RewardResult
    """Their rewards."""


def collect(
    artist: Artist,
    pool: RewardPool,
    plan: EpochPlan,
    *,
    batch_size: int,
    device: torch.device,
    timeout: float | None = None,
    progress: Progress | None = None,
) -> Samples:
    """Draw the images of an epoch with the old policy, and wait for their rewards.

    Raises:
        RewardError: If a reward cannot be had.
        ArithmeticError: If a sample is not finite.
    """
    latents, trajectories, pending = [], [], []
    parts = list(chunks(len(plan["numbers"]), batch_size))
    for done, part in enumerate(parts):
        if progress:
            progress("rollout", done, len(parts))
        prompts = plan["prompts"][part]
        drawn = artist.draw(prompts, plan["numbers"][part], epoch=plan["epoch"], who="old", device=device)
        latents.append(drawn[0])
        trajectories.append(drawn[2])
        pending.append(pool.submit(drawn[1], prompts, plan["metadata"][part]))
    if progress:
        progress("rewards", 0, 1)
    results = [waiting.result(timeout) for waiting in pending]
    return Samples(
        plan=plan,
        latents=torch.cat(latents),
        trajectory=joined([t for t in trajectories if t is not None]),
        rewards=concatenated(results),
    )


def chunks(count: int, size: int) -> Iterator[slice]:
    """Slices of at most a size."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def concatenated(results: Sequence[RewardResult]) -> RewardResult:
    """Results of several batches as one."""
    parts = {name: torch.cat([r.parts[name] for r in results]) for name in results[0].parts}
    return RewardResult(scores=torch.cat([r.scores for r in results]), parts=parts)


def joined(trajectories: Sequence[Trajectory]) -> Trajectory | None:
    """Trajectories of several batches as one; None of none."""
    if not trajectories:
        return None
    return Trajectory(
        states=tuple(torch.cat(states) for states in zip(*(t.states for t in trajectories), strict=True)),
        log_probs_NB=torch.cat([t.log_probs_NB for t in trajectories], 1),
        steps=trajectories[0].steps,
        labels=trajectories[0].labels,
    )


def spread(values: Sequence[Tensor], numbers: Sequence[int], total: int) -> Tensor:
    """Values (M,) of this process's images at their numbers, zero elsewhere, (len(values), N) in float64.

    The sum over processes is the table of all images, whoever has which.
    """
    table = torch.zeros(len(values), total, dtype=torch.float64)
    if values:
        table[:, torch.tensor(numbers)] = torch.stack([value.double() for value in values])
    return table
