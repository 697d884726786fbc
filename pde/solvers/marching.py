"""Time marching of explicit finite-volume schemes with a time step of its own for every sample.

A batch advances together, yet each sample keeps its own clock, CFL step and next snapshot, and leaves the
batch when its last snapshot is stored. Results of a sample therefore do not depend on its company.

Shapes: C conserved variables, B samples, X and Y cells, T snapshots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Protocol, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from thalweg.pde.solvers.finite_volume import GHOSTS as G

ATTEMPTS = 12
"""How often a step is repeated with flat states and smaller steps before giving up."""

TILE_CELLS = 32768
"""Cells advanced in one go on a CPU. Larger temporaries cost page faults, smaller ones call overhead."""


class Scheme(Protocol):
    """What :func:`march` needs to know of a scheme."""

    def select(self, keep_B: Tensor) -> Self:
        """Scheme for a subset of the samples."""

    def tile(self, samples: slice, rows: slice) -> Self:
        """Scheme for a block of samples and rows of cells along x."""

    def prepare(self, q_CBXY: Tensor) -> Tensor:
        """Primitive variables, density in channel 0 and pressure in channel 3, with filled ghost cells."""

    def speed(self, w_CBXY: Tensor) -> Tensor:
        """Signal speed per sample, summed over directions."""

    def advance(
        self, q_CBXY: Tensor, w_CBXY: Tensor, step_B: Tensor, spacing: float, slope_1BXY: Tensor | None
    ) -> Tensor:
        """Conserved variables after one step of size ``step_B``.

        ``w_CBXY`` is the same state as :meth:`prepare` returns it. ``slope_1BXY``, with one ring of ghosts,
        is a factor on all slopes.
        """


S = TypeVar("S", bound=Scheme)


def march(
    scheme: S,
    q_CBXY: Tensor,
    times: Sequence[float],
    *,
    spacing: float,
    cfl: float,
    store: Callable[[Tensor], Tensor],
) -> Tensor:
    """Advance a batch through all snapshot times, hitting each exactly.

    Args:
        scheme: The scheme.
        q_CBXY: Conserved variables at t = 0.
        times: Snapshot times, increasing, the first one at least 0.
        spacing: Cell width.
        cfl: CFL number with respect to :meth:`Scheme.speed`.
        store: Maps a state (C, B, X, Y) to what a snapshot keeps of it, channels first.

    Returns:
        Snapshots (B, T, C, ...).

    Raises:
        ValueError: If the times do not increase or the initial density or pressure is not positive.
        FloatingPointError: If a step cannot be made with positive density and pressure.
    """
    if not times or times[0] < 0 or any(b <= a for a, b in pairwise(times)):
        raise ValueError(f"snapshot times must increase from 0 on, got {tuple(times)}")
    w_CBXY = scheme.prepare(q_CBXY)
    if not bool((_lowest(w_CBXY) > 0).all()):
        raise ValueError("initial density and pressure must be positive everywhere")
    first = store(q_CBXY)
    snapshots = first.new_empty(first.shape[1], len(times), first.shape[0], *first.shape[2:])
    due = torch.tensor([*times, times[-1]], dtype=torch.float64, device=q_CBXY.device)

    sample_B = torch.arange(q_CBXY.shape[1], device=q_CBXY.device)
    frame_B = torch.zeros_like(sample_B)
    clock_B = torch.zeros_like(sample_B, dtype=torch.float64)
    while True:
        hit_B = clock_B == due[frame_B]
        if bool(hit_B.any()):
            snapshots[sample_B[hit_B], frame_B[hit_B]] = store(q_CBXY[:, hit_B]).transpose(0, 1)
            frame_B = frame_B + hit_B
            going_B = frame_B < len(times)
            if not bool(going_B.any()):
                return snapshots
            if not bool(going_B.all()):
                scheme = scheme.select(going_B)
                q_CBXY, w_CBXY = q_CBXY[:, going_B], w_CBXY[:, going_B]
                sample_B, frame_B, clock_B = sample_B[going_B], frame_B[going_B], clock_B[going_B]
        gap_B = due[frame_B] - clock_B
        # Equal steps up to the next snapshot rather than a tiny last one.
        steps_B = torch.ceil(gap_B * scheme.speed(w_CBXY).double() / (cfl * spacing))
        wanted_B = gap_B / steps_B
        q_CBXY, w_CBXY, step_B = _positive_step(scheme, q_CBXY, w_CBXY, wanted_B, spacing)
        arrived_B = (steps_B <= 1) & (step_B == wanted_B)
        clock_B = torch.where(arrived_B, due[frame_B], clock_B + step_B)


def _lowest(w_CBXY: Tensor) -> Tensor:
    """Smaller of the lowest density and pressure, per sample; NaN stays NaN."""
    return w_CBXY[0:4:3, :, G:-G, G:-G].amin(dim=(0, 2, 3))


def _positive_step(
    scheme: S, q_CBXY: Tensor, w_CBXY: Tensor, step_B: Tensor, spacing: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One step; where density or pressure would not be positive, again with flat states around those cells.

    From the third attempt on the step of the samples concerned is halved as well. Other samples repeat their
    step unchanged. Returns conserved and primitive variables and the steps made.
    """
    slope_1BXY = None
    for attempt in range(ATTEMPTS):
        q_next = _tiled_step(scheme, q_CBXY, w_CBXY, step_B, spacing, slope_1BXY)
        w_next = scheme.prepare(q_next)
        bad_B = ~(_lowest(w_next) > 0)
        if not bool(bad_B.any()):
            return q_next, w_next, step_B
        # Ghosts follow the scheme's boundary rule, so the ring of the mask is right as well.
        bad_1BXY = ~((w_next[0:1] > 0) & (w_next[3:4] > 0))
        flat_1BXY = 1.0 - F.max_pool2d(bad_1BXY.to(q_CBXY.dtype), 3, stride=1)
        slope_1BXY = flat_1BXY if slope_1BXY is None else slope_1BXY * flat_1BXY
        if attempt >= 1:
            step_B = torch.where(bad_B, 0.5 * step_B, step_B)
    raise FloatingPointError(
        f"density or pressure is not positive after {ATTEMPTS} attempts in {int(bad_B.sum())} sample(s); "
        "the initial data are too extreme for the scheme"
    )


def _tiled_step(
    scheme: S, q_CBXY: Tensor, w_CBXY: Tensor, step_B: Tensor, spacing: float, slope_1BXY: Tensor | None
) -> Tensor:
    """One step, tile by tile."""
    q_next = torch.empty_like(q_CBXY)
    for samples, rows in _tiles(q_CBXY):
        stop = rows.stop
        q_next[:, samples, rows] = scheme.tile(samples, rows).advance(
            q_CBXY[:, samples, rows],
            w_CBXY[:, samples, rows.start : stop + 2 * G],
            step_B[samples],
            spacing,
            None if slope_1BXY is None else slope_1BXY[:, samples, rows.start : stop + 2],
        )
    return q_next


def _tiles(q_CBXY: Tensor) -> Iterator[tuple[slice, slice]]:
    """Blocks of whole samples, or of rows of one sample where a sample is larger than a tile."""
    _, b, x, y = q_CBXY.shape
    cells = TILE_CELLS if q_CBXY.device.type == "cpu" else b * x * y
    rows = min(x, max(1, cells // y))
    samples = max(1, cells // (x * y))
    for first in range(0, b, samples):
        for row in range(0, x, rows):
            yield slice(first, min(first + samples, b)), slice(row, min(row + rows, x))
