"""Recipes of the incompressible sets NS-* and FNS-KF.

All of them solve the same equation on the periodic unit square with the spectral viscosity of the published
sets and differ in the initial data (``flow_initial``). Snapshots are taken at t = 0, 0.05, ..., 1; the first
one is the projected initial datum, or for NS-BB the state after a run-up of half a time unit.

Shapes: B samples, T snapshots, C = 2 or 3 channels (u, v, tracer), N points per axis.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from thalweg.pde.solvers import flow_initial as initial
from thalweg.pde.solvers import spectral_checks
from thalweg.pde.solvers.navier_stokes import NavierStokes, NavierStokesConfig
from thalweg.pde.solvers.recipes import Check, Recipe, SampleRequest
from thalweg.pde.solvers.seeding import draw

TIMES = tuple(round(0.05 * k, 2) for k in range(21))


@dataclass(frozen=True, kw_only=True, slots=True)
class Flow:
    """One family of initial data and how its set is stored."""

    initial: Callable[[torch.Generator, int], Tensor]
    """Draws a velocity (2, N, N) from a generator."""
    distribution: str
    """The distribution in words, stored in the file."""
    variable: str = "velocity"
    """Variable in the file."""
    tracer: bool = True
    """Whether a passive tracer is the third channel."""
    forcing: float = 0.0
    """Amplitude of the body force A (cos 2 pi (x + y), sin 2 pi (x + y))."""
    run_up: float = 0.0
    """Time for which the flow evolves before the first snapshot."""
    transpose: bool = False
    """Whether the stored spatial axes are (y, x)."""


PATCHES = Flow(
    initial=initial.piecewise_constant,
    distribution=f"vorticity U[-{initial.PATCH_VORTICITY:g}, {initial.PATCH_VORTICITY:g}] on 10 x 10 patches",
)

FLOWS: Mapping[str, Flow] = {
    "NS-Sines": Flow(
        initial=initial.sines,
        distribution="10 x 10 sine modes per component, a ~ U[-1, 1] / sqrt(2 pi (i + j)), projected",
    ),
    "NS-Gauss": Flow(
        initial=initial.gaussian_vortices,
        distribution="100 Gaussian vortices, strength U[-1, 1] / width, width U[0.01, 0.1]",
    ),
    "NS-PwC": PATCHES,
    "NS-Tracer-PwC": PATCHES,
    "NS-BB": Flow(
        initial=initial.brownian_bridge,
        distribution="Brownian bridge, Hurst index 0.5, 64 modes per axis, projected, after a run-up",
        run_up=0.5,
    ),
    "NS-SL": Flow(
        initial=initial.shear_layer,
        distribution="double shear layer, 7..12 interface modes, thickness U[0.08, 0.12], projected",
        tracer=False,
        transpose=True,
    ),
    "NS-SVS": Flow(
        initial=initial.vortex_sheet,
        distribution="vortex sheet on a sine curve, cubic B-spline mollifier of radius 5/128",
    ),
    "FNS-KF": Flow(
        initial=initial.piecewise_constant,
        distribution=PATCHES.distribution,
        variable="solution",
        tracer=False,
        forcing=0.1,
    ),
}


def recipe(name: str) -> Recipe:
    """Recipe of one of :data:`FLOWS`. NS-Tracer-PwC is NS-PwC, read with its tracer."""
    flow = FLOWS[name]
    numbers = NavierStokesConfig(resolution=0)
    return Recipe(
        name=name,
        sample=partial(sample, flow),
        parameters={
            "initial": flow.distribution,
            "hyperviscosity": "eps_N max(0, |n|^2 - N), eps_N = 0.05 / N, integer n",
            "viscosity": numbers.viscosity,
            "cfl": numbers.cfl,
            "scheme": "Fourier-Galerkin, 3/2 padding, SSP-RK3",
            "forcing": f"{flow.forcing:g} (cos 2 pi (x + y), sin 2 pi (x + y))" if flow.forcing else "none",
            "tracer": "disk of radius 1/4 about the centre" if flow.tracer else "none",
            "run_up": flow.run_up,
        },
        times=TIMES,
        stream="NS-PwC" if name == "NS-Tracer-PwC" else name,
        # With a multiple of eight every sample of a batch starts on a 64-byte border. The FFT library takes
        # other code paths for other alignments, and the last bits would depend on the place in the batch.
        resolution_multiple=8,
        axes="y x" if flow.transpose else "x y",
    )


def checks() -> list[Check]:
    """Figures about this family and the other spectral ones, for the benchmark."""
    return spectral_checks.checks()


def sample(flow: Flow, request: SampleRequest) -> dict[str, Tensor]:
    """Trajectories (B, T, C, N, N) of the requested samples, float32 on the request's device."""
    n = request.resolution
    solver = NavierStokes(NavierStokesConfig(resolution=n), request.device, request.torch_dtype)
    velocity_B2NN = draw(request, lambda rng: flow.initial(rng, n))
    tracer_BNN = initial.disk(n).expand(len(velocity_B2NN), n, n) if flow.tracer else None
    forcing_2NN = initial.kolmogorov_forcing(n, flow.forcing) if flow.forcing else None
    times = (-flow.run_up, *request.times) if flow.run_up else request.times
    frames = list(solver.snapshots(velocity_B2NN, times, tracer_BNN, forcing_2NN))[-request.frames :]
    solution_BTCNN = torch.stack(frames, dim=1).float()
    return {flow.variable: solution_BTCNN.mT.contiguous() if flow.transpose else solution_BTCNN}
