"""Singlestep methods as solver schedules: blocks of up to three stages from the same start.

The inner nodes of a block are given ones, as in diffusers: the grid is cut into blocks of consecutive nodes.
The papers put them at equal distances in lambda; on a grid uniform in lambda both are the same. Order 3 is
reached only where the second inner node lies at two thirds of its block, in lambda (in t for velocities).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from thalweg.diffusion.solvers.adams import PLAIN, choose, last_step
from thalweg.diffusion.solvers.schedule import Derivative, Node, Prediction, Scale, SolverSchedule, Step

SolverType = Literal["midpoint", "heun", "dpmsolver"]
SOLVER_TYPES: tuple[str, ...] = get_args(SolverType)


def block_sizes(steps: int, order: int, lower_order_final: bool) -> list[int]:
    """Sizes of the blocks: as many whole ones as fit, then what is left.

    With lower_order_final a whole block at the end is cut into one of order - 1 and one of 1.
    """
    whole, rest = divmod(steps, order)
    sizes = [order] * whole + [rest] * (rest > 0)
    return _cut_last(sizes) if lower_order_final and not rest else sizes


def _cut_last(sizes: list[int]) -> list[int]:
    return sizes if sizes[-1] == 1 else [*sizes[:-1], sizes[-1] - 1, 1]


def singlestep(
    nodes: Sequence[Node],
    *,
    prediction: Prediction = "data",
    order: int = 2,
    solver_type: SolverType = "midpoint",
    lower_order_final: bool = True,
) -> SolverSchedule:
    """Blocks of stages of order 1, 2, 3 that all start at the first node of the block.

    A node with an infinite lambda has no place inside a block: a step from alpha = 0 and one to sigma = 0
    stand alone, with order 1.

    Args:
        nodes: Where the network is evaluated, and the result.
        prediction: noise, data, or velocity (rectified flow).
        order: Stages per block, 1 to 3.
        solver_type: midpoint and dpmsolver use the newest stage alone, and scale the second one; dpmsolver
            does so in blocks of two only, as the paper, midpoint in blocks of three too, as diffusers. heun
            uses all stages and scales none.
        lower_order_final: End on a block of size 1.

    Raises:
        ValueError: For an option that is not there.
    """
    choose("order", order, (1, 2, 3))
    choose("solver_type", solver_type, SOLVER_TYPES)
    choose("prediction", prediction, ("noise", "data", "velocity"))
    steps = len(nodes) - 1
    if steps < 1:
        raise ValueError(f"a schedule needs two nodes or more, found {len(nodes)}")
    alone = int(nodes[0].alpha == 0 and prediction != "velocity" and steps > 1)
    sizes = [1] * alone + block_sizes(steps - alone, order, lower_order_final)
    if last_step(nodes, steps - 1, prediction):
        sizes = _cut_last(sizes)
    made, start = list[Step](), 0
    for size in sizes:
        scaled = prediction != "velocity" and (
            solver_type == "midpoint" or (solver_type, size) == ("dpmsolver", 2)
        )
        made += [_stage(start, j, prediction, scaled, solver_type == "heun") for j in range(size)]
        start += size
    made[-1] = last_step(nodes, steps - 1, prediction) or made[-1]
    return SolverSchedule(nodes=tuple(nodes), steps=tuple(made))


def _stage(start: int, j: int, prediction: Prediction, scaled: bool, all_stages: bool) -> Step:
    """Stage j of the block that starts at a node; it reaches node start + j + 1."""
    derivatives: tuple[Derivative, ...] = ()
    if j == 1:
        scale = Scale(kind="bh2") if scaled else PLAIN
        derivatives = (Derivative(k=1, nodes=(start + 1,), scale=scale),)
    if j == 2:
        used = (start + 2, start + 1) if all_stages else (start + 2,)
        derivatives = tuple(Derivative(k=k, nodes=used) for k in range(1, len(used) + 1))
    return Step(start=start, prediction=prediction, order=len(derivatives) + 1, derivatives=derivatives)


def dpm_singlestep(
    nodes: Sequence[Node],
    *,
    order: int = 2,
    solver_type: SolverType = "midpoint",
    lower_order_final: bool = True,
) -> SolverSchedule:
    """Singlestep DPM-Solver on noise prediction (Lu et al. 2022, arXiv 2206.00927).

    Arguments as in singlestep.

    Raises:
        ValueError: For an option that is not there.
    """
    return singlestep(
        nodes,
        prediction="noise",
        order=order,
        solver_type=solver_type,
        lower_order_final=lower_order_final,
    )


def dpmpp_singlestep(
    nodes: Sequence[Node],
    *,
    order: int = 2,
    solver_type: SolverType = "midpoint",
    lower_order_final: bool = True,
) -> SolverSchedule:
    """Singlestep DPM-Solver++ on data prediction (Lu et al. 2022, arXiv 2211.01095).

    Arguments as in singlestep.

    Raises:
        ValueError: For an option that is not there.
    """
    return singlestep(
        nodes,
        prediction="data",
        order=order,
        solver_type=solver_type,
        lower_order_final=lower_order_final,
    )


def flow_singlestep(
    nodes: Sequence[Node],
    *,
    order: int = 2,
    solver_type: SolverType = "midpoint",
    lower_order_final: bool = False,
) -> SolverSchedule:
    """Runge-Kutta in t on the velocity of a rectified flow: order 2 is the midpoint rule on equal distances.

    Raises:
        ValueError: For an option that is not there.
    """
    return singlestep(
        nodes,
        prediction="velocity",
        order=order,
        solver_type=solver_type,
        lower_order_final=lower_order_final,
    )
