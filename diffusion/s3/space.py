"""The search space: random candidates, mutation, crossover, and what keeps them valid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from thalweg.diffusion.s3.fit import WANTED
from thalweg.diffusion.s3.genes import Genes, StepGenes, decode, weight_of
from thalweg.diffusion.schedules import Flow, NoiseSchedule
from thalweg.diffusion.solvers.linear import LinearSchedule
from thalweg.diffusion.solvers.schedule import SolverSchedule

ATTEMPTS = 100
# Where lambda is infinite at t = 1, as on a flow, gaps are measured from here.
_NEARLY_ONE = 0.999


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchSpace:
    """Schedules with a number of evaluations under a noise schedule.

    Raises:
        ValueError: For a space without schedules.
    """

    noise: NoiseSchedule
    """Noise schedule of the model."""
    nfe: int
    """Evaluations of the network."""
    predictions: tuple[str, ...] = ("noise", "data")
    """Predictions to choose from; ``velocity`` on rectified flow only."""
    max_order: int = 3
    """Highest Taylor order."""
    t_end: tuple[float, float] = (1e-3, 5e-2)
    """Range of the last time."""
    end: Literal["zero", "free"] = "zero"
    """zero: all times are evaluated, and a last step goes to sigma = 0; free: the last time is the end."""
    max_c: float = 0.8
    """Bound of the scaling's constant."""
    min_gap: float = 0.05
    """Smallest gap of lambda between nodes; estimates explode between coinciding ones."""
    max_weight: float = 10.0
    """Largest coefficient of a data prediction; more would amplify errors."""
    free_weights: float = 0.0
    """Width of the mutation of the steps' weights, in parts of a step at ``width`` 1; 0 for none but those of
    known solvers. Few evaluations gain from it: no decision gives the weights that are best for them."""
    only_times: bool = False
    """Search times alone: steps are those of DDIM, but for objectives that can fit weights, which do."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        low, high = self.t_end
        if self.nfe < 1 or self.max_order < 1:
            raise ValueError(f"nfe {self.nfe} and max_order {self.max_order} must be 1 or more")
        if not 0 < low <= high < self.noise.t_start:
            raise ValueError(f"t_end is {self.t_end}, allowed: 0 < low <= high < {self.noise.t_start}")
        unknown = set(self.predictions) - {"noise", "data", "velocity"}
        if unknown or not self.predictions:
            raise ValueError(f"predictions are {self.predictions}, allowed: noise, data, velocity")
        if "velocity" in self.predictions and not isinstance(self.noise, Flow):
            raise ValueError(f"velocity needs a rectified flow, the noise schedule is {self.noise.kind}")
        if not self.free_weights >= 0:
            raise ValueError(f"free_weights is {self.free_weights}, allowed: 0 or more")
        if self.min_gap * self.num_times > self._lam(low) - self._lam(self.noise.t_start):
            raise ValueError(
                f"{self.num_times} nodes at gaps of {self.min_gap} do not fit the range of lambda"
            )

    @property
    def num_times(self) -> int:
        """Times of a candidate."""
        return self.nfe + (self.end == "free")

    def _lam(self, t: float | NDArray[np.float64]) -> Any:
        start = self.noise.t_start
        if not np.isfinite(self.noise.lam(start)):
            start = min(start, _NEARLY_ONE)
        return self.noise.lam(np.minimum(t, start))

    def schedule(self, genes: Genes) -> SolverSchedule | LinearSchedule:
        """The schedule of a candidate."""
        schedule = decode(genes, self.noise)
        return replace(schedule, info=WANTED) if self.only_times else schedule

    def is_valid(self, genes: Genes) -> bool:
        """Whether a candidate compiles to finite and moderate coefficients."""
        try:
            return weight_of(self.schedule(genes)) <= self.max_weight
        except (ValueError, np.linalg.LinAlgError):
            return False

    def repair(self, times: Sequence[float]) -> tuple[float, ...]:
        """Sort, keep the gaps and the range; the first time is always the start."""
        lam = np.sort(self._lam(np.asarray(times, np.float64)))
        low, high = (float(self._lam(t)) for t in self.t_end)
        count = len(lam)
        lam[0] = self._lam(self.noise.t_start)
        lam[-1] = np.clip(lam[-1], high, low)
        for i in range(1, count):
            lam[i] = max(lam[i], lam[i - 1] + self.min_gap)
        lam = np.minimum(lam, low - self.min_gap * np.arange(count)[::-1])
        rest = np.asarray(self.noise.t_of_lam(lam[1:])).tolist()
        return (float(self.noise.t_start), *rest)

    def random(self, rng: Generator) -> Genes:
        """A candidate from nowhere.

        Raises:
            ValueError: If none is found.
        """
        for _ in range(ATTEMPTS):
            last = float(np.exp(rng.uniform(*np.log(self.t_end))))
            times = self.repair(self.grid(str(rng.choice(GRIDS)), last))
            steps = tuple(self.random_step(rng) for _ in range(self.nfe))
            genes = self.mutate_times(Genes(times=times, steps=steps), rng, 0.3)
            if self.is_valid(genes):
                return genes
        raise ValueError(f"no valid schedule in {ATTEMPTS} attempts; raise max_weight or lower min_gap")

    def random_step(self, rng: Generator) -> StepGenes:
        """Random decisions; second order is the most frequent, as in published searches."""
        if self.only_times:
            return StepGenes()
        weights = np.array([0.2, 0.4, 0.3, 0.1][: self.max_order])
        order = 1 + int(rng.choice(len(weights), p=weights / weights.sum()))
        return StepGenes(
            prediction=rng.choice(self.predictions).item(),
            order=order,
            near=int(rng.integers(0, 3)),
            c=float(np.clip(rng.normal(0, 0.2), -self.max_c, self.max_c)) if rng.random() < 0.5 else 0.0,
            corrector=bool(rng.random() < 0.5),
        )

    def grid(self, name: str, last: float) -> NDArray[np.float64]:
        """Times of a plain grid, from the start to ``last``."""
        q = np.linspace(0, 1, self.num_times)
        start = self.noise.t_start
        if name == "uniform_t":
            return start + q * (last - start)
        if name == "quadratic_t":
            return (np.sqrt(start) + q * (np.sqrt(last) - np.sqrt(start))) ** 2
        lam = np.array([self._lam(start), self._lam(last)])
        if name == "uniform_lambda":
            return np.asarray(self.noise.t_of_lam(lam[0] + q * (lam[1] - lam[0])))
        rho = np.exp(-lam / 7)
        return np.asarray(self.noise.t_of_lam(-7 * np.log(rho[0] + q * (rho[1] - rho[0]))))

    def seeds(self) -> list[Genes]:
        """Known multistep solvers on plain grids: orders, predictions, scalings, correctors or none."""
        ends = np.geomspace(*self.t_end, 4) if self.t_end[0] < self.t_end[1] else self.t_end[:1]
        times = {self.repair(self.grid(name, float(end))): None for name in GRIDS for end in ends}
        found = [self._plain(t, step) for step in self._known() for t in times]
        return [genes for genes in found if self.is_valid(genes)]

    def seeds_on(self, times: Sequence[float]) -> list[Genes]:
        """The same solvers on given times, which are brought into the range of the space.

        Raises:
            ValueError: If there are more or fewer times than a candidate has.
        """
        if len(times) != self.num_times:
            raise ValueError(f"found {len(times)} times, needed: {self.num_times}")
        mended = self.repair(times)
        found = [self._plain(mended, step) for step in self._known()]
        return [genes for genes in found if self.is_valid(genes)]

    def _plain(self, times: tuple[float, ...], step: StepGenes) -> Genes:
        return Genes(times=times, steps=(step,) * self.nfe)

    def _known(self) -> list[StepGenes]:
        """Steps of known solvers."""
        if self.only_times:
            return [StepGenes()]
        found = []
        for prediction in self.predictions:
            for order in range(1, self.max_order + 1):
                for c in (0.0, 1 / 6, -1 / 3) if order == 2 else (0.0,):
                    sign = -c if prediction == "data" else c
                    options = {"prediction": prediction, "order": order, "c": sign}
                    found += [StepGenes(**options, corrector=flag) for flag in (False, True)]
        return found

    def mutate_times(self, genes: Genes, rng: Generator, width: float, rate: float = 1.0) -> Genes:
        """Move times in lambda by a part of the gaps beside them."""
        lam = np.asarray(self._lam(np.asarray(genes.times)))
        gaps = np.diff(lam)
        for i in range(1, len(lam)):
            if rng.random() < rate:
                gap = min(gaps[i - 1], gaps[i]) if i < len(gaps) else gaps[i - 1]
                lam[i] += rng.normal(0, width) * gap
        return replace(genes, times=self.repair(np.asarray(self.noise.t_of_lam(lam))))

    def mutate_step(self, step: StepGenes, rng: Generator, width: float, rate: float) -> StepGenes:
        """Redraw decisions, each with probability ``rate``, and jitter the scaling."""
        if self.only_times:
            return step
        fresh = self.random_step(rng)
        names = [name for name in ("prediction", "order", "near", "corrector") if rng.random() < rate]
        step = replace(step, **{name: getattr(fresh, name) for name in names})
        if rng.random() < rate:
            moved = np.clip(step.c + rng.normal(0, 0.3 * width), -self.max_c, self.max_c)
            step = replace(step, c=0.0 if rng.random() < 0.1 else float(moved))
        return step

    def mutate_weights(self, genes: Genes, rng: Generator, width: float) -> Genes:
        """Move a few of the weights of the steps, if they are free."""
        if not self.free_weights or self.only_times:
            return genes
        rows = genes.shifts or tuple((0.0,) * i for i in range(self.nfe))
        rate = min(0.5, rng.choice(MOVED) / max(sum(map(len, rows)), 1))
        scale = self.free_weights * width
        shifts = tuple(tuple(v + scale * rng.normal() * (rng.random() < rate) for v in row) for row in rows)
        return replace(genes, shifts=shifts)

    def mutate(self, genes: Genes, rng: Generator, width: float = 0.3, rate: float = 0.2) -> Genes:
        """A valid neighbour, near or far; the candidate itself if none is found.

        Args:
            genes: The candidate.
            rng: Source of all draws.
            width: Largest width of what is moved; it is drawn from a tenth of this on.
            rate: Largest probability of a decision to be drawn anew; none is in a third of the cases.
        """
        width *= float(np.exp(rng.uniform(np.log(0.1), 0)))
        rate *= float(rng.choice(RATES))
        for _ in range(ATTEMPTS):
            child = self.mutate_times(genes, rng, width, rate=0.5)
            steps = tuple(self.mutate_step(step, rng, width, rate) for step in child.steps)
            child = self.mutate_weights(replace(child, steps=steps), rng, width)
            if child != genes and self.is_valid(child):
                return child
        return genes

    def crossover(self, a: Genes, b: Genes, rng: Generator) -> Genes:
        """Times of one parent or between both, decisions step by step from either; ``a`` if none is valid."""
        for _ in range(ATTEMPTS):
            weight = rng.choice([0.0, 1.0, rng.random()])
            lam = [np.asarray(self._lam(np.asarray(genes.times))) for genes in (a, b)]
            times = self.repair(np.asarray(self.noise.t_of_lam(weight * lam[0] + (1 - weight) * lam[1])))
            picks = rng.random(self.nfe) < 0.5
            steps = tuple(x if pick else y for x, y, pick in zip(a.steps, b.steps, picks, strict=True))
            child = Genes(times=times, steps=steps, shifts=_mixed(a, b, picks))
            if self.is_valid(child):
                return child
        return a


def _mixed(a: Genes, b: Genes, picks: NDArray[np.bool_]) -> tuple[tuple[float, ...], ...]:
    """Shifts of the steps picked from ``a``, and of the others from ``b``."""
    if not (a.shifts or b.shifts):
        return ()
    none = tuple((0.0,) * i for i in range(len(picks)))
    rows = zip(a.shifts or none, b.shifts or none, picks, strict=True)
    return tuple(x if pick else y for x, y, pick in rows)


RATES = (0.0, 0.25, 1.0)
"""Parts of the rate at which a mutation draws decisions."""
MOVED = (1.5, 3.0, 6.0)
"""Weights that a mutation moves, on average."""
GRIDS = ("uniform_t", "quadratic_t", "uniform_lambda", "karras")
