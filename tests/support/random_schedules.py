"""Random solver schedules, for tests and measurements of what ranks them."""

import numpy as np
from numpy.random import Generator

from thalweg.diffusion.schedules import NoiseSchedule
from thalweg.diffusion.solvers.grids import nodes
from thalweg.diffusion.solvers.schedule import Corrector, Derivative, Node, Scale, SolverSchedule, Step

GRIDS = ("uniform_t", "quadratic_t", "uniform_lambda", "karras", "shift")
MOST_WEIGHT = 10.0


def random_schedule(noise: NoiseSchedule, nfe: int, rng: Generator) -> SolverSchedule:
    """A multistep schedule that ends at sigma = 0: a plain grid, jittered, and random decisions."""
    while True:
        found = _draw(noise, nfe, rng)
        if np.abs(found.compile().C_pred).max() <= MOST_WEIGHT:
            return found


def _draw(noise: NoiseSchedule, nfe: int, rng: Generator) -> SolverSchedule:
    end = float(np.exp(rng.uniform(np.log(1e-3), np.log(5e-2))))
    plain = nodes(noise, nfe, str(rng.choice(GRIDS)), t_end=end)[:-1]
    lam = np.array([node.lam for node in plain])
    gaps = np.diff(lam)
    lam[1:-1] += rng.normal(0, 0.15, nfe - 2) * np.minimum(gaps[1:], gaps[:-1])
    times = [noise.t_start, *np.asarray(noise.t_of_lam(np.sort(lam)[1:])).tolist()]
    found = [Node(alpha=float(noise.alpha(t)), sigma=float(noise.sigma(t)), t=t) for t in times]
    steps = [_step(i, i == nfe - 1, rng) for i in range(nfe)]
    return SolverSchedule(nodes=(*found, Node(alpha=1.0, sigma=0.0)), steps=tuple(steps))


def _step(i: int, last: bool, rng: Generator) -> Step:
    if last:
        return Step(start=i, prediction="data", order=1)
    order = min(i + 1, 1 + int(rng.choice(3, p=(0.2, 0.5, 0.3))))
    earlier = tuple(range(i - 1, i - order, -1))
    derivatives = tuple(Derivative(k=k, nodes=earlier) for k in range(1, order))
    if order > 1:
        near = int(rng.integers(1, order))
        c = float(rng.normal(0, 0.2))
        scale = (Scale(), Scale(kind="linear", c=c), Scale(kind="bh1"), Scale(kind="bh2"))[rng.integers(4)]
        derivatives = (Derivative(k=1, nodes=earlier[:near], scale=scale), *derivatives[1:])
    corrector = None
    if rng.random() < 0.5:
        again = tuple(Derivative(k=k, nodes=(i + 1, *earlier)) for k in range(1, order + 1))
        corrector = Corrector(order=order + 1, derivatives=again)
    return Step(
        start=i,
        prediction=("noise", "data")[rng.integers(2)],
        order=order,
        derivatives=derivatives,
        corrector=corrector,
    )
