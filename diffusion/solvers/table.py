"""States as rows of coefficients, for methods that are not multistep exponential integrators.

Shapes: M evaluations, so M + 1 nodes. A row holds 1 + M numbers: factor of x_T, factors of x0_0 .. x0_{M-1}.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from thalweg.diffusion.solvers.compile import Compiled, Row
from thalweg.diffusion.solvers.linear import LinearSchedule
from thalweg.diffusion.solvers.schedule import Node


def linear(nodes: Sequence[Node], compiled: Compiled) -> LinearSchedule:
    """Coefficients as the weights of steps."""
    weights = compiled.steps()[1].tolist()
    return LinearSchedule(
        nodes=tuple(nodes), weights=tuple(tuple(row[: i + 1]) for i, row in enumerate(weights))
    )


class Table:
    """Rows of states as they are made; later rows are combinations of earlier ones and their predictions.

    Args:
        evaluations: Number M of evaluations.
        start: Node of x_T.
    """

    def __init__(self, evaluations: int, start: Node) -> None:
        self.rows = np.zeros((evaluations + 1, evaluations + 1))
        self.rows[0, 0] = 1
        self.nodes = [start]

    def add(self, node: Node, row: Row) -> int:
        """Append the state at a node; returns its number."""
        self.rows[len(self.nodes)] = row
        self.nodes.append(node)
        return len(self.nodes) - 1

    def data(self, j: int) -> Row:
        """Data prediction at state j."""
        unit = np.zeros(self.rows.shape[1])
        unit[1 + j] = 1
        return unit

    def noise(self, j: int) -> Row:
        """Noise prediction at state j, (x - alpha x0) / sigma."""
        return (self.rows[j] - self.nodes[j].alpha * self.data(j)) / self.nodes[j].sigma

    def velocity(self, j: int) -> Row:
        """Velocity of a rectified flow at state j, noise less data."""
        return self.noise(j) - self.data(j)

    def transfer(self, j: int, node: Node, weights: Mapping[int, float]) -> Row:
        """State j moved to a node with a mixed noise e = sum_k w_k e_k: d(x / alpha) = e d rho, DDIM's step.

        It is made of DDIM's step on the data and the differences e_k - e_j, so that little is lost where
        alpha is small, and nothing is infinite at alpha = 0 as long as e is e_j.

        Args:
            j: State to move.
            node: Where to.
            weights: Weights of the noises by their states; they sum to one.
        """
        start = self.nodes[j]
        ratio = node.sigma / start.sigma
        row = ratio * self.rows[j] + (node.alpha - start.alpha * ratio) * self.data(j)
        if others := {k: w for k, w in weights.items() if k != j}:
            assert start.alpha > 0
            noises = [self.noise(k) - self.noise(j) for k in others]
            span = node.sigma - node.alpha / start.alpha * start.sigma
            row = row + span * mix(noises, list(others.values()))
        return row

    def done(self) -> LinearSchedule:
        """The sampler; every row must have been made."""
        assert len(self.nodes) == len(self.rows)
        a, c = self.rows[:, 0], self.rows[:, 1:]
        return linear(self.nodes, Compiled(A=a, C=c, A_pred=a, C_pred=c))


def mix(rows: Sequence[Row], weights: Sequence[float]) -> Row:
    """Sum of rows with weights."""
    return sum((w * row for w, row in zip(weights, rows, strict=True)), np.zeros_like(rows[0]))
