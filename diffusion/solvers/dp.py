"""Grids found by dynamic programming on the nodes of one fine teacher trajectory.

A student of n steps uses n + 1 of the teacher's nodes. Between nodes i < j it makes one Euler step in
sigma / alpha (DDIM), which with the data prediction x0 at node i is

    x_j = (sigma_j / sigma_i) x_i + (alpha_j - alpha_i sigma_j / sigma_i) x0.

GITS (Chen et al. 2024, arXiv 2405.11326) starts each of these steps from the teacher's state. The cost of a
step is its mean distance to the teacher's state at node j, and the path is the one of least

    c_{0 a} + gamma (c_{a b} + gamma (c_{b c} + ...)),

where gamma > 1 stands for the growth of errors. It needs M evaluations of the network per sample.

OSS (Pei et al. 2025, arXiv 2503.21774) starts each step from the state that the student itself has reached.
For k = 1 .. n it keeps, for every node, the state nearest to the teacher's among those that k steps lead to.
Each sample has its own path; the grid takes the median of their nodes, step by step.

Shapes: B samples, ... anything; M teacher steps, so M + 1 nodes; n student steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from thalweg.diffusion.schedules import NoiseSchedule
from thalweg.diffusion.solvers.grids import End, nodes
from thalweg.diffusion.solvers.named import named
from thalweg.diffusion.solvers.sample import Denoiser, sample
from thalweg.diffusion.solvers.schedule import Node

Array = NDArray[np.float64]
Vote = Literal["median", "mean"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """A grid and what it took to find it."""

    nodes: list[Node]
    """n + 1 nodes by falling noise."""
    path: tuple[int, ...]
    """Their places among the teacher's nodes."""
    evaluations: int
    """Of the network, per sample."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Teacher:
    """A fine trajectory."""

    nodes: list[Node]
    """M + 1 nodes by falling noise."""
    states: list[Tensor]
    """States at the nodes, shape (B, ...)."""
    data: list[Tensor]
    """Data predictions at all nodes but the last, shape (B, ...)."""


def gits(noise: NoiseSchedule, denoiser: Denoiser, x_T: Tensor, n: int, **options: Any) -> list[Node]:
    """Nodes of GITS for n evaluations; options as :func:`search_gits`."""
    return search_gits(noise, denoiser, x_T, n, **options).nodes


def oss(noise: NoiseSchedule, denoiser: Denoiser, x_T: Tensor, n: int, **options: Any) -> list[Node]:
    """Nodes of OSS for n evaluations; options as :func:`search_oss`."""
    return search_oss(noise, denoiser, x_T, n, **options).nodes


def search_gits(
    noise: NoiseSchedule,
    denoiser: Denoiser,
    x_T: Tensor,
    n: int,
    *,
    teacher_steps: int = 60,
    gamma: float = 1.15,
    grid: str = "uniform_lambda",
    t_end: float | None = None,
    end: End = "append",
) -> Found:
    """The grid of GITS, and its cost: ``teacher_steps`` evaluations per sample.

    Distances are divided by sqrt(alpha_j^2 + sigma_j^2), so that they do not depend on the scaling of states.

    Args:
        noise: Noise schedule of the model.
        denoiser: Data prediction at a state and its node.
        x_T: Starts, shape (B, ...); a few dozen are enough.
        n: Evaluations of the student.
        teacher_steps: Evaluations of the teacher, M.
        gamma: Weight of what is left to do against the step at hand.
        grid: Of the teacher, see :mod:`thalweg.diffusion.solvers.grids`.
        t_end: Smallest time of the teacher, the noise schedule's by default.
        end: As in :func:`thalweg.diffusion.solvers.grids.nodes`.

    Raises:
        ValueError: If n exceeds the teacher's steps, gamma is not positive, or for an unknown grid.
    """
    if not gamma > 0:
        raise ValueError(f"gamma is {gamma}, allowed: above 0")
    _check(n, teacher_steps)
    teacher = trajectory(nodes(noise, teacher_steps, grid, t_end=t_end, end=end), denoiser, x_T)
    path = cheapest_path(step_costs(teacher), n, gamma)
    return Found(nodes=[teacher.nodes[i] for i in path], path=path, evaluations=teacher_steps)


def search_oss(
    noise: NoiseSchedule,
    denoiser: Denoiser,
    x_T: Tensor,
    n: int,
    *,
    teacher_steps: int = 60,
    vote: Vote = "median",
    grid: str = "uniform_lambda",
    t_end: float | None = None,
    end: End = "append",
) -> Found:
    """The grid of OSS, and its cost: M + (n - 1) (M - n + 1) evaluations per sample.

    The authors' code lets a sample use fewer than k steps where that is nearer; here all paths have n steps.

    Args:
        noise: Noise schedule of the model.
        denoiser: Data prediction at a state and its node.
        x_T: Starts, shape (B, ...); a few are enough.
        n: Evaluations of the student.
        teacher_steps: Evaluations of the teacher, M.
        vote: ``median`` of the paths of all samples, or one path by the ``mean`` of their distances.
        grid: Of the teacher, see :mod:`thalweg.diffusion.solvers.grids`.
        t_end: Smallest time of the teacher, the noise schedule's by default.
        end: As in :func:`thalweg.diffusion.solvers.grids.nodes`.

    Raises:
        ValueError: If n exceeds the teacher's steps, or for an unknown vote or grid.
    """
    if vote not in get_args(Vote):
        raise ValueError(f"vote is {vote!r}, allowed: {', '.join(get_args(Vote))}")
    _check(n, teacher_steps)
    teacher = trajectory(nodes(noise, teacher_steps, grid, t_end=t_end, end=end), denoiser, x_T)
    paths_Bn, evaluations = student_paths(teacher, denoiser, n, together=vote == "mean")
    # Of an even number the lower middle: a node of the teacher, and still rising from step to step.
    path = tuple(torch.median(paths_Bn, dim=0).values.tolist())
    return Found(nodes=[teacher.nodes[i] for i in path], path=path, evaluations=teacher_steps + evaluations)


def times(found: Sequence[Node]) -> tuple[float, ...]:
    """Times of the nodes that have noise, for :meth:`SearchSpace.repair`, which fits them to its range.

    A grid that ends at sigma = 0 suits a space with end "zero", and one made with end "keep" suits "free".

    Raises:
        ValueError: For a node without a time.
    """
    if missing := [i for i, node in enumerate(found) if node.t is None]:
        raise ValueError(f"nodes {missing} have no time")
    return tuple(node.t for node in found if node.t is not None and node.sigma > 0)


def trajectory(fine: list[Node], denoiser: Denoiser, x_T: Tensor) -> Teacher:
    """States of UniPC-3 and the network's predictions there; one evaluation per step."""
    data: list[Tensor] = []

    def record(x: Tensor, node: Node) -> Tensor:
        data.append(denoiser(x, node))
        return data[-1]

    with torch.no_grad():
        states = sample(named("unipc", fine, order=3), record, x_T)
    return Teacher(nodes=fine, states=states, data=data)


