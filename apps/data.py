"""``thalweg data``: the table of data sets, what a file holds, and joining published shards."""

from __future__ import annotations

import json
from dataclasses import asdict
from textwrap import shorten
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from thalweg.pde.data.inspect import FileReport
    from thalweg.pde.problem import ProblemSpec


def list_(kind: str | None = None, ids: bool = False) -> None:
    """Print the table of PDE data sets; a star marks the pretraining sets.

    Args:
        kind: show only ``pretraining``, ``downstream`` or ``steady`` sets; all of them by default.
        ids: show the reference identifiers, which are accepted as names too.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from thalweg.pde.data.catalog import PROBLEMS

    kinds = {
        "pretraining": lambda spec: spec.pretraining,
        "downstream": lambda spec: not spec.pretraining,
        "steady": lambda spec: spec.steady,
    }
    if kind is not None and kind not in kinds:
        raise ValueError(f"kind {kind!r} is unknown; choose among {', '.join(kinds)}")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for heading in ("name", "train/val/test", "frames", "channels"):
        table.add_column(heading, no_wrap=True)
    table.add_column("reference id" if ids else "summary", overflow="fold")
    for name, spec in PROBLEMS.items():
        if not name.endswith((".out", ".time")) and (kind is None or kinds[kind](spec)):
            table.add_row(*_row(spec, ids))
    console = Console()
    console.print(table)
    console.print("NAME.out has a longer horizon; NAME.time poses a steady problem at lead time 1.")


def _row(spec: ProblemSpec, ids: bool) -> list[str]:
    inputs, outputs = (",".join(c.name for c in side) for side in (spec.inputs, spec.outputs))
    splits = spec.splits
    return [
        spec.name + (" *" if spec.pretraining else ""),
        f"{splits.train}/{splits.val}/{splits.test}",
        str(spec.frames),
        inputs if inputs == outputs else f"{inputs} -> {outputs}",
        ", ".join(spec.aliases) if ids else spec.summary,
    ]


def info(file: str, as_json: bool = False) -> None:
    """Print what a PDE file holds: format, data set, variables, times, constants and value ranges.

    Args:
        file: NetCDF, HDF5 (PDEgym, The Well, PDEBench), or a folder of shards.
        as_json: print JSON instead of tables.
    """
    from rich.console import Console

    from thalweg.pde.data.inspect import inspect_file

    report = inspect_file(file)
    if as_json:
        print(json.dumps(asdict(report), indent=2))
        return
    console = Console(soft_wrap=True, markup=False, highlight=False)
    for line in _lines(report):
        console.print(line)


def _lines(report: FileReport) -> Iterator[str]:
    yield f"{report.path}: {report.format}, {report.bytes / 2**20:.1f} MiB"
    yield f"data set: {report.problem or 'not in the table'}"
    if report.times is not None:
        yield f"times: {report.times[0]:g} to {report.times[1]:g}, {report.times[2]} snapshots"
    for variable in report.variables:
        axes = ", ".join(f"{dim} {length}" for dim, length in zip(variable.dims, variable.shape))
        yield f"{variable.name} ({axes}): {variable.dtype}, {variable.storage}"
        for channel, (low, high) in enumerate(variable.ranges):
            yield f"    channel {channel}: {low:.5g} to {high:.5g} in {report.samples_read} samples"
        if not variable.finite:
            yield "    has NaN or infinity"
    for side, channels in (report.constants or {}).items():
        for name, (mean, std) in channels.items():
            yield f"constants of {side}: {name} mean {mean:.6g}, std {std:.6g}"
    for name, value in report.attributes.items():
        yield shorten(f"{name}: {value}", width=240, placeholder=" ...")


def assemble(folder: str, out: str) -> None:
    """Join published shards ``<variable>_<k>.nc`` into one NetCDF file, in the published order.

    Training does not need this: a folder of shards can be read as it is.

    Args:
        folder: folder with the shards.
        out: file to write.
    """
    from rich.console import Console
    from rich.progress import Progress

    from thalweg.pde.data.assemble import assemble as assemble_shards

    with Progress() as bar:
        task = bar.add_task("assemble", total=None)
        path = assemble_shards(folder, out, lambda done, total: bar.update(task, completed=done, total=total))
    Console().print(f"wrote {path}")
