"""The second half of an epoch: the losses of its micro-batches, one after the other.

Everything random depends on seed, epoch, number of the image and number of the time alone: not on processes
and micro-batches.

Shapes: M images of this process, B of a micro-batch, T times of an image, latents C x H x W.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thalweg.diffusion.nft.collect import Samples, chunks
from thalweg.diffusion.nft.config import AWMObjective, GRPOObjective, NFTObjective
from thalweg.diffusion.nft.geometry import Geometry
from thalweg.diffusion.nft.loss import expand, nft_loss
from thalweg.diffusion.nft.policy import Condition, Policy, Velocities
from thalweg.diffusion.nft.policy_gradient import awm_loss, grpo_loss
from thalweg.diffusion.nft.rollout import ORDER_STREAM, TRAIN_STREAM, image_noise
from thalweg.diffusion.nft.timesteps import TRAIN_STEPS, TrainTimes
from thalweg.diffusion.order import generator

Loss = tuple[Tensor, dict[str, Tensor]]
"""A loss and its metrics."""
Objective = NFTObjective | AWMObjective


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What the losses of an optimizer step are made of."""

    policy: Policy
    """Policies."""
    samples: Samples
    """Images of the epoch on this process."""
    advantage: Tensor
    """Of each, (M,)."""
    condition: Callable[[Sequence[str]], Condition]
    """Embeddings of prompts."""
    batch: int
    """Images of a micro-batch."""
    seed: int
    """Of noise and times."""

    def batches(self, positions: Sequence[int]) -> Iterator[list[int]]:
        """Micro-batches of positions among the images of this process."""
        for part in chunks(len(positions), self.batch):
            yield list(positions[part])

    def numbers(self, positions: Sequence[int]) -> list[int]:
        """Numbers of images within the epoch."""
        return [self.samples.plan["numbers"][i] for i in positions]

    def prompts(self, positions: Sequence[int]) -> list[str]:
        """Prompts of images."""
        return [self.samples.plan["prompts"][i] for i in positions]


def forward_losses(
    terms: Terms,
    positions: Sequence[int],
    objective: Objective,
    levels: Sequence[float],
    times: TrainTimes,
    *,
    old_is_current: bool = False,
) -> Iterator[Loss]:
    """Losses of NFT or AWM, of each micro-batch at each of its times.

    Args:
        terms: Images and policies.
        positions: Images of the optimizer step.
        objective: Which loss.
        levels: Noise levels of rollouts, falling.
        times: Which of them an image is trained on.
        old_is_current: Whether both policies have equal weights.
    """
    found = terms.samples
    epoch, device = found.plan["epoch"], found.latents.device
    levels_N = torch.tensor(levels, dtype=torch.float32)
    for part in terms.batches(positions):
        numbers = terms.numbers(part)
        drawn = [draw_times(times, len(levels), terms.seed, epoch, number) for number in numbers]
        t_TB = levels_N[torch.cat(drawn)].T.to(device)
        index = torch.tensor(part, device=device)
        x0, a_B = found.latents[index], terms.advantage[index]
        condition = terms.condition(terms.prompts(part))
        for j, t_B in enumerate(t_TB):
            noise = image_noise(
                x0.shape[1:], numbers, seed=terms.seed, epoch=epoch, step=j, stream=TRAIN_STREAM
            ).to(device)
            t = expand(t_B, x0)
            x_t = (1 - t) * x0 + t * noise
            v = terms.policy.velocities(
                x_t,
                TRAIN_STEPS * t_B,
                condition,
                reference=objective.kl_weight > 0,
                old_is_current=old_is_current,
            )
            yield objective_loss(objective, v, x_t, x0, t_B, a_B, noise)


def objective_loss(
    objective: Objective, v: Velocities, x_t: Tensor, x0: Tensor, t: Tensor, advantage: Tensor, noise: Tensor
) -> Loss:
    """Loss of a micro-batch at one time each."""
    given = (v.current, v.old, v.reference, x_t, x0, t, advantage)
    if isinstance(objective, NFTObjective):
        return nft_loss(
            *given,
            beta=objective.beta,
            kl_weight=objective.kl_weight,
            adv_clip_max=objective.adv_clip_max,
            adv_mode=objective.adv_mode,
            weighting=objective.weighting,
            noise=noise,
            negative=objective.negative,
        )
    return awm_loss(
        *given,
        kl_weight=objective.kl_weight,
        adv_clip_max=objective.adv_clip_max,
        old_weight=objective.old_weight,
        clip_range=objective.clip_range,
        weighting=objective.weighting,
        power=objective.power,
        noise=noise,
    )


def grpo_losses(terms: Terms, positions: Sequence[int], objective: GRPOObjective) -> Iterator[Loss]:
    """Losses of Flow-GRPO, of each micro-batch at each of its steps with noise."""
    trajectory = terms.samples.trajectory
    assert trajectory is not None, "policy gradients need rollouts with noise"
    device = terms.samples.latents.device
    for part in terms.batches(positions):
        index = torch.tensor(part, device=device)
        condition = terms.condition(terms.prompts(part))
        for i in trajectory.noisy:
            step, label = trajectory.steps[i], trajectory.labels[i]
            x, then = trajectory.states[i][index], trajectory.states[i + 1][index]
            told = torch.full((len(part),), label, device=device)
            mean_ref = None
            if objective.kl_weight:
                mean_ref = step.mean(x, terms.policy.velocity("reference", x, told, condition))
            mean = step.mean(x, terms.policy.velocity("current", x, told, condition))
            yield grpo_loss(
                step.log_prob(then, mean),
                trajectory.log_probs_NB[i][index],
                terms.advantage[index],
                clip_range=objective.clip_range,
                adv_clip_max=objective.adv_clip_max,
                kl_weight=objective.kl_weight,
                mean=mean if objective.kl_weight else None,
                mean_ref=mean_ref,
                std=step.std,
            )


def draw_times(times: TrainTimes, count: int, seed: int, epoch: int, number: int) -> Tensor:
    """Indices of levels that an image is trained on, (1, T)."""
    return times.draw(count, 1, generator(ORDER_STREAM, seed, epoch, number))


def steps_of_epoch(numbers: Sequence[int], shape: Geometry, *, seed: int, epoch: int) -> list[list[int]]:
    """Which images of this process each optimizer step takes, as positions in the numbers.

    Where the size of groups allows, each step takes equally many of every group, chosen at random but alike
    on any number of processes. Otherwise this process's images are split at random.
    """
    steps, k = shape.gradient_steps, shape.group_size
    if steps == 1:
        return [list(range(len(numbers)))]
    if k % steps or shape.scattered:
        stream = generator(ORDER_STREAM, seed, epoch, numbers[0], 1)
        order = torch.randperm(len(numbers), generator=stream).tolist()
        share = len(order) // steps
        return [sorted(order[i * share : (i + 1) * share]) for i in range(steps)]
    places = {
        group: torch.randperm(k, generator=generator(ORDER_STREAM, seed, epoch, group, 1)).tolist()
        for group in {number // k for number in numbers}
    }
    found: list[list[int]] = [[] for _ in range(steps)]
    for position, number in enumerate(numbers):
        found[places[number // k][number % k] * steps // k].append(position)
    return found
