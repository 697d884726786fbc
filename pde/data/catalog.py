"""The table of all data sets, keyed by the paper's names, with the reference identifiers as aliases.

Lookup is exact. Variants are rows of their own:

- ``.out``: the longer horizon, nearly the whole series of snapshots (usually K = 10 steps of 2);
- ``.time``: a steady problem posed as the state at lead time 1, for time-conditioned networks;
- ``NS-Tracer-PwC``: NS-PwC with its passive tracer.

Other packages add rows with :func:`register`, in a script or through the entry-point group
``thalweg.problems``: an entry point names a :class:`ProblemSpec`, and is loaded when a name is not found.

Source of the rows: Herde et al. 2024 (arXiv 2405.19101) and the published files.
"""

from __future__ import annotations

import difflib
from dataclasses import replace
from functools import cache
from importlib import metadata

from thalweg.pde.data.tables import compressible, incompressible, waves_and_steady
from thalweg.pde.problem import ProblemSpec

ENTRY_POINTS = "thalweg.problems"

# (K, s) where the longer horizon is not the usual ten steps of two snapshots.
_OUT_STEPS = {"GCE-RT": (10, 1), "ACE": (9, 2)}
# Too few snapshots for a longer horizon.
_WITHOUT_OUT = ("Wave-Gauss",)


def _out_variant(spec: ProblemSpec) -> ProblemSpec:
    steps, stride = _OUT_STEPS.get(spec.name, (10, 2))
    return replace(
        spec,
        name=f"{spec.name}.out",
        aliases=tuple(f"{alias}.out" for alias in spec.aliases),
        summary=f"{spec.summary} (longer horizon)",
        max_num_time_steps=steps,
        time_step_size=stride,
        pretraining=False,
    )


def _table() -> dict[str, ProblemSpec]:
    rows = (*incompressible.TABLE, *compressible.TABLE, *waves_and_steady.TABLE)
    table: dict[str, ProblemSpec] = {}
    for spec in rows:
        table[spec.name] = spec
        if not spec.steady and spec.name not in _WITHOUT_OUT:
            table[f"{spec.name}.out"] = _out_variant(spec)
    return table


PROBLEMS: dict[str, ProblemSpec] = _table()
"""Every data set by its name."""

_BY_ALIAS = {alias: spec for spec in PROBLEMS.values() for alias in spec.aliases}


def names() -> list[str]:
    """Names of all data sets, variants included, in table order."""
    return list(PROBLEMS)


def register(spec: ProblemSpec) -> ProblemSpec:
    """Add a data set of one's own; registering an equal one again does nothing.

    Raises:
        ValueError: the name or an alias belongs to another data set.
    """
    for name in (spec.name, *spec.aliases):
        known = _find(name)
        if known is not None and known != spec:
            raise ValueError(f"data set {name!r} is already in the table ({known.name}: {known.summary})")
    PROBLEMS[spec.name] = spec
    _BY_ALIAS.update(dict.fromkeys(spec.aliases, spec))
    return spec


def get(name: str) -> ProblemSpec:
    """Data set with exactly this name or alias, ours or one that an installed package brings.

    Raises:
        ValueError: the name is unknown; the message lists near matches.
    """
    found = _find(name)
    if found is None:
        _load_entry_points()
        found = _find(name)
    if found is None:
        raise ValueError(f"unknown data set {name!r}; {_suggest(name)}")
    return found


def _find(name: str) -> ProblemSpec | None:
    return PROBLEMS.get(name) or _BY_ALIAS.get(name)


@cache
def _load_entry_points() -> None:
    """Register the data sets of installed packages, once."""
    for entry in metadata.entry_points(group=ENTRY_POINTS):
        register(entry.load())


def _suggest(name: str) -> str:
    known = [*PROBLEMS, *_BY_ALIAS]
    folded = {candidate.casefold(): candidate for candidate in known}
    near = difflib.get_close_matches(name.casefold(), folded, n=4, cutoff=0.6)
    if near:
        return "did you mean " + ", ".join(repr(folded[match]) for match in near) + "?"
    return "known: " + ", ".join(PROBLEMS)
