"""The public JSON form of a solver schedule: ``{"nodes": [...], "steps": [...]}``.

A schedule given by its weights has ``"weights"``, rows of 1, 2, .. N numbers, in place of ``"steps"``.

Defaults are left out on writing and filled in on reading. What is not known is refused by its place.
"""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from thalweg.diffusion.solvers.linear import LinearSchedule
from thalweg.diffusion.solvers.schedule import Corrector, Derivative, Node, Scale, SolverSchedule, Step
from thalweg.diffusion.solvers.v3 import V3, V3Tables

LARGEST = sys.float_info.max
S = TypeVar("S", SolverSchedule, LinearSchedule)


def write_schedule(schedule: SolverSchedule) -> dict[str, Any]:
    """The schedule as plain JSON values."""
    values: dict[str, Any] = {
        "nodes": [_node_dict(node) for node in schedule.nodes],
        "steps": [_step_dict(step) for step in schedule.steps],
    }
    if schedule.first != "network":
        values["first"] = schedule.first
    if schedule.v3 is not None:
        values["v3"] = _v3_dict(schedule.v3)
    if schedule.info:
        values["info"] = dict(schedule.info)
    return values


def write_linear(schedule: LinearSchedule) -> dict[str, Any]:
    """A schedule of weights as plain JSON values."""
    values: dict[str, Any] = {
        "nodes": [_node_dict(node) for node in schedule.nodes],
        "weights": [list(row) for row in schedule.weights],
    }
    if schedule.first != "network":
        values["first"] = schedule.first
    if schedule.info:
        values["info"] = dict(schedule.info)
    return values


def _v3_dict(v3: V3 | V3Tables) -> dict[str, Any]:
    if isinstance(v3, V3):
        return {"l": v3.l, "s": v3.s}
    rows = {name: getattr(v3, name) for name in ("l", "s", "b")}
    if v3.channels is not None:
        rows = {name: [list(row) for row in table] for name, table in rows.items()}
    return {"lambda": list(v3.lam), **{name: list(table) for name, table in rows.items()}}


def _node_dict(node: Node) -> dict[str, Any]:
    values = {"t": node.t, "alpha": node.alpha, "sigma": node.sigma, "label": node.label}
    return {name: value for name, value in values.items() if value is not None}


def _step_dict(step: Step) -> dict[str, Any]:
    values: dict[str, Any] = {"start": step.start, "prediction": step.prediction, "order": step.order}
    values["derivatives"] = [_derivative_dict(d) for d in step.derivatives]
    if step.corrector is not None:
        derivatives = [_derivative_dict(d) for d in step.corrector.derivatives]
        values["corrector"] = {"order": step.corrector.order, "derivatives": derivatives}
    return values


def _derivative_dict(derivative: Derivative) -> dict[str, Any]:
    values: dict[str, Any] = {"k": derivative.k, "nodes": list(derivative.nodes)}
    if derivative.scale.kind != "none":
        scale = derivative.scale
        values["scale"] = {"kind": scale.kind} | ({"c": scale.c} if scale.kind in ("linear", "exp") else {})
    return values


def read_schedule(values: Mapping[str, Any]) -> SolverSchedule:
    """Read the JSON form.

    Raises:
        ValueError: For a missing, unknown or malformed entry; the message gives its place.
    """
    top = _Reader(values, "schedule")
    steps = [_read_step(entry, f"step {i}") for i, entry in enumerate(top.sequence("steps"))]
    v3 = top.optional("v3", None)
    common, nfe = _read_common(top)
    schedule = SolverSchedule(steps=tuple(steps), v3=None if v3 is None else _read_v3(v3), **common)
    return _checked(schedule, nfe)


def read_linear(values: Mapping[str, Any]) -> LinearSchedule:
    """Read the JSON form of a schedule of weights.

    Raises:
        ValueError: For a missing, unknown or malformed entry; the message gives its place.
    """
    top = _Reader(values, "schedule")
    weights = [_read_row(row, f"step {i}") for i, row in enumerate(top.sequence("weights"))]
    common, nfe = _read_common(top)
    return _checked(LinearSchedule(weights=tuple(weights), **common), nfe)


def _read_common(top: _Reader) -> tuple[dict[str, Any], object]:
    """What both forms have, and the number of evaluations if it is said; nothing else may be there."""
    nodes = [_read_node(entry, f"node {i}") for i, entry in enumerate(top.sequence("nodes"))]
    first, info, nfe = top.optional("first", "network"), top.optional("info", {}), top.optional("nfe", None)
    top.done()
    if not isinstance(info, Mapping):
        raise ValueError(f"schedule: info is {info!r}, not an object")
    return {"nodes": tuple(nodes), "first": first, "info": info}, nfe


def _checked(schedule: S, nfe: object) -> S:
    if nfe is not None and nfe != schedule.nfe:
        raise ValueError(f"schedule: nfe is {nfe} but its steps evaluate the network {schedule.nfe} times")
    return schedule


