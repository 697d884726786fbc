"""Every scheduler of diffusers for a network, at an exact number of evaluations of the network.

``library_schedulers(config)`` lists them with their variants, and ``run_library`` draws with one of them:

    for name in library_schedulers(pipeline.scheduler.config):
        images = run_library(name, pipeline, noise, labels, nfe=8)
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from thalweg.diffusion.export import PREDICTION_TYPES, scheduler_for
from thalweg.diffusion.from_diffusers import EDM_SCHEDULERS, network_of
from thalweg.diffusion.schedules import EDM, Flow, VPDiscrete

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

Network = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""What a network answers at states (B, C, ...), one label of the time, and labels of the classes (B,)."""
Axis = dict[str, dict[str, Any]]
"""Choices of an option by name, which are empty for defaults."""

SPACED: Axis = {name: {"timestep_spacing": name} for name in ("trailing", "linspace", "leading")}
SIGMAS: Axis = {
    name: {f"use_{name}_sigmas": True, "timestep_spacing": "linspace"}
    for name in ("karras", "exponential", "beta")
}
GRIDS: Axis = {**SPACED, **SIGMAS}
NO_SPACING: Axis = {
    "": {},
    **{name: {f"use_{name}_sigmas": True} for name in ("karras", "exponential", "beta")},
}
LU: Axis = {**GRIDS, "lu": {"use_lu_lambdas": True, "timestep_spacing": "linspace"}}
FINAL: Axis = {"": {"final_sigmas_type": "zero"}, "sigma_min": {"final_sigmas_type": "sigma_min"}}
SIGMA_MIN: Axis = {"": {"final_sigmas_type": "sigma_min"}}
ORDERS: Axis = {str(n): {"solver_order": n} for n in (1, 2, 3)}
BLOCKS: Axis = {str(n): {"solver_order": n, "lower_order_final": True} for n in (1, 2, 3)}
MULTISTEP: Axis = {
    "1": {"solver_order": 1},
    "2M midpoint": {"solver_order": 2, "solver_type": "midpoint"},
    "2M heun": {"solver_order": 2, "solver_type": "heun"},
    "3M": {"solver_order": 3},
}
BH: Axis = {name: {"solver_type": name} for name in ("bh1", "bh2")}


def _algorithm(name: str) -> Axis:
    return {name: {"algorithm_type": name}}


SA_ORDERS: Axis = {str(n): {"predictor_order": n, "corrector_order": n} for n in (1, 2, 3)}

