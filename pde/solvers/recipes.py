"""Recipes: how each data set is made, found by name without importing a solver.

A recipe turns sample indices into arrays in the published on-disk layout. A solver family is imported when
one of its names is asked for, so listing the names costs nothing.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

_FAMILY = "thalweg.pde.solvers."
_NAVIER_STOKES = _FAMILY + "navier_stokes_recipes:recipe"
_EULER = _FAMILY + "euler_recipes:recipe"

FAMILIES: Mapping[str, str] = {
    "NS-Sines": _NAVIER_STOKES,
    "NS-Gauss": _NAVIER_STOKES,
    "NS-PwC": _NAVIER_STOKES,
    "NS-Tracer-PwC": _NAVIER_STOKES,
    "NS-BB": _NAVIER_STOKES,
    "NS-SL": _NAVIER_STOKES,
    "NS-SVS": _NAVIER_STOKES,
    "FNS-KF": _NAVIER_STOKES,
    "CE-RP": _EULER,
    "CE-CRP": _EULER,
    "CE-KH": _EULER,
    "CE-Gauss": _EULER,
    "CE-RPUI": _EULER,
    "CE-RM": _FAMILY + "richtmyer_meshkov:recipe",
    "GCE-RT": _FAMILY + "rayleigh_taylor:recipe",
    "Wave-Gauss": _FAMILY + "wave:recipe",
    "Wave-Layer": _FAMILY + "wave:recipe",
    "ACE": _FAMILY + "allen_cahn:recipe",
    "Poisson-Gauss": _FAMILY + "poisson:recipe",
    "Helmholtz": _FAMILY + "helmholtz:recipe",
}
"""Data set -> ``module:function``; the function maps the name to its :class:`Recipe`."""

Precision = Literal["float32", "float64"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleRequest:
    """Which samples a recipe shall make, and how."""

    indices: tuple[int, ...]
    """Sample numbers; with the seed and the recipe's stream they determine the samples completely."""
    seed: int
    """Seed of the whole data set."""
    stream: str
    """Name of the random stream (:attr:`Recipe.stream`)."""
    resolution: int
    """Grid points per axis of the stored arrays."""
    times: tuple[float, ...]
    """Physical times of the snapshots to store; empty for steady problems."""
    device: str = "cpu"
    """Device on which the solver runs."""
    dtype: Precision = "float32"
    """Precision of the time stepping; initial data are always drawn in float64."""

    @property
    def frames(self) -> int:
        """Number of snapshots per sample."""
        return len(self.times)

    @property
    def torch_dtype(self) -> torch.dtype:
        """Precision of the time stepping as a torch type."""
        import torch

        return {"float32": torch.float32, "float64": torch.float64}[self.dtype]


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """One data set that can be generated.

    Results of a sample must depend on (seed, stream, index), resolution, times and dtype alone: a sample that
    shares a batch with others uses its own time step.
    """

    name: str
    """The catalog's name; decides file, variables and layout."""
    sample: Callable[[SampleRequest], dict[str, torch.Tensor]]
    """Request -> file variable -> array with a leading sample axis, in the published layout."""
    parameters: Mapping[str, object]
    """Numbers of the PDE, the scheme and the distribution of the data; JSON-able, stored in the file."""
    times: tuple[float, ...] = ()
    """Physical times of the published snapshots; empty for steady problems."""
    stream: str = ""
    """Random stream; recipes with the same stream share their initial data. Defaults to the name."""
    min_resolution: int = 16
    """Smallest resolution that makes sense."""
    resolution_multiple: int = 2
    """Resolutions must be divisible by this."""
    axes: str = "x y"
    """Physical meaning of the last two stored axes."""

    def request(
        self,
        indices: tuple[int, ...],
        *,
        seed: int,
        resolution: int,
        frames: int | None = None,
        device: str = "cpu",
        dtype: Precision = "float32",
    ) -> SampleRequest:
        """Build a request for this recipe.

        Args:
            indices: Sample numbers.
            seed: Seed of the data set.
            resolution: Grid points per axis.
            frames: Number of snapshots, the first ones of :attr:`times`; None for all.
            device: Device on which the solver runs.
            dtype: Precision of the time stepping.

        Raises:
            ValueError: If resolution, frames or dtype are not possible for this recipe.
        """
        self.check_resolution(resolution)
        if frames is not None and not self.times:
            raise ValueError(f"{self.name} is steady: frames must be left out, got {frames}")
        if frames is not None and not 2 <= frames <= len(self.times):
            raise ValueError(f"frames of {self.name} must be in 2..{len(self.times)}, got {frames}")
        if dtype not in ("float32", "float64"):
            raise ValueError(f"dtype must be float32 or float64, got {dtype!r}")
        return SampleRequest(
            indices=indices,
            seed=seed,
            stream=self.stream or self.name,
            resolution=resolution,
            times=self.times[:frames],
            device=device,
            dtype=dtype,
        )

    def check_resolution(self, resolution: int) -> None:
        """Raise ValueError if this recipe cannot run at a resolution."""
        if resolution < self.min_resolution or resolution % self.resolution_multiple:
            raise ValueError(
                f"resolution of {self.name} must be a multiple of {self.resolution_multiple} and at least "
                f"{self.min_resolution}, got {resolution}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """A figure about a solver that ``benchmarks/pde_solvers.py`` prints."""

    name: str
    """What is measured, e.g. ``SSP-RK3 slope on Taylor-Green``."""
    measure: Callable[[], float]
    """Runs the measurement."""
    expected: str
    """The value theory gives, in words or numbers."""


def names() -> list[str]:
    """Data sets that can be generated, in table order."""
    return list(FAMILIES)


def family(name: str) -> ModuleType:
    """Module of the solver family that makes a data set; it may define ``checks() -> list[Check]``.

    Raises:
        ValueError: If no recipe has that name; near matches are given.
    """
    return importlib.import_module(_target(name)[0])


def get(name: str) -> Recipe:
    """Recipe of a data set.

    Raises:
        ValueError: If no recipe has that name; near matches are given.
    """
    module, function = _target(name)
    recipe = getattr(importlib.import_module(module), function)(name)
    assert isinstance(recipe, Recipe), f"{module}:{function} did not return a Recipe"
    return recipe


def _target(name: str) -> tuple[str, str]:
    """Split the table's entry of a name into module and function."""
    if name not in FAMILIES:
        lower = {known.lower(): known for known in FAMILIES}
        near = [lower[match] for match in difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.5)]
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(f"no generator for {name!r}; {hint}known: {', '.join(FAMILIES)}")
    module, _, function = FAMILIES[name].partition(":")
    return module, function