def _read_row(values: object, place: str, name: str = "weight") -> tuple[float, ...]:
    if not isinstance(values, list | tuple):
        plural = "weights" if name == "weight" else "entries"
        raise ValueError(f"{place}: {plural} are {values!r}, not a list")
    entry = _Reader({f"{name} {j}": value for j, value in enumerate(values)}, place)
    return tuple(entry.number(f"{name} {j}") for j in range(len(values)))


def _read_v3(values: object) -> V3 | V3Tables:
    entry = _Reader(values, "v3")
    if isinstance(values, Mapping) and "lambda" in values:
        lam = _read_row(entry.sequence("lambda"), "v3, lambda", "entry")
        tables = {name: _read_table(entry.sequence(name), f"v3, {name}") for name in ("l", "s", "b")}
        entry.done()
        return V3Tables(lam=lam, **tables)
    v3, b = V3(l=entry.number("l"), s=entry.number("s")), entry.number("b", optional=True)
    entry.done()
    if b:
        raise ValueError(f"v3: b is {b}, allowed: 0; a bias needs tables lambda, l, s and b")
    return v3


def _read_table(values: Sequence[Any], place: str) -> Any:
    """One table, or one for each channel."""
    if any(isinstance(row, list | tuple) for row in values):
        return tuple(_read_row(row, f"{place}, channel {k}", "entry") for k, row in enumerate(values))
    return _read_row(values, place, "entry")


def _read_node(values: object, place: str) -> Node:
    entry = _Reader(values, place)
    node = Node(
        alpha=entry.number("alpha"),
        sigma=entry.number("sigma"),
        t=entry.number("t", optional=True),
        label=entry.number("label", optional=True),
    )
    entry.done()
    return node


def _read_step(values: object, place: str) -> Step:
    entry = _Reader(values, place)
    corrector = entry.optional("corrector", None)
    step = Step(
        start=entry.integer("start"),
        prediction=entry.required("prediction"),
        order=entry.integer("order"),
        derivatives=_read_derivatives(entry, place),
        corrector=None if corrector is None else _read_corrector(corrector, f"{place}, corrector"),
    )
    entry.done()
    return step


def _read_corrector(values: object, place: str) -> Corrector:
    entry = _Reader(values, place)
    corrector = Corrector(order=entry.integer("order"), derivatives=_read_derivatives(entry, place))
    entry.done()
    return corrector


def _read_derivatives(entry: _Reader, place: str) -> tuple[Derivative, ...]:
    listed = entry.sequence("derivatives", optional=True)
    return tuple(_read_derivative(values, f"{place}, derivative {k}") for k, values in enumerate(listed, 1))


def _read_derivative(values: object, place: str) -> Derivative:
    entry = _Reader(values, place)
    nodes = entry.sequence("nodes")
    if not all(type(node) is int for node in nodes):
        raise ValueError(f"{place}: nodes are {nodes!r}, not integers")
    scale = entry.optional("scale", None)
    derivative = Derivative(
        k=entry.integer("k"),
        nodes=tuple(nodes),
        scale=Scale() if scale is None else _read_scale(scale, f"{place}, scale"),
    )
    entry.done()
    return derivative


def _read_scale(values: object, place: str) -> Scale:
    entry = _Reader(values, place)
    kind = entry.required("kind")
    c = entry.number("c", optional=kind not in ("linear", "exp"))
    entry.done()
    return Scale(kind=kind, c=c or 0.0)


def _short(value: object) -> str:
    return reprlib.repr(value)


class _Reader:
    """One JSON object, whose entries are taken out one by one."""

    def __init__(self, values: object, place: str) -> None:
        if not isinstance(values, Mapping):
            raise ValueError(f"{place} is {_short(values)}, not an object")
        self.left = dict(values)
        self.place = place
        self.known: list[str] = []

    def optional(self, name: str, default: Any) -> Any:
        """Value of an entry, or the default."""
        self.known.append(name)
        return self.left.pop(name, default)

    def required(self, name: str) -> Any:
        """Value of an entry that must be there."""
        self.known.append(name)
        if name not in self.left:
            raise ValueError(f"{self.place} has no entry {name!r}; found {', '.join(self.left) or 'none'}")
        return self.left.pop(name)

    def number(self, name: str, optional: bool = False) -> Any:
        """Finite float."""
        value = self.optional(name, None) if optional else self.required(name)
        if value is None and optional:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST:
            raise ValueError(f"{self.place}: {name} is {_short(value)}, not a finite number")
        return float(value)

    def integer(self, name: str) -> int:
        """Integer."""
        value = self.required(name)
        if type(value) is not int:
            raise ValueError(f"{self.place}: {name} is {value!r}, not an integer")
        return value

    def sequence(self, name: str, optional: bool = False) -> Sequence[Any]:
        """List."""
        value = self.optional(name, []) if optional else self.required(name)
        if not isinstance(value, list | tuple):
            raise ValueError(f"{self.place}: {name} is {value!r}, not a list")
        return value

    def done(self) -> None:
        """Refuse entries that nobody asked for."""
        if self.left:
            unknown, known = ", ".join(map(repr, self.left)), ", ".join(self.known)
            raise ValueError(f"{self.place}: unknown entry {unknown}; known: {known}")