BETAS: tuple[tuple[str, Sequence[Axis]], ...] = (
    ("DDIMScheduler", [SPACED]),
    ("DDPMScheduler", [SPACED]),
    ("PNDMScheduler", [{"": {"skip_prk_steps": True}, "prk": {"skip_prk_steps": False}}, SPACED]),
    ("LMSDiscreteScheduler", [GRIDS]),
    ("EulerDiscreteScheduler", [GRIDS, FINAL]),
    ("EulerAncestralDiscreteScheduler", [SPACED]),
    ("HeunDiscreteScheduler", [GRIDS]),
    ("KDPM2DiscreteScheduler", [GRIDS]),
    ("KDPM2AncestralDiscreteScheduler", [GRIDS]),
    ("DPMSolverMultistepScheduler", [_algorithm("dpmsolver++"), MULTISTEP, LU, FINAL]),
    ("DPMSolverMultistepScheduler", [_algorithm("dpmsolver"), MULTISTEP, LU, SIGMA_MIN]),
    ("DPMSolverMultistepScheduler", [_algorithm("sde-dpmsolver++"), MULTISTEP, LU]),
    ("DPMSolverSinglestepScheduler", [_algorithm("dpmsolver++"), BLOCKS, NO_SPACING, FINAL]),
    ("DPMSolverSinglestepScheduler", [_algorithm("dpmsolver"), BLOCKS, NO_SPACING, SIGMA_MIN]),
    ("DEISMultistepScheduler", [ORDERS, GRIDS]),
    ("UniPCMultistepScheduler", [BH, ORDERS, GRIDS, FINAL]),
    ("UniPCMultistepScheduler", [{"noise": {"predict_x0": False}}, BH, ORDERS, GRIDS, SIGMA_MIN]),
    ("SASolverScheduler", [{"": {}, "noise": {"algorithm_type": "noise_prediction"}}, SA_ORDERS, GRIDS]),
    ("LCMScheduler", []),
    ("TCDScheduler", []),
)
FLOWS: tuple[tuple[str, Sequence[Axis]], ...] = (
    ("FlowMatchEulerDiscreteScheduler", [NO_SPACING]),
    ("FlowMatchHeunDiscreteScheduler", []),
    ("FlowMatchLCMScheduler", []),
    ("DPMSolverMultistepScheduler", [_algorithm("dpmsolver++"), MULTISTEP, FINAL]),
    ("DPMSolverMultistepScheduler", [_algorithm("sde-dpmsolver++"), MULTISTEP]),
    ("DPMSolverSinglestepScheduler", [_algorithm("dpmsolver++"), BLOCKS, FINAL]),
    ("DEISMultistepScheduler", [ORDERS]),
    ("UniPCMultistepScheduler", [BH, ORDERS, FINAL]),
    ("SASolverScheduler", [SA_ORDERS]),
)
EDMS: tuple[tuple[str, Sequence[Axis]], ...] = (
    ("EDMEulerScheduler", [{"": {}, "exponential": {"sigma_schedule": "exponential"}}]),
    (
        "EDMDPMSolverMultistepScheduler",
        [_algorithm("dpmsolver++"), MULTISTEP, {"": {}, "exponential": {"sigma_schedule": "exponential"}}],
    ),
)
"""Classes of diffusers with the axes of their variants."""

LEFT_OUT: dict[str, str] = {
    **dict.fromkeys(
        ("AmusedScheduler", "BlockRefinementScheduler", "DiscreteDDIMScheduler", "EntropyBoundScheduler",
         "VQDiffusionScheduler"),
        "for discrete tokens",
    ),
    **dict.fromkeys(
        ("KarrasVeScheduler", "ScoreSdeVeScheduler", "CosineDPMSolverMultistepScheduler"),
        "for states of exploding variance with preconditioning of its own",
    ),
    **dict.fromkeys(
        ("CMStochasticIterativeScheduler", "SCMScheduler", "FlowMapEulerDiscreteScheduler",
         "HeliosDMDScheduler", "PiflowScheduler"),
        "for distilled networks of a kind of their own",
    ),
    **dict.fromkeys(("DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler"), "run from data to noise"),
    **dict.fromkeys(("DDIMParallelScheduler", "DDPMParallelScheduler"), "give what the plain classes give"),
    **dict.fromkeys(
        ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler", "DDPMWuerstchenScheduler", "HeliosScheduler",
         "LTXEulerAncestralRFScheduler", "MiniMaxH3Scheduler", "RFD4ProteinaScheduler", "RePaintScheduler",
         "UnCLIPScheduler"),
        "for one model or task, whose noise schedule or inputs they ask for",
    ),
    "DPMSolverSDEScheduler": "needs the package torchsde",
    "IPNDMScheduler": "has a noise schedule and labels of its own, those of v-diffusion",
}  # fmt: skip
"""Schedulers of diffusers that are not in the comparison, and why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LibraryScheduler:
    """A scheduler of diffusers with its options, for one network."""

    name: str
    """Class without the word Scheduler, and the variant."""
    family: str
    """Class."""
    config: Mapping[str, Any]
    """Configuration of the network's own scheduler."""
    options: dict[str, Any] = field(default_factory=dict)
    """What differs from the defaults."""

    def make(self) -> SchedulerMixin:
        """The scheduler, before ``set_timesteps``."""
        import diffusers

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*algorithm_type", FutureWarning)
            return like(self.config, getattr(diffusers, self.family), **self.options)

    def steps(self, nfe: int) -> int:
        """The ``num_inference_steps`` with which the network is asked exactly ``nfe`` times.

        Raises:
            ValueError: If there is none; the message says why.
        """
        return steps_for(self.make(), nfe)


