"""Tiny files in the exact layout of any row of the table, for tests, examples and trying a pipeline offline.

The values are smooth random fields, not solutions of the equations; solvers are in `pde.solvers`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from thalweg.pde.data import catalog
from thalweg.pde.problem import ProblemSpec, Variable


def synthetic_fields(
    spec: ProblemSpec, samples: int, resolution: int, frames: int | None = None, seed: int = 0
) -> dict[str, np.ndarray]:
    """Arrays of a data set's variables: smooth, periodic, of order one; an airfoil's indicator is 0 or 1."""
    rng = np.random.default_rng(seed)
    fields = {}
    for variable in spec.variables:
        shape = _shape(variable, samples, resolution, frames or spec.frames)
        if "x" not in variable.dims:
            fields[variable.name] = rng.uniform(0.25, 0.5, shape)
            continue
        field = _smooth(rng, shape)
        if spec.mask_rule == "input_is_one":
            field[:, 0] = field[:, 0] > 0.7
            field[:, 1] = 1.0 + 0.1 * field[:, 1]
        fields[variable.name] = field
    return fields


def _shape(variable: Variable, samples: int, resolution: int, frames: int) -> tuple[int, ...]:
    lengths = {"sample": samples, "time": frames, "x": resolution, "y": resolution}
    return tuple(lengths.get(dim, length) for dim, length in zip(variable.dims, variable.shape))


def _smooth(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Random combination of the lowest Fourier modes along the last two axes."""
    angle = 2 * np.pi * np.arange(shape[-1]) / shape[-1]
    modes = np.stack([np.ones_like(angle), np.cos(angle), np.sin(angle)])
    weights = rng.normal(size=(*shape[:-2], 3, 3)) / 3
    return np.einsum("...ij,ix,jy->...xy", weights, modes, modes).astype(np.float32)


def write_synthetic(
    name: str | ProblemSpec,
    folder: str | os.PathLike[str],
    *,
    samples: int = 6,
    resolution: int = 16,
    frames: int | None = None,
    shards: int | None = None,
    seed: int = 0,
    attributes: Mapping[str, Any] | None = None,
) -> Path:
    """Write a data set's file, or its shards, with synthetic fields.

    Args:
        name: row of the table.
        folder: where the file (or the folder of shards) goes.
        samples: number of samples.
        resolution: grid points per axis.
        frames: snapshots; as published if not given.
        shards: write that many shards per variable into a folder named like the file.
        seed: seed of the fields.
        attributes: global attributes, e.g. ``num_val``.

    Returns:
        The file, or the folder of shards.
    """
    spec = catalog.get(name) if isinstance(name, str) else name
    fields = synthetic_fields(spec, samples, resolution, frames, seed)
    folder = Path(folder)
    if shards is not None:
        folder = folder / Path(spec.file).stem
        folder.mkdir(parents=True, exist_ok=True)
        for variable in spec.variables:
            for k, part in enumerate(np.array_split(fields[variable.name], shards)):
                write_netcdf(folder / f"{variable.name}_{k}.nc", {variable.name: (variable.dims, part)})
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / spec.file
    if spec.layout == "helmholtz":
        _write_helmholtz(path, fields, attributes or {})
    else:
        named = {variable.name: (variable.dims, fields[variable.name]) for variable in spec.variables}
        write_netcdf(path, named, attributes)
    return path


def write_netcdf(
    path: str | os.PathLike[str],
    variables: Mapping[str, tuple[tuple[str, ...], np.ndarray]],
    attributes: Mapping[str, Any] | None = None,
) -> None:
    """Write variables in the published layout: float32, one snapshot per chunk, no coordinates."""
    import h5netcdf

    with h5netcdf.File(path, "w") as file:
        for name, (dims, values) in variables.items():
            file.dimensions.update({d: n for d, n in zip(dims, values.shape) if d not in file.dimensions})
            chunks = tuple(1 if dim in ("sample", "time") else n for dim, n in zip(dims, values.shape))
            variable = file.create_variable(name, dims, np.float32, chunks=chunks)
            variable[...] = values
        file.attrs.update(attributes or {})


def _write_helmholtz(path: Path, fields: Mapping[str, np.ndarray], attributes: Mapping[str, Any]) -> None:
    with h5py.File(path, "w") as file:
        for i in range(len(fields["a"])):
            for name, values in fields.items():
                file[f"Sample_{i}/{name}"] = values[i].astype(np.float64)
        file.attrs.update(attributes)
