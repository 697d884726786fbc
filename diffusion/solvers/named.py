"""Known solvers by name, on given nodes.

Most are multistep exponential integrators, or singlestep ones, and come as a SolverSchedule: ddim, euler,
dpm, dpmpp, dpm_singlestep, dpmpp_singlestep, deis, unip, unipc, adams, flow_euler, flow_adams and
flow_singlestep. The others come as a LinearSchedule: heun, flow_heun, lms, ipndm, plms, pndm, and the faulty
dpm and dpmpp of ``compat="diffusers"``. Both can be sampled and saved; the former has decisions to search.

All are the methods of their papers. Where diffusers differs, ``compat="diffusers"`` gives its weights: at
order 3 its multistep DPM-Solvers halve the second derivative. Its other known faults are not those of
weights: NaN of UniPC's bh1 at sigma = 0, the doubly shifted grid and the integer labels of flows.

Every step that ends at sigma = 0 is a data prediction of order 1.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from thalweg.diffusion.solvers import adams, classic, singlestep
from thalweg.diffusion.solvers.linear import LinearSchedule
from thalweg.diffusion.solvers.schedule import Node, Scale, SolverSchedule

Builder = Callable[..., SolverSchedule | LinearSchedule]


@dataclass(frozen=True, kw_only=True, slots=True)
class Named:
    """A known solver."""

    build: Builder
    """Makes it from nodes and options."""
    form: Literal["schedule", "weights"]
    """What it comes as."""
    summary: str
    """One line."""
    flow: bool = False
    """Whether it needs the nodes of a rectified flow."""

    @property
    def options(self) -> tuple[str, ...]:
        """Names of its options."""
        return tuple(inspect.signature(self.build).parameters)[1:]


def _schedule(build: Builder, summary: str, *, flow: bool = False) -> Named:
    return Named(build=build, form="schedule", summary=summary, flow=flow)


def _weights(build: Builder, summary: str, *, flow: bool = False) -> Named:
    return Named(build=build, form="weights", summary=summary, flow=flow)


NAMED: dict[str, Named] = {
    "ddim": _schedule(adams.ddim, "DDIM, order 1"),
    "euler": _schedule(adams.ddim, "Euler in sigma / alpha: DDIM by another name"),
    "dpm": _schedule(adams.dpm, "multistep DPM-Solver on noise, order 1-3"),
    "dpmpp": _schedule(adams.dpmpp, "multistep DPM-Solver++ on data, order 1-3"),
    "dpm_singlestep": _schedule(singlestep.dpm_singlestep, "DPM-Solver in blocks on noise, order 1-3"),
    "dpmpp_singlestep": _schedule(singlestep.dpmpp_singlestep, "DPM-Solver++ in blocks on data, order 1-3"),
    "deis": _schedule(adams.deis, "DEIS, polynomials in log rho, order 1-3"),
    "unip": _schedule(adams.unip, "the predictor of UniPC, order 1-3"),
    "unipc": _schedule(adams.unipc, "UniPC with its corrector, order 1-3"),
    "adams": _schedule(adams.adams, "exponential Adams on noise, data or velocity, order 1-4"),
    "flow_euler": _schedule(adams.flow_euler, "Euler in t", flow=True),
    "flow_adams": _schedule(adams.flow_adams, "Adams-Bashforth in t, order 1-4", flow=True),
    "flow_singlestep": _schedule(singlestep.flow_singlestep, "Runge-Kutta in t, order 1-3", flow=True),
    "heun": _weights(classic.heun, "trapezoid in sigma / alpha, two evaluations a step"),
    "flow_heun": _weights(classic.flow_heun, "trapezoid in t, two evaluations a step", flow=True),
    "lms": _weights(classic.lms, "Adams-Bashforth in sigma / alpha on any nodes, order 1-4"),
    "ipndm": _weights(classic.ipndm, "weights of equal distances, lower orders first, order 1-4"),
    "plms": _weights(classic.plms, "PNDM without Runge-Kutta, first step made twice"),
    "pndm": _weights(classic.pndm, "PNDM with its Runge-Kutta start"),
}
"""Every known solver."""


def named(name: str, nodes: Sequence[Node], **options: Any) -> SolverSchedule | LinearSchedule:
    """Make a known solver on nodes.

    Args:
        name: One of NAMED.
        nodes: N + 1 nodes by falling noise, the last one the result.
        options: Those of its builder, see ``NAMED[name].options``.

    Returns:
        A SolverSchedule, or a LinearSchedule; the name and the options are in its info.

    Raises:
        ValueError: For an unknown name or option, or nodes on which the method cannot work.
    """
    if name not in NAMED:
        raise ValueError(f"solver is {name!r}, allowed: {', '.join(sorted(NAMED))}")
    allowed = NAMED[name].options
    if unknown := [option for option in options if option not in allowed]:
        known = ", ".join(allowed) or "none"
        raise ValueError(f"{name} has no option {', '.join(map(repr, unknown))}; allowed: {known}")
    info = {"solver": name, **{key: _plain(value) for key, value in options.items()}}
    return replace(NAMED[name].build(nodes, **options), info=info)


def _plain(value: Any) -> Any:
    """An option as JSON."""
    if isinstance(value, Scale | Node):
        return asdict(value)
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value
