"""Every scheduler of diffusers for a network, at an exact number of evaluations of the network."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from thalweg.diffusion.export import PREDICTION_TYPES
from thalweg.diffusion.from_diffusers import network_of
from thalweg.diffusion.schedules import Flow, VPDiscrete

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


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
    values = {key: value for key, value in config.items() if key != "noise_schedule"}
    if prediction == "flow":
        if "use_flow_sigmas" in known:
            values |= {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
        elif "FlowMatch" not in kind.__name__:
            raise ValueError(f"{kind.__name__} is not for networks that predict flow")
        shift = noise.shift if isinstance(noise, Flow) else 1.0
        values |= {"flow_shift": shift, "shift": shift}
    elif "beta_start" not in known:
        raise ValueError(f"{kind.__name__} is for flow matching; this network predicts {prediction}")
    elif isinstance(noise, VPDiscrete):
        values |= {
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
