"""Solver schedules run step by step, as their definition reads, without compiled coefficients."""

import json
import math
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
from golden import golden_files
from safetensors.torch import load_file
from torch import Tensor

from thalweg.diffusion.solvers.compile import derivative_weights, scale_factor, taylor
from thalweg.diffusion.solvers.linear import LinearSchedule
from thalweg.diffusion.solvers.named import named
from thalweg.diffusion.solvers.sample import Denoiser
from thalweg.diffusion.solvers.schedule import Corrector, Node, SolverSchedule, Step
from thalweg.diffusion.toy import GaussianMixture


@cache
def golden(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Golden values of the solvers, and their arrays."""
    path = golden_files("s3", f"{name}.json")[0]
    return json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))


@cache
def mixture(name: str) -> Denoiser:
    """Exact denoiser of a golden mixture."""
    names, arrays = ("weights", "means", "covariances"), golden("toy")[1]
    exact = GaussianMixture.from_dict({key: arrays[f"mix.{name}.{key}"].numpy() for key in names})
    return lambda x, node: exact.data(x, node.alpha, node.sigma)


def vp_node(lam: float) -> Node:
    return Node(alpha=1 / math.sqrt(1 + math.exp(-2 * lam)), sigma=1 / math.sqrt(1 + math.exp(2 * lam)))


def vp_nodes(count: int, start: float = -4, end: float = 3, *, zero: bool = False) -> list[Node]:
    nodes = [vp_node(lam) for lam in np.linspace(start, end, count + 1).tolist()]
    return [*nodes[:-1], Node(alpha=1, sigma=0)] if zero else nodes


def flow_nodes(count: int, start: float = 1.0, end: float = 0.0) -> list[Node]:
    return [Node(alpha=1 - t, sigma=t) for t in np.linspace(start, end, count + 1).tolist()]


def build(name: str, nodes: list[Node], **options: Any) -> SolverSchedule | LinearSchedule:
    """A solver with what it needs beside its nodes."""
    if name == "pndm":
        pairs = pairwise(nodes[:4])
        options["middle"] = [
            Node(alpha=(a.alpha + b.alpha) / 2, sigma=(a.sigma + b.sigma) / 2) for a, b in pairs
        ]
    return named(name, nodes, **options)


class StepByStep:
    """A schedule whose first nodes have exact states, which are not corrected."""

    def __init__(self, schedule: SolverSchedule, denoise: Denoiser, second_derivative: float = 1.0) -> None:
        self.schedule = schedule
        self.denoise = denoise
        self.factors = (1.0, 1.0, second_derivative, 1.0)

    def run(self, exact: Tensor) -> Tensor:
        """The result."""
        self.seen, self.states, self.data = [exact[0]], [exact[0]], list[Tensor]()
        for i, step in enumerate(self.schedule.steps):
            self.data.append(self.denoise(self.seen[i], self.schedule.nodes[i]))
            if i >= len(exact) and (corrector := self.schedule.steps[i - 1].corrector):
                self.states[i] = self.advance(i - 1, self.schedule.steps[i - 1], corrector)
            state = exact[i + 1] if i + 1 < len(exact) else self.advance(i, step, step)
            self.seen.append(state)
            self.states.append(state)
        return self.states[-1]

    def advance(self, i: int, step: Step, how: Step | Corrector) -> Tensor:
        """State at node i + 1."""
        nodes = self.schedule.nodes
        start, end = nodes[step.start], nodes[i + 1]
        factor, weights = taylor(step, start, end, how.order)
        base = self.prediction(step, step.start)
        state = factor * self.states[step.start] + weights[0] * base
        for d in how.derivatives:
            values = derivative_weights(d, step, nodes)
            scale = scale_factor(d.scale, step.prediction, end.lam - start.lam)
            for p, a in values.items():
                slope = scale * a * (self.prediction(step, p) - base)
                state = state + self.factors[d.k] * weights[d.k] * slope
        return state

    def prediction(self, step: Step, p: int) -> Tensor:
        """What the step extrapolates, at node p."""
        if step.prediction == "data":
            return self.data[p]
        node = self.schedule.nodes[p]
        noise = (self.seen[p] - node.alpha * self.data[p]) / node.sigma
        return noise if step.prediction == "noise" else noise - self.data[p]
