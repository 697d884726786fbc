"""Where a solver evaluates the network: grids of nodes by name.

A grid is a rule that places points between two times; :func:`nodes` adds what happens at the end. In the
formulas q runs evenly from 0 to 1:

==============  ====================================================================================
uniform_t       t linear in q
quadratic_t     t^(1/power) linear in q, power 2
reverse_t       the mirror image of quadratic_t: small steps at the start
uniform_lambda  lambda = ln(alpha / sigma) linear in q
karras          (sigma / alpha)^(1 / rho) linear in q, rho 7 (Karras et al. 2022)
shift           t = shift u / (1 + (shift - 1) u), u linear in q, shift 3 (Esser et al. 2024)
ays             tables of Align Your Steps (Sabour et al. 2024), lambda linear between their entries
dmn             least a-priori error bound (Xue et al. 2024), see :mod:`thalweg.diffusion.solvers.dmn`
==============  ====================================================================================
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from thalweg.diffusion.schedules import NoiseSchedule, VPDiscrete
from thalweg.diffusion.solvers.dmn import ErrorModel, minimise_bound
from thalweg.diffusion.solvers.schedule import Node

Array = NDArray[np.float64]
End = Literal["append", "replace", "keep"]

AYS_LABELS = {
    "sd15": (999, 850, 736, 645, 545, 455, 343, 233, 124, 24),
    "sdxl": (999, 845, 730, 587, 443, 310, 193, 116, 53, 13),
}
"""Steps of training at which ten evaluations are made; the result has no noise."""

FINITE = 0.999
"""Time at which grids in lambda start if lambda is infinite at the start of the schedule."""


def nodes(
    schedule: NoiseSchedule,
    n: int,
    name: str,
    *,
    t_start: float | None = None,
    t_end: float | None = None,
    end: End | None = None,
    **options: Any,
) -> list[Node]:
    """Nodes of a sampler that evaluates a network n times: n + 1 of them by falling noise.

    Args:
        schedule: Noise schedule.
        n: Number of evaluations.
        name: One of :data:`GRIDS`.
        t_start: First time, the schedule's by default. If lambda is infinite there, grids in lambda are made
            from t = 0.999 on and their first node is then moved to ``t_start``.
        t_end: Smallest time, the schedule's by default.
        end: ``append``: n points down to ``t_end``, then sigma = 0 (the default). ``replace``: n + 1 points
            down to ``t_end``, the last of which is then replaced by sigma = 0; on rectified flow the grids in
            t run to t = 0 in that case unless ``t_end`` is given. This is the default of ``ays`` and ``dmn``,
            which are made for n steps. ``keep``: n + 1 points, the last at ``t_end``, whose noise stays in
            the result.
        options: Options of the grid, such as ``rho`` of karras.

    Raises:
        ValueError: For an unknown grid or option, a wrong n, or times that do not fall.
    """
    make, rule = _rule(name, options)
    end = ("replace" if make in (ays, dmn) else "append") if end is None else end
    if end not in get_args(End):
        raise ValueError(f"end {end!r} is not known; known: {', '.join(get_args(End))}")
    if n < 1:
        raise ValueError(f"a sampler needs n >= 1 evaluations, got {n}")
    first = schedule.t_start if t_start is None else t_start
    if t_end is None:
        t_end = 0.0 if end == "replace" and schedule.kind == "flow" and make in IN_TIME else schedule.t_end
    if not first > t_end >= 0:
        raise ValueError(f"times fall from t_start to t_end >= 0, got {first} and {t_end}")
    t = _times(schedule, n if end == "append" else n + 1, first, t_end, make, rule)
    found = [_node(schedule, time) for time in t]
    clean = Node(alpha=1.0, sigma=0.0, t=0.0)
    return {"append": [*found, clean], "replace": [*found[:-1], clean], "keep": found}[end]


def _rule(name: str, options: dict[str, Any]) -> tuple[Grid, dict[str, Any]]:
    """The grid of a name, and its options checked."""
    if name not in GRIDS:
        raise ValueError(f"grid {name!r} is not known; known: {', '.join(GRIDS)}")
    known = [p.name for p in inspect.signature(GRIDS[name]).parameters.values() if p.kind == p.KEYWORD_ONLY]
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"grid {name!r} has no {', '.join(unknown)}; options: {', '.join(known) or 'none'}")
    return GRIDS[name], options


def _times(
    schedule: NoiseSchedule, count: int, first: float, last: float, make: Grid, options: dict[str, Any]
) -> Array:
    """Falling times, the ends exactly where they are asked for."""
    finite = first
    if make not in IN_TIME and not np.isfinite(schedule.lam(first)):
        finite = min(FINITE, first)
    if count == 1:
        return np.array([first])
    t = np.array(make(schedule, count, finite, last, **options))
    t[0], t[-1] = first, last
    if not np.all(np.diff(t) < 0):
        raise ValueError(f"the grid's times do not fall: {t.tolist()}")
    return t


def _node(schedule: NoiseSchedule, t: float) -> Node:
    alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
    return Node(alpha=alpha, sigma=sigma, t=float(t), label=float(schedule.label(t)))


def uniform_t(schedule: NoiseSchedule, count: int, first: float, last: float) -> Array:
    """Even steps in time."""
    return np.linspace(first, last, count)


def quadratic_t(
    schedule: NoiseSchedule, count: int, first: float, last: float, *, power: float = 2.0
) -> Array:
    """Even steps in a root of time: small steps at the end."""
    return np.linspace(first ** (1 / power), last ** (1 / power), count) ** power


def reverse_t(schedule: NoiseSchedule, count: int, first: float, last: float, *, power: float = 2.0) -> Array:
    """Small steps at the start: the mirror image of :func:`quadratic_t`."""
    return first + last - quadratic_t(schedule, count, first, last, power=power)[::-1]


def shift(schedule: NoiseSchedule, count: int, first: float, last: float, *, shift: float = 3.0) -> Array:
    """Even steps in u, where t = shift u / (1 + (shift - 1) u); both ends are times t.

    Raises:
        ValueError: For times above one or a shift that is not positive.
    """
    if first > 1 or not shift > 0:
        raise ValueError(f"a shift is positive, of times up to 1; got shift {shift} and time {first}")
    ends = [t / (shift - (shift - 1) * t) for t in (first, last)]
    u = np.linspace(ends[0], ends[1], count)
    return shift * u / (1 + (shift - 1) * u)


def uniform_lambda(schedule: NoiseSchedule, count: int, first: float, last: float) -> Array:
    """Even steps in half the log signal-to-noise ratio."""
    ends = _finite_ends(schedule, first, last)
    return schedule.t_of_lam(np.linspace(*ends, count))


def karras(schedule: NoiseSchedule, count: int, first: float, last: float, *, rho: float = 7.0) -> Array:
    """Even steps in a root of the noise over the data; the grid of EDM."""
    low, high = (np.exp(-lam / rho) for lam in _finite_ends(schedule, first, last))
    return schedule.t_of_lam(-rho * np.log(np.linspace(low, high, count)))


def ays(
    schedule: NoiseSchedule,
    count: int,
    first: float,
    last: float,
    *,
    table: str = "sd15",
    stretch: bool = False,
) -> Array:
    """Published steps for Stable Diffusion, with lambda interpolated linearly for other numbers of them.

    The table's ten entries and the schedule's end are eleven points, so ten evaluations and ``end="replace"``
    (or ``"keep"``) give the table. With ``stretch`` the lambdas of the table are mapped linearly onto the
    range of any schedule: its shape on a model that it was not made for.

    Raises:
        ValueError: For an unknown table, or ends that it does not fit unless ``stretch`` is set.
    """
    if table not in AYS_LABELS:
        raise ValueError(f"AYS table {table!r} is not known; known: {', '.join(AYS_LABELS)}")
    made_for = VPDiscrete()
    lam = made_for.lam(np.append(made_for.t_of_label(np.array(AYS_LABELS[table])), made_for.t_end))
    points = np.interp(np.linspace(0, 1, count), np.linspace(0, 1, len(lam)), lam)
    ends = _finite_ends(schedule, first, last)
    if stretch:
        points = ends[0] + (points - lam[0]) * (ends[1] - ends[0]) / (lam[-1] - lam[0])
    elif not np.allclose(ends, (lam[0], lam[-1]), atol=1e-6):
        wanted = f"lambda from {lam[0]:.6f} to {lam[-1]:.6f}, got {ends[0]:.6f} to {ends[1]:.6f}"
        raise ValueError(f"AYS table {table!r} is for {wanted}; stretch=True maps it onto other ranges")
    return schedule.t_of_lam(points)


def dmn(
    schedule: NoiseSchedule,
    count: int,
    first: float,
    last: float,
    *,
    order: int = 3,
    error: ErrorModel = "latent",
) -> Array:
    """Least a-priori error bound of a multistep solver of given order; calls no network."""
    starts = [make(schedule, count, first, last) for make in (uniform_lambda, uniform_t, quadratic_t, karras)]
    lam = [np.asarray(schedule.lam(t)) for t in starts]
    best = minimise_bound(lam, order=order, error=error)
    return schedule.t_of_lam(best)


def _finite_ends(schedule: NoiseSchedule, first: float, last: float) -> tuple[float, float]:
    """Lambda at both times.

    Raises:
        ValueError: If it is infinite.
    """
    ends = float(schedule.lam(first)), float(schedule.lam(last))
    if not np.all(np.isfinite(ends)):
        raise ValueError(f"grids in lambda need noise at both ends; it is infinite at t = {first} or {last}")
    return ends


Grid = Callable[..., Array]

GRIDS: dict[str, Grid] = {
    make.__name__: make
    for make in (uniform_t, quadratic_t, reverse_t, uniform_lambda, karras, shift, ays, dmn)
}
IN_TIME: tuple[Grid, ...] = (uniform_t, quadratic_t, reverse_t, shift)
"""Grids that need no lambda."""
