"""What predicts the quality of a solver schedule without running it: fitted in seconds on a CPU.

A search evaluates some schedules truly, fits an ensemble to their scores, and lets it rank thousands more.
Only pairs whose scores differ by more than their noise are learned from. Lower scores are better.

Shapes: E members, B schedules, N steps, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from torch import Tensor

from thalweg.checkpoints import tensors as files
from thalweg.core_optim.build import build
from thalweg.core_optim.config import OptimConfig, ScheduleConfig
from thalweg.diffusion.s3.ranker import Ranker, ranking_loss, usable_pairs
from thalweg.diffusion.s3.tokens import feature_names, token_batch
from thalweg.diffusion.solvers.schedule import SolverSchedule

Array = NDArray[np.float64]
Data = dict[str, Tensor]
CHUNK = 2048
"""Schedules predicted at once."""


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How an ensemble is made.

    Raises:
        ValueError: For a number out of range.
    """

    members: int = 5
    """Networks with seeds and bootstrap samples of their own."""
    hidden: int = 32
    """Width of the LSTM."""
    layers: int = 2
    """Layers of the LSTM."""
    steps: int = 200
    """Optimizer steps."""
    batch: int = 256
    """Schedules per step, all pairs of which are compared."""
    lr: float = 1e-2
    """Peak learning rate of AdamW, which falls to 0 by half a cosine."""
    weight_decay: float = 0.1
    """Decoupled weight decay."""
    threshold: float = 1.0
    """Standard deviations of the noise of a difference below which two schedules are a tie."""
    value_weight: float = 0.5
    """Weight of the squared error beside the ranking loss; it gives predictions the unit of the scores."""
    log: bool = True
    """Learn the logarithm of the scores, which must then be positive."""
    decisions: bool = False
    """Show the decisions of every step beside its coefficients."""
    seed: int = 0
    """Seed of weights, bootstrap and batches."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("members", "hidden", "layers", "steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, allowed: 1 or more")
        for name in ("threshold", "value_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, allowed: 0 or more")


class Ensemble:
    """A fitted predictor.

    Args:
        ranker: The network.
        center: Mean of the training targets.
        spread: Standard deviation of the training targets.
        config: How it was made.
    """

    def __init__(self, ranker: Ranker, center: float, spread: float, config: FitConfig) -> None:
        self.ranker = ranker.eval()
        self.center = center
        self.spread = spread
        self.config = config

    def predict(self, schedules: Sequence[SolverSchedule]) -> tuple[Array, Array]:
        """Predicted scores (B,), or their logarithms after a fit with ``log``, and deviations (B,).

        The deviation is that of the members: how little the evaluated schedules say about this one.
        """
        return self.predict_tokens(*token_batch(schedules, decisions=self.config.decisions))

    def predict_tokens(self, features: ArrayLike, mask: ArrayLike) -> tuple[Array, Array]:
        """The same from features (B, N, F) and mask (B, N) of ``token_batch``."""
        x, there = torch.as_tensor(features, dtype=torch.float32), torch.as_tensor(mask, dtype=torch.bool)
        with torch.inference_mode():
            parts = [self.ranker(*part) for part in zip(x.split(CHUNK), there.split(CHUNK), strict=True)]
        members_EB = self.center + self.spread * torch.cat(parts, 1).double()
        return members_EB.mean(0).numpy(), members_EB.std(0, correction=0).numpy()

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whose header holds the settings as JSON."""
        values = {"center": self.center, "spread": self.spread, "config": asdict(self.config)}
        files.save(
            self.ranker.state_dict(), path, {**values, "features": feature_names(self.config.decisions)}
        )

    @classmethod
    def load(cls, path: str | Path) -> Ensemble:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: If the file is none, or was made for other features.
        """
        values, state = files.read_metadata(path), files.load(path)
        if missing := {"center", "spread", "config", "features"} - set(values):
            raise ValueError(f"{path} is no predictor: its header lacks {', '.join(sorted(missing))}")
        config = FitConfig(**values["config"])
        names = feature_names(config.decisions)
        if values["features"] != list(names):
            raise ValueError(f"{path} was made for the features {values['features']}, now: {list(names)}")
        ranker = make_ranker(config)
        ranker.load_state_dict(state)
        return cls(ranker, values["center"], values["spread"], config)


def make_ranker(config: FitConfig) -> Ranker:
    """A network with weights that depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return Ranker(len(feature_names(config.decisions)), config.members, config.hidden, config.layers)


