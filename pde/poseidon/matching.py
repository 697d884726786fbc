"""Does a network fit the data? Checked before the first batch, with errors that say what to change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from thalweg.pde.problem import ProblemSpec

CONFIG_PATH = "model.init_args.network.init_args.config"
"""Where the network's fields lie in a configuration file."""


def check_network(config: Any, problems: Sequence[ProblemSpec]) -> None:
    """Compare the configuration of a network (scOT or a baseline) with every data set it is to see.

    Raises:
        ValueError: For other channel counts, loss groups or conditioning; names both sides and the option.
    """
    for problem in problems:
        _check_channels(config, problem)
        edges, wanted = config.channel_slice_list_normalized_loss, problem.channel_slices
        if edges is not None and list(edges) != wanted:
            raise ValueError(
                f"the network's loss groups its channels at {list(edges)} but data set {problem.name!r} at"
                f" {wanted} {_describe(problem.groups)}: set {CONFIG_PATH}.channel_slice_list_normalized_loss"
                f" to {wanted}"
            )
        if config.use_conditioning != problem.conditioned:
            given = "has no lead time" if config.use_conditioning else "needs the lead time"
            hint = f"use the data set's '.time' variant or set {CONFIG_PATH}.use_conditioning to false"
            fix = hint if config.use_conditioning else f"set {CONFIG_PATH}.use_conditioning to true"
            raise ValueError(f"data set {problem.name!r} {given}, unlike the network: {fix}")


def _check_channels(config: Any, problem: ProblemSpec) -> None:
    """Channel counts on both sides of the network."""
    sides = (("num_channels", "input", problem.inputs), ("num_out_channels", "output", problem.outputs))
    parts, fixes = [], []
    for field, side, channels in sides:
        if getattr(config, field) != len(channels):
            names = ", ".join(channel.name for channel in channels)
            parts.append(
                f"data set {problem.name!r} has {len(channels)} {side} channels ({names}) but the network"
                f" {getattr(config, field)}"
            )
            fixes.append(f"{CONFIG_PATH}.{field} to {len(channels)}")
    if parts:
        raise ValueError(
            f"{'; '.join(parts)}: set {' and '.join(fixes)}; to start from pretrained weights with other"
            " channels, set model.init_args.replace_embedding_recovery to true as well"
        )


def _describe(groups: Sequence[Sequence[str]]) -> str:
    """Groups as the data sets write them: ``[rho],[u,v],[p]``."""
    return ",".join(f"[{','.join(group)}]" for group in groups)
