"""Weights of a sampler by least squares: one run of the network, and no derivative of it.

A teacher's path tells the state x* of every start at every noise level. At step i of a run the sampler has
its own state x_i and the data predictions x0_0 .. x0_i that it has met, and takes the weights V of

    x_{i+1} = r_i x_i + total_i (x0_i + sum_{j<i} V_ij (x0_j - x0_{j+1})),
    r_i = sigma_{i+1} / sigma_i,  total_i = alpha_{i+1} - alpha_i r_i,

that bring it closest to x*_{i+1}. It goes on from there, so that later steps mend what earlier ones left.
The weights of all starts are the same; V = 0 is DDIM, and for any V the sampler is exact for constant data.
Solvers of high order take V from a Taylor expansion, which holds for small steps; this is for large ones.

Shapes: B starts, ... anything, k = i weights of a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from thalweg.diffusion.solvers.dp import step
from thalweg.diffusion.solvers.linear import Compilable, LinearSchedule, totals
from thalweg.diffusion.solvers.sample import Denoiser, sample
from thalweg.diffusion.solvers.schedule import Node

WANTED = {"weights": "fit"}
"""What a schedule's ``info`` says if an objective is to fit its weights, and not to take those it has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FitConfig:
    """How weights are fitted.

    Raises:
        ValueError: For a number out of range.
    """

    ridge: float = 1e-6
    """Pull towards V = 0, in parts of the mean square of the predictions' differences."""
    reweights: int = 3
    """Times that starts are weighted anew by one over their distance, so that few far ones do not rule."""
    largest: float = 20.0
    """Largest magnitude of V; the ridge is raised tenfold until it is kept."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not (self.ridge > 0 and self.largest > 0 and self.reweights >= 0):
            raise ValueError(
                f"ridge {self.ridge}, largest {self.largest} and reweights {self.reweights}: allowed are "
                "numbers above 0, and 0 reweights and more"
            )


@dataclass(kw_only=True, slots=True)
class Path:
    """States and data predictions of a teacher, by falling noise."""

    nodes: list[Node] = field(default_factory=list)
    """Where the network was evaluated."""
    states: list[Tensor] = field(default_factory=list)
    """States there, each (B, ...)."""
    data: list[Tensor] = field(default_factory=list)
    """Data predictions there, each (B, ...)."""
    end: Tensor | None = None
    """States at sigma = 0, (B, ...); the last data predictions if left out."""

    def see(self, node: Node, state: Tensor, data: Tensor) -> None:
        """Note one evaluation."""
        self.nodes.append(node)
        self.states.append(state)
        self.data.append(data)

    def first(self, count: int) -> Path:
        """That of the first so many starts."""
        states, data = ([x[:count] for x in part] for part in (self.states, self.data))
        return Path(
            nodes=self.nodes, states=states, data=data, end=None if self.end is None else self.end[:count]
        )

    def at(self, node: Node) -> Tensor:
        """States (B, ...) at any node: steps of DDIM from the two recorded ones beside it, averaged.

        Each errs by a quarter of a bend of the prediction, in opposite directions.
        """
        if node.sigma == 0:
            return self.data[-1] if self.end is None else self.end
        levels = [known.lam for known in self.nodes]
        right = int(np.searchsorted(levels, node.lam))
        if right in (0, len(levels)):
            return self._from(min(right, len(levels) - 1), node)
        left = right - 1
        gap = levels[right] - levels[left]
        part = (node.lam - levels[left]) / gap if math.isfinite(gap) else 1.0
        return torch.lerp(self._from(left, node), self._from(right, node), part)

    def _from(self, i: int, node: Node) -> Tensor:
        return step(self.states[i], self.data[i], self.nodes[i], node)


class WeightFit:
    """A run that finds its weights on the way.

    Args:
        nodes: Nodes of the sampler.
        path: What it is to follow, of the same starts.
        config: How.
    """

    def __init__(self, nodes: Sequence[Node], path: Path, config: FitConfig | None = None) -> None:
        self.nodes, self.path, self.config = tuple(nodes), path, config or FitConfig()
        self.totals = totals(self.nodes).tolist()
        self.rows: list[tuple[float, ...]] = []
        self._data: list[Tensor] = []

    def step(self, state: Tensor, data: Tensor) -> Tensor:
        """The next state, from the data prediction at this one; both (B, ...).

        Where there are more states than the path has, the first ones are looked at, and all are moved.
        """
        i = len(self.rows)
        self._data.append(data)
        ratio = self.nodes[i + 1].sigma / self.nodes[i].sigma
        row = np.eye(i + 1)[i]
        if i and self.totals[i]:
            target = self.path.at(self.nodes[i + 1])
            rows = slice(0, len(target))
            wanted = (target - ratio * state[rows]) / self.totals[i] - data[rows]
            v = _solve(self._differences(rows), wanted, self.config)
            row[:-1] += v
            row[1:] -= v
        self.rows.append(tuple((self.totals[i] * row).tolist()))
        state = ratio * state
        for weight, known in zip(self.rows[i], self._data, strict=True):
            state = torch.add(state, known, alpha=weight)
        return state

    def _differences(self, rows: slice) -> Tensor:
        """x0_j - x0_{j+1}, (B, F, k)."""
        pairs = zip(self._data[:-1], self._data[1:], strict=True)
        return torch.stack([(a - b)[rows].flatten(1).double() for a, b in pairs], -1)

    def schedule(self) -> LinearSchedule:
        """Nodes and weights; the run has to be over."""
        return LinearSchedule(nodes=self.nodes, weights=tuple(self.rows), info={"weights": "least squares"})


def _solve(differences_BFk: Tensor, wanted: Tensor, config: FitConfig) -> np.ndarray:
    """V (k,) of the least sum over starts of || wanted - differences V ||; zeros if there is none."""
    wanted_BF1 = wanted.flatten(1).double()[..., None]
    turned = differences_BFk.mT
    gram = (turned @ differences_BFk).cpu().numpy()
    cross = (turned @ wanted_BF1)[..., 0].cpu().numpy()
    size = wanted_BF1.square().sum((1, 2)).cpu().numpy()
    zero = np.zeros(gram.shape[-1])
    if not (np.isfinite(gram).all() and np.isfinite(cross).all()):
        return zero
    ridge = config.ridge
    while ridge < 1e6:
        found = _reweighted(gram, cross, size, ridge, config.reweights)
        if found is not None and np.abs(found).max() <= config.largest:
            return found
        ridge *= 10
    return zero


def _reweighted(
    gram_Bkk: np.ndarray, cross_Bk: np.ndarray, size_B: np.ndarray, ridge: float, times: int
) -> np.ndarray | None:
    """Iteratively reweighted least squares for the sum of distances; None if a system is singular."""
    weight_B = np.ones(len(size_B))
    for turn in range(times + 1):
        a = np.einsum("bkl,b->kl", gram_Bkk, weight_B)
        scale = float(np.trace(a)) / len(a)
        if not scale > 0:
            return None
        try:
            v = np.linalg.solve(a + ridge * scale * np.eye(len(a)), weight_B @ cross_Bk)
        except np.linalg.LinAlgError:
            return None
        if turn < times:
            square = size_B - 2 * cross_Bk @ v + np.einsum("bkl,k,l->b", gram_Bkk, v, v)
            distance = np.sqrt(np.maximum(square, 0))
            weight_B = 1 / np.maximum(distance + 0.1 * np.median(distance), 1e-300)
            weight_B = weight_B / weight_B.mean()
    return v


def is_wanted(schedule: Compilable) -> bool:
    """Whether an objective is to fit the weights of a schedule."""
    return schedule.info.get("weights") == WANTED["weights"]


def record(schedule: Compilable, denoiser: Denoiser, x_T: Tensor, batch: int = 1024) -> Path:
    """The path of a teacher.

    Args:
        schedule: The teacher; many steps.
        denoiser: Data prediction at a state and its node; see :class:`TeacherError`.
        x_T: Starts, (B, ...).
        batch: Starts at once.
    """
    path = Path()

    def see(state: Tensor, node: Node) -> Tensor:
        path.see(node, state, predict(denoiser, state, node, batch))
        return path.data[-1]

    end = sample(schedule, see, x_T)[-1]
    path.end = end if schedule.nodes[-1].sigma == 0 else None
    return path


def fit(
    schedule: Compilable,
    denoiser: Denoiser,
    x_T: Tensor,
    path: Path,
    config: FitConfig | None = None,
    batch: int = 1024,
) -> tuple[LinearSchedule, Tensor]:
    """The nodes of a schedule with weights that follow a path.

    Args:
        schedule: Tells the nodes.
        denoiser: Data prediction at a state and its node; called without gradients.
        x_T: Starts of the path, (B, ...).
        path: What is to be followed.
        config: How.
        batch: Starts at once.

    Returns:
        The schedule, and its end states (B, ...).

    Raises:
        ValueError: If the first step of the schedule is none of the network.
    """
    if schedule.first != "network":
        raise ValueError(f"first is {schedule.first!r}; weights are fitted for network evaluations only")
    run, state = WeightFit(schedule.nodes, path, config), x_T
    for node in schedule.nodes[:-1]:
        state = run.step(state, predict(denoiser, state, node, batch))
    return run.schedule(), state


def predict(denoiser: Denoiser, x: Tensor, node: Node, batch: int) -> Tensor:
    """Data predictions (B, ...) of all starts, so many at once."""
    on: Callable[[slice], Denoiser] | None = getattr(denoiser, "on", None)
    found = []
    with torch.no_grad():
        for start in range(0, len(x), batch):
            part = slice(start, min(start + batch, len(x)))
            found.append((denoiser if on is None else on(part))(x[part], node))
    return torch.cat(found)
