"""Finding and opening the file, or the folder of shards, of a data set."""

from __future__ import annotations

import os
from pathlib import Path

from thalweg.pde.data.formats.contents import Contents
from thalweg.pde.problem import ProblemSpec


def locate(spec: ProblemSpec, path: str | os.PathLike[str]) -> Path:
    """File or folder of shards of a data set.

    `path` may be the file, a folder that contains it, or a folder of shards; a folder of data sets may keep
    the shards in a folder named like the file (``data/NS-Sines/velocity_0.nc``).

    Raises:
        FileNotFoundError: nothing there; the message lists what was looked for, and how to make it.
    """
    from thalweg.pde.data.formats.netcdf import shard_files
    from thalweg.pde.solvers.recipes import FAMILIES

    path = Path(path)
    if path.is_file():
        return path
    folders = [path, path / Path(spec.file).stem]
    for folder in folders:
        if (folder / spec.file).is_file():
            return folder / spec.file
        if folder.is_dir() and shard_files(folder):
            return folder
    shards = " or ".join(f"{variable.name}_<k>.nc" for variable in spec.variables)
    places = " nor in ".join(str(folder) for folder in folders)
    made = f"; thalweg data generate {spec.name} --out {path} makes it" if spec.name in FAMILIES else ""
    raise FileNotFoundError(f"{spec.name}: neither {spec.file} nor shards {shards} in {places}{made}")


def expected(spec: ProblemSpec) -> str:
    """Variables and shapes a data set's file should have, for messages."""
    return ", ".join(f"{variable.name} {variable.shape}" for variable in spec.variables)


def open_contents(spec: ProblemSpec, path: str | os.PathLike[str]) -> Contents:
    """Contents of a data set's file, its variables checked against the table.

    Raises:
        ValueError: truncated or foreign file, missing variable, wrong axes or too few channels.
    """
    from thalweg.pde.data.formats import netcdf
    from thalweg.pde.data.formats.detect import OPENERS

    found = locate(spec, path)
    note = expected(spec)
    axes = {variable.name: variable.dims for variable in spec.variables}
    if found.is_dir():
        contents = netcdf.open_shards(found, note, axes)
    elif spec.layout == "netcdf":
        contents = netcdf.open_netcdf(found, note, axes)
    else:
        contents = OPENERS[spec.layout](found)
    check(spec, contents)
    return contents


def check(spec: ProblemSpec, contents: Contents) -> None:
    """Compare a file with what the table says about it.

    The number of samples, of snapshots and of grid points is the file's own affair.

    Raises:
        ValueError: names the file, the variable, and the expected and found shapes.
    """
    samples: dict[str, int] = {}
    for variable in spec.variables:
        array = contents.array(variable.name)
        where = f"{contents.path}: variable {variable.name!r} of {spec.name}"
        told = f"expected axes {variable.dims} like {variable.shape}, found {array.dims} {array.shape}"
        if array.dims != variable.dims:
            raise ValueError(f"{where}: {told}")
        indices = [
            channel.index
            for channel in (*spec.inputs, *spec.outputs)
            if channel.variable == variable.name and channel.index is not None
        ]
        if indices and dict(zip(array.dims, array.shape))["channel"] <= max(indices):
            raise ValueError(f"{where}: channel {max(indices)} is needed; {told}")
        if 0 in array.shape:
            raise ValueError(f"{where} is empty: {told}")
        if "sample" in array.dims:
            samples[variable.name] = array.shape[array.dims.index("sample")]
    if len(set(samples.values())) > 1:
        raise ValueError(f"{contents.path}: variables disagree on the number of samples: {samples}")
