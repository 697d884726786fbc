"""Tables of ``thalweg fit ... --dry-run``: an epoch, and memory by phase."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from thalweg.apps.plan import Devices, NetworkPlan, OnlinePlan, plan

GIB = 2**30
GPUS = (16, 24, 32, 40, 48, 80, 96, 141, 192)
"""Memory of GPUs on the market, GiB."""
ROOM = 0.9
"""Share of a GPU that an estimate may take: the rest is for libraries, kernels and fragments."""


def show(config: Mapping[str, Any]) -> None:
    """Print what a run would need.

    Raises:
        ValueError: As :func:`thalweg.apps.plan.plan` does.
    """
    found = plan(config)
    # as wide as it needs to be where nobody looks, so that files hold whole lines
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.width = max(console.width, 100) if not console.is_terminal else console.width
    for item in _online(found) if isinstance(found, OnlinePlan) else _network(found):
        console.print(item)
    console.print("nothing was trained (--dry-run)")


def _network(found: NetworkPlan) -> Iterator[Any]:
    yield f"{found.parameters:,} parameters, {found.trained:,} of them trained; {_where(found.devices)}"
    total = sum(found.parts.values())
    unit = _unit(total)
    table = _table(f"memory of a process, {unit[0]}", "")
    for name, size in found.parts.items():
        table.add_row(name, _number(size, unit))
    table.add_section()
    table.add_row("total without activations", _number(total, unit))
    yield table
    yield "not counted: activations, libraries of the GPU, fragments, scratch of kernels"
    if found.devices.sharded:
        yield "weights are counted as if they were whole on every device; the strategy splits them"


def _online(found: OnlinePlan) -> Iterator[Any]:
    memory = found.estimate
    yield f"{memory.source}: {memory.trained:,} parameters are trained; {_where(found.devices)}"
    yield _epoch(found)
    unit = _unit(memory.peak)
    table = _table(f"memory of a process, {unit[0]}", *(phase.name for phase in memory.phases))
    names = dict.fromkeys(name for phase in memory.phases for name in phase.parts)
    for name in sorted(names, key="activations".__eq__):
        sizes = [phase.parts.get(name, 0) for phase in memory.phases]
        if any(sizes):
            table.add_row(name, *(_number(size, unit) if size else "" for size in sizes))
    table.add_section()
    table.add_row("total", *(_number(phase.total, unit) for phase in memory.phases))
    yield table
    largest = max(memory.phases, key=lambda phase: phase.total)
    yield f"largest: {largest.name}, {_size(memory.peak)}; {_fits(memory.peak, found.devices)}"
    yield "not counted: libraries of the GPU, fragments, scratch of kernels, activations of rewards"
    if found.missing:
        yield f"to be there before training: {', '.join(found.missing)}"


def _epoch(found: OnlinePlan) -> Table:
    shape = found.shape
    table = _table("an epoch", "")
    batches = sorted({shape.batches_of(rank) for rank in range(shape.world_size)})
    passes = batches[-1] * found.times // shape.gradient_steps
    rows = {
        "images": f"{shape.images:,} = {shape.groups} groups of {shape.group_size}",
        "micro-batches of a process": f"{' or '.join(map(str, batches))} of {shape.batch} images",
        "optimizer steps": str(shape.gradient_steps),
        "backward passes of a step": f"{passes} on a process, {found.times} times of each image",
        "network evaluations of images, rollout": f"{found.rollout:,} = {found.nfe} for each"
        + (", twice for guidance" if found.guided else ""),
        "the same, training": f"{found.passes * found.losses:,} forward, {found.losses:,} backward",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title, *columns, box=box.SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify = "right"
        column.no_wrap = True
    return table


def _unit(total: int) -> tuple[str, int]:
    """GiB for large things, MiB for small ones."""
    return ("GiB", GIB) if total >= GIB else ("MiB", GIB // 1024)


def _number(size: int, unit: tuple[str, int]) -> str:
    return f"{size / unit[1]:.2f}"


def _size(size: int) -> str:
    return f"{_number(size, _unit(size))} {_unit(size)[0]}"


def _where(devices: Devices) -> str:
    kind = "GPU" if devices.gpu else "CPU process"
    many = "" if devices.processes == 1 else "s" if devices.gpu else "es"
    precision = str(devices.autocast).removeprefix("torch.") if devices.autocast else "no"
    return f"{devices.processes} {kind}{many}, {precision} autocast"


def _fits(size: int, devices: Devices) -> str:
    """On which devices there is enough."""
    import torch

    if not devices.gpu:
        return f"this machine has {_size(here)}" if (here := _ram()) else "in the machine's memory"
    enough = [gpu for gpu in GPUS if size <= ROOM * gpu * GIB]
    text = f"fits GPUs of {enough[0]} GB and more, a tenth to spare" if enough else "fits no GPU"
    if torch.cuda.is_available():
        own = torch.cuda.get_device_properties(0)
        text += f"; {own.name} here has {_size(own.total_memory)}"
    return text


def _ram() -> int:
    """Memory of this machine in bytes, 0 if it is not told."""
    if not hasattr(os, "sysconf"):
        return 0
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
