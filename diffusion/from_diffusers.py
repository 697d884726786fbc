"""What a scheduler of diffusers says about its network: noise schedule and kind of prediction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from thalweg.diffusion.parameterization import Kind
from thalweg.diffusion.schedules import EDM, Flow, NoiseSchedule, VPDiscrete, flow_mu

KINDS: dict[str, Kind] = {
    "epsilon": "noise",
    "sample": "data",
    "v_prediction": "v",
    "flow_prediction": "flow",
    "edm": "edm",
}
"""Prediction types of diffusers, and that of EDM networks, which diffusers calls epsilon there."""
EDM_SCHEDULERS = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
_EDM_KINDS: dict[str, Kind] = {"epsilon": "edm", "v_prediction": "v"}


def network_of(config: Mapping[str, Any], tokens: int | None = None) -> tuple[NoiseSchedule, Kind]:
    """Noise schedule and prediction of the network that a scheduler's configuration is for.

    Networks with the preconditioning of EDM come as variance preserving ones of what they are given, see
    :class:`thalweg.diffusion.schedules.EDM`; so do those of Euler's scheduler with continuous times, whose
    sigma_data is 1 (Stable Video Diffusion, CosXL).

    Args:
        config: ``scheduler.config``.
        tokens: Tokens of a picture, for flows with dynamic shifting; their largest number by default. A shift
            moves grids only: alpha, sigma and label of a noise level do not depend on it.

    Raises:
        ValueError: For a scheduler that says neither betas, nor EDM, nor a flow, or one whose network is to
            predict the noise of pure noise.
    """
    name = str(config.get("_class_name") or "without a name")
    kind = config.get("prediction_type", "epsilon")
    if config.get("noise_schedule") and kind in KINDS:  # SearchedScheduler
        return NoiseSchedule.from_dict(config["noise_schedule"]), KINDS[kind]
    flow = "FlowMatch" in name or ("shift" in config and "beta_start" not in config)
    if flow or config.get("use_flow_sigmas") or kind == "flow_prediction":
        return Flow(shift=_shift(config, tokens)), "flow"
    if _is_edm(config) and kind in _EDM_KINDS:
        return _edm(config, float(config["sigma_data"])), _EDM_KINDS[kind]
    if "beta_start" not in config or kind not in KINDS:
        known = ", ".join(name for name in KINDS if name != "edm")
        raise ValueError(
            f"scheduler {name} with prediction_type {kind!r} is not understood; allowed: "
            f"betas with {known}, {' and '.join(EDM_SCHEDULERS)}, or flow matching"
        )
    table = _betas(config, name, KINDS[kind])
    if config.get("timestep_type") == "continuous":
        ends = {key: config.get(key) for key in ("sigma_max", "sigma_min")}
        times = {"sigma_max": table.t_start, "sigma_min": table.t_end}
        levels = {key: float(given or np.exp(-table.lam(times[key]))) for key, given in ends.items()}
        return _edm(levels, 1.0), KINDS[kind]
    return table, KINDS[kind]


def _shift(config: Mapping[str, Any], tokens: int | None) -> float:
    """Shift of a flow; of one with dynamic shifting that of the size of the picture."""
    if not config.get("use_dynamic_shifting"):
        return float(config.get("shift", config.get("flow_shift")) or 1.0)
    base, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    mu = flow_mu(
        most if tokens is None else tokens,
        base_shift=config.get("base_shift", 0.5),
        max_shift=config.get("max_shift", 1.15),
        base_tokens=base,
        max_tokens=most,
    )
    return mu if config.get("time_shift_type", "exponential") == "linear" else float(np.exp(mu))


def _is_edm(config: Mapping[str, Any]) -> bool:
    """By name, or by what only these two have where a scheduler was not loaded and has no name."""
    if name := config.get("_class_name"):
        return name in EDM_SCHEDULERS
    cosine = "solver_order" in config and "algorithm_type" not in config  # its labels are others
    return {"sigma_data", "sigma_max", "sigma_min"} <= set(config) and not cosine


def _edm(config: Mapping[str, Any], sigma_data: float) -> EDM:
    return EDM(t_start=float(config["sigma_max"]), t_end=float(config["sigma_min"]), sigma_data=sigma_data)


def _betas(config: Mapping[str, Any], name: str, kind: Kind) -> VPDiscrete:
    zero_snr = bool(config.get("rescale_betas_zero_snr"))
    if zero_snr and kind == "noise":
        raise ValueError(
            f"scheduler {name} has rescale_betas_zero_snr with prediction_type epsilon, but at pure noise "
            "that says nothing about the data; allowed: v_prediction, sample"
        )
    betas = config.get("trained_betas")
    return VPDiscrete(
        beta_start=config["beta_start"],
        beta_end=config["beta_end"],
        beta_schedule=config["beta_schedule"],
        n=config["num_train_timesteps"],
        betas=None if betas is None else tuple(float(beta) for beta in betas),
        rescale_zero_snr=zero_snr,
    )
