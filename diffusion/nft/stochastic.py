"""Rollouts with noise, whose steps have a probability: what policy gradients need.

Every step of these samplers is Gaussian with a mean that is linear in the state and the velocity,

    x_{i+1} ~ N(a x_i + b v_i, s^2 I),

with numbers a, b and s of the noise levels alone. With s = 0 all of them are Euler's method. Let
h = sigma_i - sigma_{i+1}, alpha = 1 - sigma, and unprimed levels be those of the start of a step:

=====  =================================================================================================
flow   SDE of Flow-GRPO (Liu et al. 2025, arXiv 2505.05470): s = g sqrt(h), g = eta sqrt(sigma / alpha),
       where alpha of the grid's second level stands for that of the first if it is 0
dance  SDE of DanceGRPO (Xue et al. 2025, arXiv 2505.07818): s = eta sqrt(h)
ddim   DDIM (Song et al. 2021, arXiv 2010.02502): s = eta sigma' sqrt(1 - (alpha sigma' / alpha' sigma)^2)
=====  =================================================================================================

Both SDEs add -g^2 h / 2 times the score -(x + alpha v) / sigma to Euler's step, with g = eta for dance.

Shapes: N steps, B samples, ... anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from thalweg.diffusion.nft.loss import at_least_float32
from thalweg.diffusion.nft.timesteps import flow_nodes
from thalweg.diffusion.solvers.schedule import Node

Stochastic = Literal["flow", "dance", "ddim"]
Velocity = Callable[[Tensor, Node], Tensor]
"""Velocity noise - x0 at a state and its node."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GaussianStep:
    """One step of a rollout: mean a x + b v and standard deviation s of the next state."""

    x: float
    """Factor of the state."""
    v: float
    """Factor of the velocity."""
    std: float
    """Standard deviation of every number of the next state."""
    normalised: bool = True
    """Whether log-probabilities have their normalising terms; DanceGRPO leaves them out. They do not depend
    on the velocity, so that ratios are the same."""

    def mean(self, x: Tensor, v: Tensor) -> Tensor:
        """Mean of the next state, in float32 at least."""
        return self.x * at_least_float32(x) + self.v * at_least_float32(v)

    def log_prob(self, sample: Tensor, mean: Tensor) -> Tensor:
        """Log-probability of the next state, (B,): the mean over its numbers, not their sum.

        Raises:
            ValueError: If the step has no noise.
        """
        if self.std == 0:
            raise ValueError("a step without noise has no log-probability; its eta or final noise level is 0")
        each = -(at_least_float32(sample) - mean).square() / (2 * self.std**2)
        if self.normalised:
            each = each - math.log(self.std) - 0.5 * math.log(2 * math.pi)
        return each.mean(tuple(range(1, each.ndim)))


def gaussian_step(solver: Stochastic, sigmas: Sequence[float], i: int, eta: float) -> GaussianStep:
    """Numbers of step i from sigmas[i] to sigmas[i + 1].

    Args:
        solver: flow, dance or ddim.
        sigmas: All noise levels of the rollout, falling.
        i: Index of the step.
        eta: Strength of the noise.

    Raises:
        ValueError: For an unknown solver, a negative eta, one above 1 for ddim, a step that is not there, or
            noise that does not fall.
    """
    if solver not in get_args(Stochastic):
        raise ValueError(f"solver is {solver!r}, allowed: {', '.join(get_args(Stochastic))}")
    if eta < 0 or (solver == "ddim" and eta > 1):
        raise ValueError(f"eta is {eta}, allowed: 0 {'to 1' if solver == 'ddim' else 'and more'}")
    if not 0 <= i < len(sigmas) - 1:
        raise ValueError(f"step is {i}, allowed: 0 to {len(sigmas) - 2}")
    now, then = sigmas[i], sigmas[i + 1]
    if not 1 >= now > then >= 0:
        raise ValueError(f"step {i} goes from noise {now} to {then}, allowed: falling levels from 1 to 0")
    if solver == "ddim":
        return _ddim(now, then, eta)
    h = now - then
    alpha = 1 - (sigmas[1] if solver == "flow" and now == 1 else now)
    g = eta * math.sqrt(now / alpha) if solver == "flow" and eta else eta
    pull = g**2 * h / (2 * now)
    return GaussianStep(
        x=1 - pull, v=-h - pull * (1 - now), std=g * math.sqrt(h), normalised=solver == "flow"
    )


def _ddim(now: float, then: float, eta: float) -> GaussianStep:
    """Data x - sigma v and noise x + alpha v, part of which is drawn afresh."""
    ratio = (1 - now) * then / ((1 - then) * now)
    std = eta * then * math.sqrt(1 - ratio**2)
    kept = math.sqrt(then**2 - std**2)
    return GaussianStep(x=1 - then + kept, v=kept * (1 - now) - (1 - then) * now, std=std)


@dataclass(frozen=True, kw_only=True, slots=True)
class Trajectory:
    """A rollout with all that policy gradients need of it."""

    states: tuple[Tensor, ...]
    """N + 1 states, the last one the samples; in float32 at least, as rounding would bias ratios."""
    log_probs_NB: Tensor
    """Log-probability of each step's result; NaN where a step had no noise."""
    steps: tuple[GaussianStep, ...]
    """N steps."""
    labels: tuple[float, ...]
    """What the network was told in each."""

    @property
    def noisy(self) -> tuple[int, ...]:
        """Indices of the steps that had noise: those that can be trained on."""
        return tuple(i for i, step in enumerate(self.steps) if step.std > 0)


@torch.no_grad()
def rollout(
    velocity: Velocity,
    sigmas: Sequence[float],
    x_T: Tensor,
    *,
    solver: Stochastic = "flow",
    eta: float = 0.7,
    noisy: Collection[int] | None = None,
    noise: Callable[[int], Tensor],
) -> Trajectory:
    """Sample with noise and remember the probability of every step.

    Args:
        velocity: The network, called N times.
        sigmas: N + 1 noise levels.
        x_T: Start, at the first level.
        solver: flow, dance or ddim.
        eta: Strength of the noise.
        noisy: Steps that have noise, all if not given; the others are Euler's.
        noise: Standard normal noise of a step, in the shape of the states; not asked where there is none.

    Raises:
        ValueError: As :func:`gaussian_step` does, or for noisy steps that are not there.
    """
    count = len(sigmas) - 1
    if wrong := sorted(set(noisy or ()) - set(range(count))):
        raise ValueError(f"noisy has the steps {wrong}, allowed: 0 to {count - 1}")
    nodes = flow_nodes(list(sigmas))
    states, log_probs, steps = [at_least_float32(x_T)], list[Tensor](), list[GaussianStep]()
    for i in range(count):
        step = gaussian_step(solver, sigmas, i, eta if noisy is None or i in noisy else 0.0)
        mean = step.mean(states[-1], velocity(states[-1], nodes[i]))
        if step.std > 0:
            states.append(mean + step.std * noise(i).to(mean))
            log_probs.append(step.log_prob(states[-1], mean))
        else:
            states.append(mean)
            log_probs.append(mean.new_full(mean.shape[:1], math.nan))
        steps.append(step)
    labels = tuple(node.label for node in nodes[:-1] if node.label is not None)
    return Trajectory(
        states=tuple(states), log_probs_NB=torch.stack(log_probs), steps=tuple(steps), labels=labels
    )
