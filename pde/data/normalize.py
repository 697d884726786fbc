"""Normalisation of fields: one object per data set, shared by training, validation and test.

    normalised = (field - shift - mean) / std,    per channel

`shift` is a constant taken off first (the mean pressure of the compressible sets). Functions take numpy
arrays and torch tensors alike, with axes (..., C, H, W).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from thalweg.pde.problem import Channel, ProblemSpec

if TYPE_CHECKING:
    from thalweg.pde.data.trajectories import TrajectoryReader

Mode = Literal["auto", "published", "file", "compute"]
FieldT = TypeVar("FieldT")

# Statistics are taken over at most this many training trajectories, spread evenly.
_COMPUTE_SAMPLES = 256


def _per_channel(values: np.ndarray, x: Any) -> Any:
    """Values (C,) as C 1 1 in the type, precision and place of x."""
    if isinstance(x, np.ndarray):
        return values.astype(x.dtype)[:, None, None]
    return x.new_tensor(values)[:, None, None]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Normalizer:
    """Constants of a data set's input and output channels, each of shape (C,)."""

    input_shift: np.ndarray
    """Taken off input channels first."""
    input_mean: np.ndarray
    """Mean of input channels after the shift."""
    input_std: np.ndarray
    """Standard deviation of input channels."""
    output_shift: np.ndarray
    """Taken off output channels first."""
    output_mean: np.ndarray
    """Mean of output channels after the shift."""
    output_std: np.ndarray
    """Standard deviation of output channels."""
    origin: Literal["published", "file", "compute"]
    """Where the constants come from."""

    def normalize_inputs(self, x_BCHW: FieldT) -> FieldT:
        """Inputs as a network sees them."""
        return self._normalize(x_BCHW, self.input_shift + self.input_mean, self.input_std)

    def normalize_outputs(self, x_BCHW: FieldT) -> FieldT:
        """Labels as the loss sees them."""
        return self._normalize(x_BCHW, self.output_shift + self.output_mean, self.output_std)

    def denormalize_inputs(self, x_BCHW: FieldT) -> FieldT:
        """Inputs in physical units."""
        return self._denormalize(x_BCHW, self.input_shift + self.input_mean, self.input_std)

    def denormalize_outputs(self, x_BCHW: FieldT) -> FieldT:
        """Predictions or labels in physical units."""
        return self._denormalize(x_BCHW, self.output_shift + self.output_mean, self.output_std)

    @staticmethod
    def _normalize(x: Any, offset: np.ndarray, std: np.ndarray) -> Any:
        return (x - _per_channel(offset, x)) / _per_channel(std, x)

    @staticmethod
    def _denormalize(x: Any, offset: np.ndarray, std: np.ndarray) -> Any:
        return x * _per_channel(std, x) + _per_channel(offset, x)

    def as_dict(self) -> dict[str, Any]:
        """Constants as plain lists, for JSON."""
        names = ("input_shift", "input_mean", "input_std", "output_shift", "output_mean", "output_std")
        return {**{name: getattr(self, name).tolist() for name in names}, "origin": self.origin}


def normalizer_for(
    spec: ProblemSpec,
    file_constants: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
    mode: Mode = "auto",
    reader: TrajectoryReader | None = None,
) -> Normalizer:
    """Normaliser of a data set.

    Args:
        spec: the data set.
        file_constants: ``{"inputs": {channel: [mean, std]}, "outputs": {...}}`` stored by our generators.
        mode: ``published`` constants (for released networks), those of the ``file``, ``compute`` them from
            the training part, or ``auto``: the file's if it has them, else the published ones
            (computed for formats without published constants).
        reader: needed by ``compute``.

    Raises:
        ValueError: the file has no constants, or lacks those of a stored channel.
    """
    if mode == "auto":
        # Files of The Well and PDEBench are described on the fly; nothing is published for them here.
        foreign = spec.layout in ("well", "pdebench") and reader is not None
        mode = "file" if file_constants is not None else "compute" if foreign else "published"
    if mode == "published":
        return _build(_published(spec.inputs), _published(spec.outputs), mode)
    if mode == "file":
        if file_constants is None:
            raise ValueError(f"the file of {spec.name} stores no normalisation constants; use 'published'")
        return _build(
            _from_file(spec.inputs, file_constants.get("inputs", {}), spec.name),
            _from_file(spec.outputs, file_constants.get("outputs", {}), spec.name),
            mode,
        )
    if mode != "compute":
        raise ValueError(f"normalization {mode!r} is unknown; choose auto, published, file or compute")
    if reader is None:
        raise ValueError("normalization 'compute' needs a reader")
    return _build(_measured(spec.inputs, reader, True), _measured(spec.outputs, reader, False), mode)


Row = tuple[float, float, float]


def _build(
    inputs: list[Row], outputs: list[Row], origin: Literal["published", "file", "compute"]
) -> Normalizer:
    into = np.array(inputs, np.float64).T
    out = np.array(outputs, np.float64).T
    return Normalizer(
        input_shift=into[0],
        input_mean=into[1],
        input_std=into[2],
        output_shift=out[0],
        output_mean=out[1],
        output_std=out[2],
        origin=origin,
    )


def _published(channels: Sequence[Channel]) -> list[Row]:
    return [(channel.shift, channel.mean, channel.std) for channel in channels]


def _from_file(channels: Sequence[Channel], stored: Mapping[str, Sequence[float]], name: str) -> list[Row]:
    rows = []
    for channel in channels:
        if channel.name in stored:
            mean, std = stored[channel.name]
            rows.append((0.0, float(mean), float(std) or 1.0))
        elif channel.variable is None:
            # Channels that are not in the file keep their constants.
            rows.append((channel.shift, channel.mean, channel.std))
        else:
            raise ValueError(
                f"the constants in the file of {name} lack channel {channel.name!r}, found {sorted(stored)}"
            )
    return rows


def _measured(channels: Sequence[Channel], reader: TrajectoryReader, inputs: bool) -> list[Row]:
    train = reader.splits.train
    samples = np.unique(np.linspace(0, train - 1, min(train, _COMPUTE_SAMPLES)).astype(np.int64))
    total, squares, count = np.zeros(len(channels)), np.zeros(len(channels)), 0
    frames = range(reader.frames)
    for sample in samples.tolist():
        if inputs:
            block = np.stack([reader.inputs([sample], frame)[0] for frame in frames])
        else:
            block = reader.outputs([sample], frames)[0]
        values = block.astype(np.float64)
        total += values.sum(axis=(0, 2, 3))
        squares += (values**2).sum(axis=(0, 2, 3))
        count += values[:, 0].size
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0.0))
    rows = []
    for channel, m, s in zip(channels, mean.tolist(), std.tolist()):
        # A channel that is not in the file, or is the same everywhere, has no scale of its own.
        keep = channel.variable is None or s <= 1e-12 * max(1.0, abs(m))
        rows.append((channel.shift, channel.mean, channel.std) if keep else (0.0, m, s))
    return rows
