"""Rollouts: samples of a policy by any solver schedule of the suite, and their images.

Shapes: B samples, latents C x H x W, images 3 x 8 H x 8 W for most autoencoders.

Latents are kept as the sampler leaves them, in the units that the network sees: these are the x0 of training.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thalweg.diffusion.nft import stochastic
from thalweg.diffusion.nft.policy import Condition, Policy, Who, ask
from thalweg.diffusion.nft.samplers import OdeSolver
from thalweg.diffusion.nft.stochastic import Stochastic, Trajectory, Velocity
from thalweg.diffusion.nft.timesteps import flow_match_sigmas
from thalweg.diffusion.order import generator
from thalweg.diffusion.solvers.linear import Compilable, LinearSchedule
from thalweg.diffusion.solvers.sample import sample
from thalweg.diffusion.solvers.schedule import Node, SolverSchedule

NOISE_STREAM, TRAIN_STREAM, ORDER_STREAM = 1, 2, 3
"""Set the noise of samples, that of training and the order of training apart: all have the same seed."""
FLOW_ERROR = 1e-4
"""Largest |alpha + sigma - 1| of a node of a rectified flow, in stored schedules."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampler:
    """A solver schedule of a rectified flow, ready to run.

    Raises:
        ValueError: If its nodes are those of another noise schedule, or have nothing to tell the network.
    """

    schedule: Compilable
    """What to do."""
    mean: Tensor | None = None
    """Mean of the data, for schedules whose first step uses it."""

    def __post_init__(self) -> None:
        """Check the nodes."""
        for i, node in enumerate(self.schedule.nodes):
            if abs(node.alpha + node.sigma - 1) > FLOW_ERROR:
                raise ValueError(
                    f"node {i} has alpha {node.alpha:.4g} and sigma {node.sigma:.4g}, whose sum is not 1;"
                    " allowed: schedules of a rectified flow"
                )
        for i, node in enumerate(self.asked):
            if node.label is None and node.t is None:
                raise ValueError(f"node {i} has neither a label nor a time to tell the network")
        if self.schedule.first == "mean" and self.mean is None:
            raise ValueError("this schedule starts from the mean of the data; give its SearchedScheduler one")

    @property
    def asked(self) -> tuple[Node, ...]:
        """Nodes at which the network is evaluated."""
        return tuple(self.schedule.nodes[int(self.schedule.first != "network") : -1])

    @property
    def nfe(self) -> int:
        """Evaluations for each sample."""
        return len(self.asked)

    @property
    def levels(self) -> list[float]:
        """Distinct noise levels of the evaluations, falling: those that training takes its times from."""
        return sorted({node.sigma for node in self.asked}, reverse=True)


def sampler_of(solver: Any, num_steps: int | None = None, shift: float = 3.0) -> Sampler:
    """A sampler from whatever tells one.

    Args:
        solver: An :class:`OdeSolver`, to run on FlowMatchEuler's grid; a solver schedule or its JSON file; a
            SearchedScheduler or its folder.
        num_steps: Steps of an OdeSolver; evaluations of one of a scheduler's schedules, which may be left out
            if there is one only.
        shift: Of the grid of an OdeSolver.

    Raises:
        ValueError: If there is no such schedule, or it is not one of a rectified flow.
    """
    if isinstance(solver, str | Path):
        return sampler_of(_read(Path(solver)), num_steps, shift)
    if isinstance(solver, OdeSolver):
        if num_steps is None:
            raise ValueError("num_steps is missing, allowed: 1 and more")
        return Sampler(schedule=solver.schedule(flow_match_sigmas(num_steps, shift)))
    if isinstance(solver, SolverSchedule | LinearSchedule):
        if num_steps not in (None, solver.nfe):
            raise ValueError(f"num_steps is {num_steps}, allowed for this schedule: {solver.nfe}")
        return Sampler(schedule=solver)
    if not hasattr(solver, "schedules"):
        raise ValueError(
            f"solver is a {type(solver).__name__}, allowed: OdeSolver, a solver schedule, SearchedScheduler"
        )
    return _of_scheduler(solver, num_steps)


def _read(path: Path) -> Any:
    if path.is_dir():
        from thalweg.diffusion.solvers.scheduler import SearchedScheduler

        return SearchedScheduler.from_pretrained(path)
    if not path.is_file():
        raise ValueError(f"{path} is neither the folder of a SearchedScheduler nor a file of a schedule")
    return SolverSchedule.load(path)


