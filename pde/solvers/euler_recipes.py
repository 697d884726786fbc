"""Recipes of the periodic compressible sets CE-*.

The published data were computed on 512 x 512 cells and averaged to 128 x 128. Here a set is solved on
``supersample`` times as many cells per axis as it is stored with (2 by default, eight times the work of 1;
the distance to a converged solution halves), and the conserved variables are averaged over blocks. The five
stored channels are rho, u, v, p and the total energy E; the released sets' fifth channel is not described,
and no task uses it.

Shapes: B samples, T snapshots, C = 5 channels, X and Y cells.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from thalweg.pde.solvers import euler_checks
from thalweg.pde.solvers import euler_initial as initial
from thalweg.pde.solvers.euler import solve, to_primitive
from thalweg.pde.solvers.recipes import Check, Recipe, SampleRequest
from thalweg.pde.solvers.seeding import draw

GAMMA = 1.4
CFL = 0.8
TIMES = tuple(round(0.05 * k, 2) for k in range(21))

Draw = Callable[[torch.Generator, int], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Gas:
    """One family of initial data and how its set is stored."""

    initial: Draw
    """Draws primitive states (4, N, N) from a generator."""
    parameters: Mapping[str, object]
    """The distribution, stored in the file."""
    variable: str = "data"
    """Variable in the file."""
    times: tuple[float, ...] = TIMES
    """Snapshot times."""


def _ranges(states: tuple[initial.Range, ...]) -> dict[str, list[float]]:
    return {name: list(bounds) for name, bounds in zip(("rho", "u", "v", "p"), states)}


GASES: Mapping[str, Gas] = {
    "CE-RP": Gas(
        initial=initial.quadrants,
        parameters={"initial": "four quadrants", "states": _ranges(initial.QUADRANT_STATES)},
    ),
    "CE-CRP": Gas(
        initial=initial.curved_quadrants,
        parameters={
            "initial": "four states on places with curved borders",
            "states": _ranges(initial.QUADRANT_STATES),
            "modes": initial.CURVED_MODES,
            "amplitude": 0.1,
        },
    ),
    "CE-KH": Gas(
        initial=initial.shear_layers,
        parameters={"initial": "layer (2, -0.5, 0, 2.5) in (1, 0.5, 0, 2.5)", "modes": initial.LAYER_MODES},
    ),
    "CE-Gauss": Gas(
        initial=initial.vortices,
        parameters={"initial": "100 Gaussian vortices as in NS-Gauss", "rho": 0.1, "p": 2.5},
    ),
    "CE-RPUI": Gas(
        initial=initial.uncertain_interfaces,
        parameters={
            "initial": "four states on places with rippled borders",
            "states": _ranges(initial.UNCERTAIN_STATES),
            "modes": initial.UNCERTAIN_MODES,
            "wave_number_shift": 2 * initial.UNCERTAIN_MODES**2,
            "amplitude": 0.01,
        },
    ),
}


def recipe(name: str, supersample: int = 2) -> Recipe:
    """Recipe of one of :data:`GASES`.

    Args:
        name: The set.
        supersample: Cells per axis of the solver for each stored cell.
    """
    return build(name, GASES[name], supersample)


def build(name: str, gas: Gas, supersample: int = 2) -> Recipe:
    """Recipe of a set whose gas obeys the Euler equations on the periodic unit square."""
    return Recipe(
        name=name,
        sample=partial(sample, gas, supersample),
        parameters={
            **gas.parameters,
            "gamma": GAMMA,
            "cfl": CFL,
            "supersample": supersample,
            "scheme": "unsplit MUSCL-Hancock, MC limiter, HLLC",
            "channels": ["rho", "u", "v", "p", "E"],
        },
        times=gas.times,
    )


def sample(gas: Gas, supersample: int, request: SampleRequest) -> dict[str, Tensor]:
    """Trajectories (B, T, C, X, Y) of the requested samples, float32 on the request's device."""
    cells = request.resolution * supersample
    w_BCXY = draw(request, lambda rng: gas.initial(rng, cells)).to(request.torch_dtype)
    q_BTCXY = solve(w_BCXY, request.times, gamma=GAMMA, cfl=CFL, downsample=supersample)
    w_BTCXY = to_primitive(q_BTCXY.movedim(2, 0), GAMMA).movedim(0, 2)
    return {gas.variable: torch.cat([w_BTCXY, q_BTCXY[:, :, 3:4]], dim=2).float()}


def checks() -> list[Check]:
    """Figures about the scheme."""
    return euler_checks.checks()
