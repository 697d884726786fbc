"""The table of all data sets, keyed by the paper's names, with the reference identifiers as aliases.

Lookup is exact. Variants are rows of their own:

- ``.out``: the longer horizon, nearly the whole series of snapshots (usually K = 10 steps of 2);
- ``.time``: a steady problem posed as the state at lead time 1, for time-conditioned networks;
- ``NS-Tracer-PwC``: NS-PwC with its passive tracer.

Source of the rows: Herde et al. 2024 (arXiv 2405.19101) and the published files.
"""

from __future__ import annotations

import difflib
from dataclasses import replace

from thalweg.pde.data.tables import compressible, incompressible, waves_and_steady
from thalweg.pde.problem import ProblemSpec

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


def get(name: str) -> ProblemSpec:
    """Data set with exactly this name or alias.

    Raises:
        ValueError: the name is unknown; the message lists near matches.
    """
    if spec := PROBLEMS.get(name) or _BY_ALIAS.get(name):
        return spec
    raise ValueError(f"unknown data set {name!r}; {_suggest(name)}")


def _suggest(name: str) -> str:
    known = [*PROBLEMS, *_BY_ALIAS]
    folded = {candidate.casefold(): candidate for candidate in known}
    near = difflib.get_close_matches(name.casefold(), folded, n=4, cutoff=0.6)
    if near:
        return "did you mean " + ", ".join(repr(folded[match]) for match in near) + "?"
    return "known: " + ", ".join(PROBLEMS)
