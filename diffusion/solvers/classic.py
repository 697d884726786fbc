"""Methods that are not multistep exponential integrators, as weights: Heun, LMS, PNDM and their kin.

They extrapolate the noise e in other variables than lambda, or evaluate a node twice. With y = x / alpha and
rho = sigma / alpha the ODE is dy/d rho = e; on a rectified flow it is dx/dt = u as well.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.polynomial.legendre import leggauss

from thalweg.diffusion.solvers.adams import choose
from thalweg.diffusion.solvers.linear import LinearSchedule
from thalweg.diffusion.solvers.schedule import Node
from thalweg.diffusion.solvers.table import Table, mix
from thalweg.diffusion.solvers.validate import check_nodes

ADAMS = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
"""Adams-Bashforth weights for equal distances, newest first, order 1 to 4."""


def _checked(nodes: Sequence[Node], method: str, *, finite: bool = True) -> tuple[Node, ...]:
    if len(nodes) < 2:
        raise ValueError(f"{method} needs two nodes or more, found {len(nodes)}")
    check_nodes(nodes)
    if finite and nodes[0].alpha == 0:
        raise ValueError(f"{method} works in rho = sigma / alpha, but alpha is 0 at node 0, allowed: above 0")
    return tuple(nodes)


def heun(nodes: Sequence[Node]) -> LinearSchedule:
    """Heun's trapezoid in rho (Karras et al. 2022, arXiv 2206.00364, algorithm 1 without churn).

    N steps take 2 N evaluations, 2 N - 1 where the last node has sigma = 0, which Euler's method reaches.
    Every inner node comes twice: predicted and corrected.

    Raises:
        ValueError: If alpha is 0 at the first node.
    """
    nodes = _checked(nodes, "heun")
    table = Table(_heun_evaluations(nodes), nodes[0])
    for node in nodes[1:]:
        j = len(table.nodes) - 1
        k = table.add(node, table.transfer(j, node, {j: 1}))
        if node.sigma > 0:
            table.add(node, table.transfer(j, node, {j: 0.5, k: 0.5}))
    return table.done()


def flow_heun(nodes: Sequence[Node]) -> LinearSchedule:
    """Heun's trapezoid in t on the velocity of a rectified flow; evaluations as in heun.

    Raises:
        ValueError: If the nodes are not those of a rectified flow.
    """
    nodes = _checked(nodes, "flow_heun", finite=False)
    for i, node in enumerate(nodes):
        if abs(node.alpha + node.sigma - 1) > 1e-9:
            total = node.alpha + node.sigma
            raise ValueError(f"flow_heun needs a rectified flow, alpha + sigma = 1, not {total} at node {i}")
    table = Table(_heun_evaluations(nodes), nodes[0])
    for node in nodes[1:]:
        j = len(table.nodes) - 1
        step = node.sigma - table.nodes[j].sigma
        k = table.add(node, table.rows[j] + step * table.velocity(j))
        if node.sigma > 0:
            table.add(node, table.rows[j] + step * mix([table.velocity(j), table.velocity(k)], [0.5, 0.5]))
    return table.done()


def _heun_evaluations(nodes: Sequence[Node]) -> int:
    return 2 * (len(nodes) - 1) - (nodes[-1].sigma == 0)


def lms(nodes: Sequence[Node], *, order: int = 4) -> LinearSchedule:
    """Linear multistep in rho: the polynomial through the last noises, integrated exactly (order 1 to 4).

    This is also DEIS with polynomials in rho (Zhang & Chen 2023, arXiv 2204.13902, "rho-AB").

    Raises:
        ValueError: For an order that is not there, or if alpha is 0 at the first node.
    """
    choose("order", order, (1, 2, 3, 4))
    nodes = _checked(nodes, "lms")
    rho = np.array([node.sigma / node.alpha for node in nodes])
    table = Table(len(nodes) - 1, nodes[0])
    for i, node in enumerate(nodes[1:]):
        used = range(i, max(i - order, -1), -1)
        weights = lagrange_means(rho[list(used)], rho[i], rho[i + 1])
        table.add(node, table.transfer(i, node, dict(zip(used, weights, strict=True))))
    return table.done()


def lagrange_means(points: np.ndarray, start: float, end: float) -> list[float]:
    """Mean over an interval of each Lagrange polynomial of up to 8 points; they sum to one."""
    abscissae, weights = leggauss(4)
    at = start + (end - start) * (abscissae + 1) / 2
    means = []
    for j, point in enumerate(points):
        others = np.delete(points, j)
        values = np.prod((at[:, None] - others) / (point - others), axis=1)
        means.append(float(weights @ values / 2))
    return means


def ipndm(nodes: Sequence[Node], *, order: int = 4) -> LinearSchedule:
    """Improved PNDM (Zhang & Chen 2023, arXiv 2204.13902): PLMS that starts on lower orders.

    The weights are those of equal distances on any nodes; DDIM's step transfers the mixed noise.

    Raises:
        ValueError: For an order that is not there.
    """
    choose("order", order, (1, 2, 3, 4))
    nodes = _checked(nodes, "ipndm", finite=False)
    table = Table(len(nodes) - 1, nodes[0])
    for i, node in enumerate(nodes[1:]):
        weights = ADAMS[min(i + 1, order) - 1]
        table.add(node, table.transfer(i, node, {i - j: w for j, w in enumerate(weights)}))
    return table.done()


def plms(nodes: Sequence[Node]) -> LinearSchedule:
    """PNDM without its Runge-Kutta start (Liu et al. 2022, arXiv 2202.09778), as Stable Diffusion used it.

    The first step is made twice, the second time with the mean of the noises at its ends, of which the one at
    its end is then forgotten. N steps take N + 1 evaluations, and node 1 comes twice.

    Raises:
        ValueError: If alpha is 0 at the first node.
    """
    nodes = _checked(nodes, "plms")
    table = Table(len(nodes) - 1 + (len(nodes) > 2), nodes[0])
    guess = table.add(nodes[1], table.transfer(0, nodes[1], {0: 1}))
    if len(nodes) == 2:
        return table.done()
    table.add(nodes[1], table.transfer(0, nodes[1], {0: 0.5, guess: 0.5}))
    _multistep(table, nodes[2:], [0])
    return table.done()


def pndm(nodes: Sequence[Node], *, middle: Sequence[Node] = ()) -> LinearSchedule:
    """PNDM with its start by pseudo Runge-Kutta (Liu et al. 2022, arXiv 2202.09778), then PLMS.

    Each of the first three steps takes four evaluations, two of them at a node half way in time; N steps take
    N + 9.

    Args:
        nodes: The grid, and the result.
        middle: The three nodes half way through the first three steps.

    Raises:
        ValueError: If there are not three middle nodes between the first four, or alpha is 0 at node 0.
    """
    nodes = _checked(nodes, "pndm")
    if len(middle) != 3 or len(nodes) < 5:
        found = f"{len(middle)} and {len(nodes)}"
        raise ValueError(f"pndm needs 3 middle nodes (option middle) and 5 nodes or more, found {found}")
    check_nodes([node for pair in zip(nodes[:3], middle, strict=True) for node in pair] + [nodes[3]])
    table, history = Table(len(nodes) - 1 + 9, nodes[0]), list[int]()
    for half, node in zip(middle, nodes[1:4], strict=True):
        history.append(_runge_kutta(table, half, node))
    _multistep(table, nodes[4:], history)
    return table.done()


def _runge_kutta(table: Table, half: Node, node: Node) -> int:
    """The classic four stages with DDIM's transfer; returns the number of the state it starts from."""
    start = len(table.nodes) - 1
    for j, stage in enumerate((half, half, node), start):
        table.add(stage, table.transfer(start, stage, {j: 1}))
    weights = {start: 1 / 6, start + 1: 1 / 3, start + 2: 1 / 3, start + 3: 1 / 6}
    table.add(node, table.transfer(start, node, weights))
    return start


def _multistep(table: Table, nodes: Sequence[Node], history: list[int]) -> None:
    """Steps with the weights of equal distances, over the states in the history and the newest."""
    history = list(history)
    for node in nodes:
        history = [*history[-3:], len(table.nodes) - 1]
        weights = dict(zip(reversed(history), ADAMS[len(history) - 1], strict=True))
        table.add(node, table.transfer(history[-1], node, weights))
