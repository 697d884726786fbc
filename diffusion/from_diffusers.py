"""What a scheduler of diffusers says about its network: noise schedule and kind of prediction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from thalweg.diffusion.parameterization import Kind
from thalweg.diffusion.schedules import Flow, NoiseSchedule, VPDiscrete

KINDS: dict[str, Kind] = {
    "epsilon": "noise",
    "sample": "data",
    "v_prediction": "v",
    "flow_prediction": "flow",
}
"""Prediction types of diffusers."""


def network_of(config: Mapping[str, Any]) -> tuple[NoiseSchedule, Kind]:
    """Noise schedule and prediction of the network that a scheduler's configuration is for.

    Args:
        config: ``scheduler.config``.

    Raises:
        ValueError: For a scheduler that says neither betas nor a flow, or that rescales its betas.
    """
    name = config.get("_class_name", "")
    if config.get("noise_schedule") and config.get("prediction_type") in KINDS:  # SearchedScheduler
        return NoiseSchedule.from_dict(config["noise_schedule"]), KINDS[config["prediction_type"]]
    flow = "FlowMatch" in str(name) or ("shift" in config and "beta_start" not in config)
    if flow or config.get("use_flow_sigmas") or config.get("prediction_type") in _FLOWS:
        shift = config.get("shift", config.get("flow_shift", 1.0))
        return Flow(shift=float(shift or 1.0)), "flow"
    kind = config.get("prediction_type", "epsilon")
    if "beta_start" not in config or kind not in KINDS:
        raise ValueError(
            f"scheduler {name or 'without a name'} with prediction_type {kind!r} is not understood; allowed: "
            f"betas with {', '.join(KINDS)}, or flow matching"
        )
    if config.get("rescale_betas_zero_snr"):
        raise ValueError(
            f"scheduler {name or 'without a name'} has rescale_betas_zero_snr, a noise schedule "
            "without signal at its start, which is not supported yet"
        )
    betas = config.get("trained_betas")
    return VPDiscrete(
        beta_start=config["beta_start"],
        beta_end=config["beta_end"],
        beta_schedule=config["beta_schedule"],
        n=config["num_train_timesteps"],
        betas=None if betas is None else tuple(float(beta) for beta in betas),
    ), KINDS[kind]


_FLOWS = ("flow_prediction",)
