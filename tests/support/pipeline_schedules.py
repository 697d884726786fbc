"""SearchedScheduler with the solvers of schedulers of diffusers, on their own nodes."""

from typing import Any

import diffusers
from diffusers import SchedulerMixin

from thalweg.diffusion.from_diffusers import KINDS, network_of
from thalweg.diffusion.s3.space import SearchSpace
from thalweg.diffusion.solvers.named import named
from thalweg.diffusion.solvers.schedule import Node
from thalweg.diffusion.solvers.scheduler import SearchedScheduler

STEPS = 5
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "DDIMScheduler": ("ddim", {}),
    "EulerDiscreteScheduler": ("euler", {}),
    "DPMSolverMultistepScheduler": ("dpmpp", {"order": 2}),
    "UniPCMultistepScheduler": ("unipc", {"order": 2}),
    "FlowMatchEulerDiscreteScheduler": ("flow_euler", {}),
}
"""Our names of the solvers of diffusers."""


def nodes_of(scheduler: SchedulerMixin) -> list[Node]:
    """Nodes of a scheduler of diffusers after ``set_timesteps``."""
    labels = [*scheduler.timesteps.tolist(), None]
    if isinstance(scheduler, diffusers.DDIMScheduler):
        levels = [float(scheduler.alphas_cumprod[t]) for t in labels[:-1]] + [1.0]
        return [Node(alpha=a**0.5, sigma=(1 - a) ** 0.5, label=t) for a, t in zip(levels, labels)]
    if isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler):
        return [Node(alpha=1 - s, sigma=s, label=t) for s, t in zip(scheduler.sigmas.tolist(), labels)]
    variances = [1 / (1 + s**2) for s in scheduler.sigmas.tolist()]
    return [Node(alpha=v**0.5, sigma=(1 - v) ** 0.5, label=t) for v, t in zip(variances, labels)]


def same(theirs: SchedulerMixin) -> SearchedScheduler:
    """Ours with the solver of theirs on its own nodes."""
    theirs.set_timesteps(STEPS)
    name, options = OURS[type(theirs).__name__]
    return wrapped(named(name, nodes_of(theirs), **options), theirs)


def searched(theirs: SchedulerMixin, nfe: int = STEPS) -> SearchedScheduler:
    """Steps of several orders with correctors, on nodes between the integer labels."""
    space = SearchSpace(noise=network_of(theirs.config)[0], nfe=nfe)
    genes = next(genes for genes in space.seeds() if any(step.corrector for step in genes.steps))
    return wrapped(space.schedule(genes), theirs)


def wrapped(schedule: Any, theirs: SchedulerMixin) -> SearchedScheduler:
    """A schedule for the network of a scheduler."""
    noise, kind = network_of(theirs.config)
    return SearchedScheduler.from_schedules(
        [schedule],
        prediction_type={kind: name for name, kind in KINDS.items()}[kind],
        noise_schedule=noise.to_dict(),
    )