def _of_scheduler(scheduler: Any, num_steps: int | None) -> Sampler:
    config, known = scheduler.config, scheduler.schedules
    if config.prediction_type != "flow_prediction" or config.clip_data is not None:
        raise ValueError(
            f"the scheduler has prediction_type {config.prediction_type!r} and clip_data {config.clip_data},"
            " allowed: flow_prediction without clip_data"
        )
    if num_steps is None and len(known) == 1:
        num_steps = next(iter(known))
    if num_steps not in known:
        listed = ", ".join(map(str, sorted(known))) or "none"
        raise ValueError(f"num_steps is {num_steps}, allowed by the schedules there are: {listed}")
    mean = None if config.mean is None else torch.as_tensor(config.mean, dtype=torch.float32)
    return Sampler(schedule=known[num_steps], mean=mean)


def image_noise(
    shape: Sequence[int],
    numbers: Sequence[int],
    *,
    seed: int,
    epoch: int,
    step: int = 0,
    stream: int = NOISE_STREAM,
) -> Tensor:
    """Standard normal noise (B, *shape) in float32 on the CPU, for images by their number in the epoch.

    An image's noise depends on seed, epoch, number and step alone: not on the prompt, the batch, the process
    or the device. Copies of a prompt have numbers of their own, and so differ. Step 0 is the start, and
    step i + 1 what a stochastic solver adds in its step i.
    """
    streams = [generator(stream, seed, epoch, number, step) for number in numbers]
    return torch.stack([torch.randn(tuple(shape), generator=own) for own in streams])


def velocity_of(
    network: Any, condition: Condition, *, guidance: float = 1.0, negative: Condition | None = None
) -> Velocity:
    """Velocity noise - x0 at a state and its node, in float32 whatever the network computes in.

    Args:
        network: A transformer of diffusers.
        condition: Its other arguments, a row for each sample.
        guidance: Of classifier-free guidance, v = v_neg + guidance (v - v_neg); 1 for none.
        negative: The condition of v_neg.

    Raises:
        ValueError: If guidance has no negative condition, or a condition other rows than there are states.
    """
    guided = guidance != 1.0
    if guided and negative is None:
        raise ValueError(f"guidance is {guidance}, which needs negative; without it only 1 is allowed")
    if guided and negative is not None:
        condition = {name: torch.cat([negative[name], value]) for name, value in condition.items()}

    def velocity(x: Tensor, node: Node) -> Tensor:
        states = torch.cat([x, x]) if guided else x
        for name, value in condition.items():
            if len(value) != len(states):
                raise ValueError(f"{name} has {len(value)} rows for {len(states)} states")
        label = node.t if node.label is None else node.label
        told = torch.full((len(states),), label, dtype=torch.float32, device=x.device)
        v = ask(network, states, told, condition).float()
        if not guided:
            return v
        without, with_condition = v.chunk(2)
        return without + guidance * (with_condition - without)

    return velocity


@torch.no_grad()
def sample_latents(velocity: Velocity, sampler: Sampler, x_T: Tensor) -> Tensor:
    """Latents (B, C, H, W) in float32 from noise of that shape.

    Raises:
        ArithmeticError: If a result is not finite.
    """
    found = sample(
        sampler.schedule, lambda x, node: x - node.sigma * velocity(x, node), x_T.float(), sampler.mean
    )[-1]
    check_finite(found)
    return found


def check_finite(latents: Tensor) -> None:
    """Refuse samples with values that are not finite.

    Raises:
        ArithmeticError: If there are any.
    """
    if bad := (~latents.flatten(1).isfinite().all(1)).nonzero().flatten().tolist():
        raise ArithmeticError(
            f"{len(bad)} of {len(latents)} samples are not finite, the first is number {bad[0]} of the batch;"
            " the network gives such values, or overflows in its precision"
        )


