"""From a file to its description: generated and published sets by name, other formats from what they hold."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from thalweg.pde.data import catalog
from thalweg.pde.data.formats.contents import Contents
from thalweg.pde.data.formats.detect import open_any
from thalweg.pde.data.stored import SPACE, StoredArray, size
from thalweg.pde.problem import Channel, ProblemSpec, Splits, Variable

# Pairs of problems that are not in the table: at most this many steps, over the whole series.
_STEPS = 7


def recognise(contents: Contents) -> ProblemSpec | None:
    """Row of the table that a file belongs to, by its attribute or its name, or None."""
    if name := contents.attributes.get("thalweg_problem"):
        return catalog.get(str(name))
    if not contents.format.startswith(("netcdf", "helmholtz")):
        return None
    stem = contents.path.name if contents.path.is_dir() else contents.path.stem
    return next((spec for spec in catalog.PROBLEMS.values() if Path(spec.file).stem == stem), None)


def spec_for_file(path: str | os.PathLike[str]) -> ProblemSpec:
    """Description of a file: its row of the table, or one made from the fields it holds.

    Raises:
        ValueError: nothing in the file says what it is.
    """
    contents = open_any(path)
    try:
        if spec := recognise(contents):
            return spec
        if contents.format in ("well", "pdebench"):
            return describe(contents)
    finally:
        contents.close()
    raise ValueError(
        f"{path} ({contents.format}) has no attribute 'thalweg_problem' and is not named like a data set: "
        f"name it, as one of {', '.join(catalog.PROBLEMS)}"
    )


def describe(contents: Contents) -> ProblemSpec:
    """Problem made of all 2-D fields of a file of The Well or PDEBench.

    Fields that vary in time are states, the others static inputs. A file with a single snapshot is a steady
    problem from the static fields to the states. Momentum is left out where velocity is known.

    Raises:
        ValueError: the file has no 2-D field that varies in time.
    """
    fields = {name: array for name, array in contents.arrays.items() if _is_plane(array)}
    if "velocity" in fields:
        fields.pop("momentum", None)
    states = [c for name, a in fields.items() if size(a, "time") for c in _channels(name, a, "state")]
    statics = [c for name, a in fields.items() if not size(a, "time") for c in _channels(name, a, "static")]
    if not states:
        known = {name: array.dims for name, array in contents.arrays.items()}
        raise ValueError(f"{contents.path} has no 2-D field that varies in time, found {known}")
    frames = max(size(array, "time") or 1 for array in fields.values())
    total = max(size(array, "sample") or 1 for array in fields.values())
    steady = frames == 1 and bool(statics)
    outputs = tuple(states) if steady else (*states, *statics)
    steps = max(1, min(_STEPS, frames - 1))
    tenth = max(1, total // 10)
    return ProblemSpec(
        name=contents.path.stem,
        summary=f"{contents.format} file with {', '.join(fields)}",
        equation="as in the file",
        boundary=str(contents.attributes.get("boundary", "unknown")),
        file=contents.path.name,
        layout="well" if contents.format == "well" else "pdebench",
        variables=_variables(fields),
        inputs=tuple(statics) if steady else outputs,
        outputs=outputs,
        groups=tuple(_groups(outputs)),
        splits=Splits(total=total, val=tenth, test=tenth),
        frames=frames,
        time_step=_time_step(contents),
        time_scale=float(max(1, frames - 1)),
        max_num_time_steps=steps,
        time_step_size=max(1, (frames - 1) // steps),
        grid="cells",
        steady=steady,
        licence="as published with the file",
    )


def _is_plane(array: StoredArray) -> bool:
    return {"x", "y"} <= set(array.dims) and "z" not in array.dims


def _variables(fields: dict[str, StoredArray]) -> tuple[Variable, ...]:
    """Variables, those with a sample axis first: the first one tells how many samples there are."""
    ordered = sorted(fields.items(), key=lambda item: "sample" not in item[1].dims)
    return tuple(Variable(name=name, dims=array.dims, shape=array.shape) for name, array in ordered)


def component_names(name: str, count: int) -> list[str]:
    """Names of a field's components: ``velocity_x``, ...; tensors of rank two get two letters."""
    axes = SPACE[:count]
    if count <= len(SPACE):
        return [f"{name}_{axis}" for axis in axes]
    side = round(count**0.5)
    if side * side == count and side <= len(SPACE):
        return [f"{name}_{a}{b}" for a in SPACE[:side] for b in SPACE[:side]]
    return [f"{name}_{k}" for k in range(count)]


def _channels(name: str, array: StoredArray, role: str) -> list[Channel]:
    assert role in ("state", "static")
    count = size(array, "channel")
    if count is None:
        return [Channel(name=name, variable=name, role=role)]  # type: ignore[arg-type]
    names = [f"{name}_{k}" for k in range(count)] if name == "data" else component_names(name, count)
    return [
        Channel(name=component, variable=name, index=k, role=role)  # type: ignore[arg-type]
        for k, component in enumerate(names)
    ]


def _groups(channels: Iterable[Channel]) -> list[tuple[str, ...]]:
    """Components of a vector form a group; so do the velocities Vx, Vy, Vz."""
    groups: dict[str, list[str]] = {}
    for channel in channels:
        vector = channel.variable if channel.index is not None and channel.variable != "data" else None
        key = "V" if channel.name in ("Vx", "Vy", "Vz") else vector or channel.name
        groups.setdefault(key, []).append(channel.name)
    return [tuple(group) for group in groups.values()]


def _time_step(contents: Contents) -> float:
    times = contents.times
    return float(times[1] - times[0]) if times is not None and len(times) > 1 else 1.0