def step(x: Tensor, data: Tensor, start: Node, end: Node) -> Tensor:
    """One step of DDIM."""
    ratio = end.sigma / start.sigma
    return ratio * x + (end.alpha - start.alpha * ratio) * data


def step_costs(teacher: Teacher) -> Array:
    """Mean distance of one step i -> j to the teacher, shape (M + 1, M + 1); infinite unless i < j."""
    count = len(teacher.nodes)
    costs = np.full((count, count), np.inf)
    for i, start in enumerate(teacher.nodes[:-1]):
        for j in range(i + 1, count):
            end = teacher.nodes[j]
            off = step(teacher.states[i], teacher.data[i], start, end) - teacher.states[j]
            costs[i, j] = off.flatten(1).norm(dim=1).mean().item() / np.hypot(end.alpha, end.sigma)
    return costs


def cheapest_path(costs: Array, n: int, gamma: float = 1.0) -> tuple[int, ...]:
    """Path of n steps from the first node to the last with the least c_0 + gamma (c_1 + gamma (c_2 + ...)).

    Args:
        costs: Of the steps, shape (M + 1, M + 1); infinite where there is none.
        n: Number of steps.
        gamma: Weight of what is left.
    """
    left, choices = costs[:, -1], list[NDArray[np.int64]]()
    for _ in range(n - 1):
        total = costs + gamma * left
        choices.append(total.argmin(1))
        left = total.min(1)
    path = [0]
    for choice in reversed(choices):
        path.append(int(choice[path[-1]]))
    return (*path, len(costs) - 1)


def student_paths(teacher: Teacher, denoiser: Denoiser, n: int, together: bool = False) -> tuple[Tensor, int]:
    """Paths of the students that keep nearest to the teacher, and evaluations of the network per sample.

    Args:
        teacher: Trajectory.
        denoiser: Data prediction.
        n: Number of steps.
        together: One path for all samples, by their mean distance.

    Returns:
        Places of the nodes, shape (B, n + 1), and the number of evaluations beside the teacher's.
    """
    last = len(teacher.nodes) - 1
    states, data = {0: teacher.states[0]}, {0: teacher.data[0]}
    sources: list[dict[int, Tensor]] = []
    evaluations = 0
    with torch.no_grad():
        for k in range(1, n + 1):
            ends = range(k, last - n + k + 1) if k < n else range(last, last + 1)
            reached, source = {}, {}
            for j in ends:
                reached[j], source[j] = _nearest(teacher, states, data, j, together)
            states = reached
            sources.append(source)
            if k < n:
                data = {i: denoiser(x, teacher.nodes[i]) for i, x in states.items()}
                evaluations += len(states)
    path = [torch.full((len(teacher.states[0]),), last)]
    for source in reversed(sources):
        table = torch.stack([source.get(j, torch.zeros_like(path[0])) for j in range(last + 1)])
        path.append(table.gather(0, path[-1][None])[0])
    return torch.stack(path[::-1], dim=1), evaluations


def _nearest(
    teacher: Teacher, states: dict[int, Tensor], data: dict[int, Tensor], j: int, together: bool
) -> tuple[Tensor, Tensor]:
    """The state at node j nearest to the teacher's of those one step away, and its source, per sample."""
    sources = [i for i in states if i < j]
    found = torch.stack([step(states[i], data[i], teacher.nodes[i], teacher.nodes[j]) for i in sources])
    distance = (found - teacher.states[j]).flatten(2).norm(dim=2)  # sources, B
    if together:
        distance = distance.mean(1, keepdim=True).expand_as(distance)
    best = distance.argmin(0)
    picked = found[best, torch.arange(len(best), device=best.device)]
    return picked, torch.tensor(sources)[best.cpu()]


def _check(n: int, teacher_steps: int) -> None:
    if not 1 <= n <= teacher_steps:
        raise ValueError(f"evaluations are {n}, allowed: 1 to {teacher_steps}, the steps of the teacher")