@torch.no_grad()
def decode(vae: Any, latents: Tensor, *, slice_size: int = 8) -> Tensor:
    """Images (B, 3, H, W) in float32, from 0 to 1.

    Args:
        vae: An autoencoder of diffusers, whose config has scaling_factor and perhaps shift_factor.
        latents: In the network's units.
        slice_size: Images that are decoded at once.

    Raises:
        ValueError: If that is none.
    """
    if slice_size < 1:
        raise ValueError(f"slice_size is {slice_size}, allowed: 1 and more")
    latents = latents / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0.0)
    with without_autocast(latents.device):  # in half precision some autoencoders overflow
        parts = [vae.decode(part.to(vae.dtype), return_dict=False)[0] for part in latents.split(slice_size)]
    return (torch.cat(parts).float() / 2 + 0.5).clamp(0, 1)


def without_autocast(device: torch.device) -> Any:
    """A context in which operations keep the precision of their arguments."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """What an epoch keeps of a batch."""

    latents: Tensor
    """Clean samples x0 (B, C, H, W), float32."""
    images: Tensor | None
    """The same from 0 to 1 (B, 3, H, W), float32; None where nothing looks at them."""


def rollout(
    policy: Policy,
    sampler: Sampler,
    condition: Condition,
    numbers: Sequence[int],
    *,
    shape: Sequence[int],
    seed: int,
    epoch: int,
    who: Who = "old",
    vae: Any = None,
    slice_size: int = 8,
    guidance: float = 1.0,
    negative: Condition | None = None,
) -> Rollout:
    """Sample a batch with a policy, and decode it.

    Args:
        policy: The policies; the current one is selected again afterwards, also after an error.
        sampler: See :func:`sampler_of`.
        condition: Embeddings of the prompts, a row for each image, where the network is.
        numbers: Numbers of the images within the epoch, over all processes.
        shape: Of a latent, (C, H, W).
        seed: Of the noise.
        epoch: Whose noise is another one.
        who: The policy that samples: old, or ema for evaluation.
        vae: Autoencoder, for images.
        slice_size: Images that are decoded at once.
        guidance: See :func:`velocity_of`.
        negative: See :func:`velocity_of`.

    Raises:
        ValueError: As :func:`velocity_of` does.
        ArithmeticError: If a sample is not finite.
    """
    x_T = image_noise(shape, numbers, seed=seed, epoch=epoch)
    with policy.using(who) as network:
        velocity = velocity_of(network, condition, guidance=guidance, negative=negative)
        latents = sample_latents(velocity, sampler, x_T.to(next(network.parameters()).device))
    images = None if vae is None else decode(vae, latents, slice_size=slice_size)
    return Rollout(latents=latents, images=images)


def noisy_rollout(
    policy: Policy,
    sigmas: Sequence[float],
    condition: Condition,
    numbers: Sequence[int],
    *,
    shape: Sequence[int],
    seed: int,
    epoch: int,
    solver: Stochastic = "flow",
    eta: float = 0.7,
    noisy: Collection[int] | None = None,
    who: Who = "old",
    guidance: float = 1.0,
    negative: Condition | None = None,
) -> Trajectory:
    """Sample a batch with noise in every step, for policy gradients.

    Policy, condition, images and guidance are those of :func:`rollout`; solver, eta and noisy those of
    :func:`thalweg.diffusion.nft.stochastic.rollout`, on the noise levels sigmas.

    Raises:
        ValueError: As :func:`velocity_of` and the solver do.
        ArithmeticError: If a sample is not finite.
    """
    draw = partial(image_noise, shape, numbers, seed=seed, epoch=epoch)
    with policy.using(who) as network:
        found = stochastic.rollout(
            velocity_of(network, condition, guidance=guidance, negative=negative),
            sigmas,
            draw().to(next(network.parameters()).device),
            solver=solver,
            eta=eta,
            noisy=noisy,
            noise=lambda i: draw(step=i + 1),
        )
    check_finite(found.states[-1])
    return found


def latent_shape(pipe: Any, height: int, width: int) -> tuple[int, int, int]:
    """Shape (C, H, W) of the latents of images.

    Raises:
        ValueError: If images of that size are no whole patches of latents.
    """
    step = pipe.vae_scale_factor * (getattr(pipe.transformer.config, "patch_size", None) or 1)
    for name, value in (("height", height), ("width", width)):
        if value < step or value % step:
            raise ValueError(f"{name} is {value}, allowed: multiples of {step}")
    scale = pipe.vae_scale_factor
    return pipe.transformer.config.in_channels, height // scale, width // scale
