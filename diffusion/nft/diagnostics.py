"""What is logged of an epoch: where rewards, weights and networks stand.

Shapes: N images of an epoch.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from thalweg.diffusion.nft.advantage import reward_statistics

BINS = 10
"""Of the histogram of r."""


class Clock:
    """Seconds of the parts of an epoch."""

    def __init__(self) -> None:
        self.start, self.laps = time.perf_counter(), dict[str, float]()
        self.cpu = time.process_time()

    def lap(self, name: str) -> None:
        """End a part."""
        now = time.perf_counter()
        self.laps[name], self.start = now - self.start, now

    def seconds(self) -> dict[str, float]:
        """Of each part, and of all processor cores together."""
        laps = {f"seconds_{name}": value for name, value in self.laps.items()}
        return laps | {"seconds_cpu": time.process_time() - self.cpu}


class Means:
    """Means of metrics of many micro-batches, without waiting for a GPU; of names with _max the largest."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Take in a micro-batch."""
        self.count += 1
        for name, value in metrics.items():
            value = value.detach().float()
            if name not in self.sums:
                self.sums[name] = value.clone()
            elif name.endswith("_max"):
                self.sums[name] = torch.maximum(self.sums[name], value)
            else:
                self.sums[name] += value

    def result(self, total: Callable[[Tensor], Tensor]) -> dict[str, float | Tensor]:
        """The means; total sums over processes (of largest values it makes their mean)."""
        if not self.sums:
            return {}
        names = list(self.sums)
        parts = [self.sums[name] / (1 if name.endswith("_max") else self.count) for name in names]
        table = torch.cat([torch.stack(parts).double().cpu(), torch.ones(1, dtype=torch.float64)])
        table = total(table)
        return dict(zip(names, (table[:-1] / table[-1]).float(), strict=True))


def of_rewards(
    rewards: Tensor, groups: Sequence[int], parts: Mapping[str, Tensor]
) -> dict[str, float | Tensor]:
    """Mean and spread of rewards, and the mean of each part.

    The deviation within groups of each part says which reward of a sum decides advantages.
    """
    found = reward_statistics(rewards, groups)
    metrics: dict[str, float | Tensor] = {
        "reward": float(rewards.mean()),
        "reward_std": found.population_std,
        "reward_std_within": found.reward_std_mean,
        "zero_std_ratio": found.zero_std_ratio,
        "groups": float(found.groups),
        **{f"reward_top_{top}": value for top, value in found.mean_of_top.items()},
    }
    for name, part in parts.items():
        metrics[f"reward/{name}"] = mean_of_known(part)
        if "/" not in name:
            metrics[f"std_within/{name}"] = reward_statistics(part, groups).reward_std_mean
    return metrics


def mean_of_known(values: Tensor) -> float:
    """Mean of what is not NaN; NaN of nothing."""
    known = values[~values.isnan()]
    return float(known.mean()) if len(known) else float("nan")


def of_weights(r_N: Tensor | None) -> dict[str, float | Tensor]:
    """Histogram of the probabilities r, as shares of images from r = 0 to 1."""
    if r_N is None:
        return {}
    shares = np.histogram(r_N.cpu().numpy(), bins=BINS, range=(0.0, 1.0))[0] / len(r_N)
    return {"r_mean": float(r_N.mean())} | {
        f"r_hist/{low / BINS:.1f}": float(share) for low, share in enumerate(shares)
    }


def warn_if_constant(rewards: Tensor) -> None:
    """Say so where rewards teach nothing."""
    if bool((rewards == rewards[0]).all()):
        warnings.warn(
            f"all {len(rewards)} rewards of this epoch are {float(rewards[0]):.4g}: advantages are 0, and"
            " nothing is learnt; check rewards and prompts",
            stacklevel=2,
        )
