"""How good a schedule is: its distance to a teacher on fixed starts, robustly averaged.

The median over samples of the L2 distance ranks schedules as distribution distances do; the mean square is
ruled by the few samples that end in another mode, and must not be used for ranking.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from thalweg.diffusion.s3.fit import Path, fit, is_wanted
from thalweg.diffusion.solvers.linear import LinearSchedule
from thalweg.diffusion.solvers.sample import Denoiser, sample
from thalweg.diffusion.solvers.schedule import SolverSchedule

Schedule = SolverSchedule | LinearSchedule
HOPELESS = 1e12
"""Distance that stands for what is not finite."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """Result of an evaluation; lower is better."""

    value: float
    """Median distance to the teacher."""
    noise: float
    """Standard error of the median, from quartiles."""
    count: int
    """Samples it rests on."""
    weights: tuple[tuple[float, ...], ...] | None = None
    """Weights of the steps that were fitted on the way; None for those of the schedule."""

    def __post_init__(self) -> None:
        """Make tuples of what JSON gives as lists."""
        if self.weights is not None:
            object.__setattr__(self, "weights", tuple(map(tuple, self.weights)))


class TeacherError:
    """Distance to the end states of a teacher from the same starts.

    All candidates see the same starts (common random numbers), so that differences mean the schedule.

    Args:
        denoiser: Data prediction at a state and its node; called without gradients. One that depends on the
            sample (a class, a prompt) has a method ``on(rows)`` that gives the denoiser of a part.
        x_T: Starts, shape (B, ...).
        target: Teacher's end states, shape (B, ...).
        batch: Samples at once.
        path: Way of the teacher, for schedules whose weights are to be fitted.
    """

    def __init__(
        self, denoiser: Denoiser, x_T: Tensor, target: Tensor, batch: int = 1024, path: Path | None = None
    ) -> None:
        if x_T.shape != target.shape:
            raise ValueError(f"starts {tuple(x_T.shape)} and targets {tuple(target.shape)} differ in shape")
        self.denoiser = denoiser
        self.x_T = x_T
        self.target = target
        self.batch = batch
        self.path = path
        self.evaluations = 0

    def __len__(self) -> int:
        """Number of starts."""
        return len(self.x_T)

    def errors(self, schedule: Schedule, count: int | None = None) -> Tensor:
        """Distances of the first ``count`` samples, shape (count,)."""
        count = len(self) if count is None else min(count, len(self))
        found = []
        with torch.no_grad():
            for start in range(0, count, self.batch):
                part = slice(start, min(start + self.batch, count))
                on = getattr(self.denoiser, "on", None)
                denoiser = self.denoiser if on is None else on(part)
                end = sample(schedule, denoiser, self.x_T[part])[-1]
                found.append((end - self.target[part]).flatten(1).norm(dim=1))
        self.evaluations += count * schedule.nfe
        return torch.cat(found)

    def __call__(self, schedule: Schedule, count: int | None = None) -> Score:
        """Score on the first ``count`` samples."""
        if self.path is None or not is_wanted(schedule):
            return summarise(self.errors(schedule, count))
        count = len(self) if count is None else min(count, len(self))
        path = self.path.first(count)
        found, end = fit(schedule, self.denoiser, self.x_T[:count], path, batch=self.batch)
        self.evaluations += count * schedule.nfe
        score = summarise((end - self.target[:count]).flatten(1).norm(dim=1))
        return replace(score, weights=found.weights)


def summarise(errors: Tensor) -> Score:
    """Median and its standard error; what is not finite counts as hopelessly bad."""
    # Not infinity, which interpolation would turn into NaN.
    errors = torch.nan_to_num(errors.double(), nan=HOPELESS, posinf=HOPELESS).clamp_max(HOPELESS)
    low, middle, high = torch.quantile(errors, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    # A normal's interquartile range is 1.349 deviations; its median is off by 1.253 deviations / sqrt(n).
    spread = (high - low) / 1.349 * 1.253 / len(errors) ** 0.5
    return Score(value=middle, noise=spread, count=len(errors))