def library_schedulers(config: Mapping[str, Any]) -> dict[str, LibraryScheduler]:
    """All schedulers of diffusers for a network, with their variants, by name.

    Args:
        config: ``pipeline.scheduler.config``.

    Raises:
        ValueError: If it is for networks of another kind; see :func:`network_of`.
    """
    noise, prediction = network_of(config)
    table = FLOWS if prediction == "flow" else EDMS if isinstance(noise, EDM) else BETAS
    found = {entry.name: entry for entry in _entries(table, config)}
    if isinstance(noise, VPDiscrete) and noise.rescale_zero_snr:
        return {name: entry for name, entry in found.items() if _takes_zero_snr(entry.family)}
    return found


def _takes_zero_snr(family: str) -> bool:
    import diffusers

    known = inspect.signature(getattr(diffusers, family).__init__).parameters
    return "rescale_betas_zero_snr" in known


def _entries(
    table: Sequence[tuple[str, Sequence[Axis]]], config: Mapping[str, Any]
) -> Iterator[LibraryScheduler]:
    for family, axes in table:
        for choice in product(*(axis.items() for axis in axes)):
            words = [family.removesuffix("Scheduler"), *(word for word, _ in choice if word)]
            options = {key: value for _, given in choice for key, value in given.items()}
            yield LibraryScheduler(name=" ".join(words), family=family, config=config, options=options)


def run_library(
    name: str | LibraryScheduler,
    source: Any,
    x_T: Tensor,
    labels: Tensor | None = None,
    *,
    nfe: int,
    guidance_scale: float = 1.0,
    seed: int = 0,
    batch: int = 256,
) -> Tensor:
    """Draw with a scheduler of diffusers, step by step as pipelines do.

    Args:
        name: Name in :func:`library_schedulers`, or an entry of it (which a bare network needs).
        source: ``DDPMPipeline``, our ``ClassImagePipeline``, or a :data:`Network`.
        x_T: Noise of unit variance, shape (B, C, ...).
        labels: Classes, shape (B,).
        nfe: Evaluations of the network.
        guidance_scale: Of classifier-free guidance, where the pipeline has it.
        seed: Seed of the noise that stochastic schedulers add.
        batch: Samples at once.

    Returns:
        End states, shape (B, C, ...), not clipped.

    Raises:
        ValueError: For an unknown name, or a scheduler that cannot do with ``nfe`` evaluations.
        ArithmeticError: If a result is not finite.
    """
    network: Network = source
    if hasattr(source, "unet"):
        network = _network(source, guidance_scale)
    if isinstance(name, str):
        known = library_schedulers(source.scheduler.config)
        if name not in known:
            raise ValueError(f"scheduler {name!r} is unknown, allowed: {', '.join(known)}")
        name = known[name]
    steps = name.steps(nfe)
    noise = torch.Generator().manual_seed(seed)
    ends = []
    for start in range(0, len(x_T), batch):
        part = slice(start, start + batch)
        some = None if labels is None else labels[part]
        ends.append(sample_with(name.make(), network, x_T[part], some, steps, noise))
    end = torch.cat(ends)
    if not torch.isfinite(end).all():
        raise ArithmeticError(f"{name.name} with {nfe} evaluations gives values that are not finite")
    return end


def _network(pipeline: Any, guidance_scale: float) -> Network:
    if hasattr(pipeline, "denoise"):
        return lambda x, t, labels: pipeline.denoise(x, t, labels, guidance_scale)
    return lambda x, t, labels: pipeline.unet(x, t).sample[:, : x.shape[1]]


