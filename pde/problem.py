"""What a PDE data set is: channels with names, units and constants, and the rules for reading them.

A :class:`ProblemSpec` is plain data. It describes the file on disk, which channels a network sees and
predicts, how they are normalised and grouped, and how input/label pairs are drawn. It imports nothing heavy,
so that tables of specs load in milliseconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["state", "static", "constant"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Channel:
    """One channel of a network's input or output."""

    name: str
    """Short name, e.g. ``rho``, ``u``, ``p``, ``tracer``, ``c``, ``g``."""
    variable: str | None = None
    """Variable in the file; None for a channel that the loader synthesises."""
    index: int | None = None
    """Index along the variable's channel axis; None if the variable has no such axis."""
    role: Role = "state"
    """``state`` evolves, ``static`` varies in space only (wave speed, forcing), ``constant`` is one value."""
    formula: str | None = None
    """For synthesised channels: a key of ``pde.data.synthesis.FORMULAS`` or a number written as text."""
    units: str = "1"
    """Physical units, ``1`` where the problem is dimensionless."""
    shift: float = 0.0
    """Subtracted from the raw field before the mean and standard deviation are applied."""
    mean: float = 0.0
    """Mean used for normalisation, as published."""
    std: float = 1.0
    """Standard deviation used for normalisation, as published."""
    masked: bool = False
    """True for outputs excluded from loss and error (the label overwrites their prediction)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Splits:
    """Sizes of a data set: train is the head, test the tail, validation lies just before the test part."""

    total: int
    """Number of trajectories (or samples of a steady problem)."""
    val: int
    """Number of validation trajectories."""
    test: int
    """Number of test trajectories."""

    @property
    def train(self) -> int:
        """Number of training trajectories that remain."""
        return self.total - self.val - self.test


@dataclass(frozen=True, kw_only=True, slots=True)
class Variable:
    """One array in a file."""

    name: str
    """Name inside the file; published shards are called ``<name>_<k>.nc``."""
    dims: tuple[str, ...]
    """Dimension names, ``("sample", "time", "channel", "x", "y")`` or a subset in that order."""
    shape: tuple[int, ...]
    """Published shape, sample axis included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProblemSpec:
    """One data set: file, channels, normalisation, splits and pairs."""

    name: str
    """The paper's name, e.g. ``NS-Sines``; variants carry a suffix, e.g. ``NS-Tracer-PwC``, ``ACE.out``."""
    aliases: tuple[str, ...] = ()
    """Other accepted names, the reference identifiers among them; matched exactly."""
    summary: str
    """One sentence for tables: equation, domain and initial data."""
    equation: str
    """The PDE in ASCII."""
    boundary: str
    """Boundary condition: ``periodic``, ``dirichlet``, ``absorbing``, ..."""
    file: str
    """Assembled file, e.g. ``NS-Sines.nc``."""
    layout: Literal["netcdf", "helmholtz", "well", "pdebench"] = "netcdf"
    """File format; ``helmholtz`` stores one HDF5 group per sample."""
    variables: tuple[Variable, ...]
    """Arrays in the file."""
    inputs: tuple[Channel, ...]
    """Channels the network sees, in order."""
    outputs: tuple[Channel, ...]
    """Channels the network predicts, in order."""
    groups: tuple[tuple[str, ...], ...]
    """Output channels by physical quantity, consecutive: ``(("rho",), ("u", "v"), ("p",))``."""
    splits: Splits
    """Published sizes."""
    frames: int
    """Snapshots per trajectory; 1 for steady problems."""
    time_step: float = 1.0
    """Physical time between snapshots."""
    time_scale: float
    """T_const: the lead time fed to a network is (index difference) / time_scale."""
    max_num_time_steps: int = 7
    """K of the all2all pairs used by default."""
    time_step_size: int = 2
    """Stride s of the all2all pairs used by default."""
    domain: tuple[tuple[float, float], tuple[float, float]] = ((0.0, 1.0), (0.0, 1.0))
    """Physical extent along x (axis -2 of the file) and y (axis -1)."""
    grid: Literal["periodic", "cells", "closed"] = "periodic"
    """Where the points lie: left ends (periodic), cell centres, or both ends included."""
    transpose: bool = False
    """True if the stored spatial axes are swapped on load (components stay)."""
    steady: bool = False
    """True if input and label are different fields of one sample and time plays no role."""
    conditioned: bool = True
    """Whether networks get a lead time; the ``.time`` variants of steady sets say yes with lead time 1."""
    mask_rule: Literal["none", "channels", "input_is_one"] = "none"
    """How pixel_mask is made: none, from ``masked`` channels, or where the input equals 1 (airfoil)."""
    pretraining: bool = False
    """Part of the published pretraining mixture."""
    licence: str = "CC-BY-NC-4.0 (published data)"
    """Licence of the published files; generated files are the user's own."""

    @property
    def horizon(self) -> int:
        """Snapshot index of the last label, K * s; 0 for steady problems."""
        return 0 if self.steady else self.max_num_time_steps * self.time_step_size

    @property
    def channel_slices(self) -> list[int]:
        """Group boundaries in output channels, e.g. ``[0, 1, 3, 4]``."""
        edges = [0]
        for group in self.groups:
            edges.append(edges[-1] + len(group))
        return edges

    @property
    def scored_groups(self) -> tuple[tuple[str, ...], ...]:
        """Groups that the paper averages errors over: evolving, unmasked quantities."""
        roles = {c.name: c for c in self.outputs}
        return tuple(
            g for g in self.groups if all(roles[n].role == "state" and not roles[n].masked for n in g)
        )