def fit(
    schedules: Sequence[SolverSchedule],
    scores: ArrayLike,
    noise: ArrayLike = 0.0,
    config: FitConfig | None = None,
) -> Ensemble:
    """Fit an ensemble to evaluated schedules.

    Args:
        schedules: What was evaluated.
        scores: Their qualities (B,), lower is better; infinite where the evaluation failed.
        noise: Standard deviation of every score, or of all, in their unit.
        config: Settings.

    Raises:
        ValueError: For scores that do not fit, or if no two differ by more than noise.
    """
    config = config or FitConfig()
    features, mask = token_batch(schedules, decisions=config.decisions)
    return fit_tokens(features, mask, scores, noise, config)


def fit_tokens(
    features: ArrayLike, mask: ArrayLike, scores: ArrayLike, noise: ArrayLike, config: FitConfig
) -> Ensemble:
    """The same from features (B, N, F) and mask (B, N)."""
    data, center, spread = training_data(features, mask, scores, noise, config)
    ranker = make_ranker(config)
    ranker.standardise_by(data["tokens"], data["mask"])
    optim = OptimConfig(
        lr=config.lr, weight_decay=config.weight_decay, schedule=ScheduleConfig(name="cosine")
    )
    made = build(ranker, optim, config.steps)
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    stream = torch.Generator().manual_seed(config.seed + 1)
    count = len(data["scores"])
    for _ in range(config.steps):
        chosen = torch.randperm(count, generator=stream)[: config.batch]
        loss = loss_of(ranker, {name: values[chosen] for name, values in data.items()}, config)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return Ensemble(ranker, center, spread, config)


def loss_of(ranker: Ranker, batch: Data, config: FitConfig) -> Tensor:
    """Loss of a batch of :func:`training_data`, summed over the members."""
    predicted_EB = ranker(batch["tokens"], batch["mask"])
    return ranking_loss(
        predicted_EB,
        batch["scores"],
        batch["noise"],
        batch["weights"].T,
        threshold=config.threshold,
        value_weight=config.value_weight,
    )


def training_data(
    features: ArrayLike, mask: ArrayLike, scores: ArrayLike, noise: ArrayLike, config: FitConfig
) -> tuple[Data, float, float]:
    """Tensors to train on, one row per schedule, and mean and spread of the targets.

    Returns:
        tokens (B, N, F), mask (B, N), standardised scores and noise (B,), and weights (B, E): how often the
        bootstrap sample of each member drew a schedule.

    Raises:
        ValueError: For scores that do not fit, or if no two differ by more than noise.
    """
    found, sd = targets(scores, noise, log=config.log)
    tokens = torch.as_tensor(features, dtype=torch.float32)
    if len(found) != len(tokens):
        raise ValueError(f"found {len(found)} scores for {len(tokens)} schedules")
    finite = found[np.isfinite(found)]
    center, spread = (float(finite.mean()), float(finite.std())) if finite.size else (0.0, 1.0)
    spread = spread or 1.0
    scaled, deviation = torch.from_numpy((found - center) / spread), torch.from_numpy(sd / spread)
    if not usable_pairs(scaled, deviation, config.threshold).any():
        raise ValueError(
            f"no two of {len(found)} scores differ by more than {config.threshold:g} x their noise"
        )
    stream = torch.Generator().manual_seed(config.seed)
    drawn = torch.randint(len(found), (config.members, len(found)), generator=stream)
    weights = torch.stack([row.bincount(minlength=len(found)) for row in drawn], 1)
    data = {
        "tokens": tokens,
        "mask": torch.as_tensor(mask, dtype=torch.bool),
        "scores": scaled.float(),
        "noise": deviation.float(),
        "weights": weights.float(),
    }
    return data, center, spread


def targets(scores: ArrayLike, noise: ArrayLike = 0.0, *, log: bool = True) -> tuple[Array, Array]:
    """What is learned, and its standard deviation: scores or, to first order in the noise, their logarithm.

    Raises:
        ValueError: For scores that are not one row of numbers, not positive for ``log``, or negative noise.
    """
    values = np.array(scores, np.float64)
    if values.ndim != 1 or np.isnan(values).any() or np.isneginf(values).any():
        raise ValueError(f"scores must be one row of numbers without nan and -inf, got {scores!r}")
    sd = np.broadcast_to(np.asarray(noise, np.float64), values.shape).copy()
    if not (np.isfinite(sd) & (sd >= 0))[np.isfinite(values)].all():
        raise ValueError(f"noise must be finite and 0 or more, got {noise!r}")
    sd[~np.isfinite(values)] = 0.0
    if not log:
        return values, sd
    if not (values > 0).all():
        raise ValueError(f"scores must be positive for their logarithm, found {values.min()}; set log=False")
    return np.log(values), sd / values


def kendall_tau(predicted: ArrayLike, true: ArrayLike) -> float:
    """Rank correlation tau-b: 1 for the same order, 0 for none, -1 for the reverse."""
    return float(stats.kendalltau(predicted, true).statistic)