@torch.no_grad()
def sample_with(
    scheduler: SchedulerMixin,
    network: Network,
    x_T: Tensor,
    labels: Tensor | None,
    steps: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """End states (B, C, ...) of a scheduler with ``num_inference_steps``."""
    scheduler.set_timesteps(steps, device=x_T.device)
    x = x_T * getattr(scheduler, "init_noise_sigma", 1.0)
    stochastic = "generator" in inspect.signature(scheduler.step).parameters
    options = {"generator": generator} if stochastic else {}
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(network(scaled, t, labels), t, x, **options).prev_sample
    return x


def like(config: Mapping[str, Any], kind: type, **options: Any) -> SchedulerMixin:
    """A scheduler of another class for the same network.

    Args:
        config: Configuration of the network's scheduler.
        kind: Class of diffusers.
        options: Of that class.

    Raises:
        ValueError: If the class is not for networks of that kind.
    """
    noise, prediction = network_of(config)
    known = inspect.signature(kind.__init__).parameters
    if "noise_schedule" in config:  # of our scheduler, which has no options for others
        config = scheduler_for(noise, prediction).config
    values = dict(config)
    if prediction == "flow":
        if "use_flow_sigmas" in known:
            values |= {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
        elif "FlowMatch" not in kind.__name__:
            raise ValueError(f"{kind.__name__} is not for networks that predict flow")
        shift = noise.shift if isinstance(noise, Flow) else 1.0
        values |= {"flow_shift": shift, "shift": shift}
    elif isinstance(noise, EDM):
        if kind.__name__ not in EDM_SCHEDULERS:
            known_names = ", ".join(EDM_SCHEDULERS)
            raise ValueError(f"{kind.__name__} is not for networks of EDM; allowed: {known_names}")
        values |= {
            "sigma_min": noise.t_end,
            "sigma_max": noise.t_start,
            "sigma_data": noise.sigma_data,
            "prediction_type": "epsilon" if prediction == "edm" else "v_prediction",
        }
    elif "beta_start" not in known:
        raise ValueError(f"{kind.__name__} is for flow matching; this network predicts {prediction}")
    elif isinstance(noise, VPDiscrete):
        if noise.rescale_zero_snr and "rescale_betas_zero_snr" not in known:
            raise ValueError(f"{kind.__name__} has no rescale_betas_zero_snr, which this network needs")
        values |= {
            "rescale_betas_zero_snr": noise.rescale_zero_snr,
            "beta_start": noise.beta_start,
            "beta_end": noise.beta_end,
            "beta_schedule": noise.beta_schedule,
            "trained_betas": None if noise.betas is None else list(noise.betas),
            "num_train_timesteps": noise.n,
            "prediction_type": PREDICTION_TYPES[prediction],
        }
    return kind.from_config(values, **options)  # type: ignore[attr-defined]


def steps_for(scheduler: SchedulerMixin, nfe: int) -> int:
    """The ``num_inference_steps`` with which a scheduler asks the network exactly ``nfe`` times.

    Raises:
        ValueError: If there is none; the message says which numbers are near.
    """
    if hasattr(scheduler, "schedules"):
        scheduler.set_timesteps(nfe)
        return nfe
    trial = copy.deepcopy(scheduler)
    options: dict[str, Any] = {"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") else {}
    near, reason = [], "none"
    for steps in range(nfe, 0, -1):
        try:
            trial.set_timesteps(steps, **options)
        except (ValueError, IndexError, RuntimeError) as error:
            reason = f"with {steps} steps: {error}"
            continue
        near.append(len(trial.timesteps))
        if near[-1] == nfe:
            return steps
        if near[-1] < nfe:
            break
    found = ", ".join(map(str, sorted(set(near[-2:])))) if near else reason
    raise ValueError(f"{type(scheduler).__name__} cannot ask the network {nfe} times; near it: {found}")
