"""Change of variables between what networks predict.

With x = alpha x0 + sigma e, an output o is one of

======  =======================  =======================================  ===============================
kind    o                        noise e                                  data x0
======  =======================  =======================================  ===============================
noise   e                        o                                        (x - sigma o) / alpha
data    x0                       (x - alpha o) / sigma                    o
v       alpha e - sigma x0       (alpha o + sigma x) / (a^2 + s^2)        (alpha x - sigma o) / (a^2 + s^2)
edm     sigma x0 - alpha e       (sigma x - alpha o) / (a^2 + s^2)        (alpha x + sigma o) / (a^2 + s^2)
score   -e / sigma               -sigma o                                 (x + sigma^2 o) / alpha
flow    e - x0                   (x + alpha o) / (alpha + sigma)          (x - sigma o) / (alpha + sigma)
======  =======================  =======================================  ===============================

which holds for any alpha and sigma; a^2 + s^2 = 1 on variance preserving schedules (v: Salimans and Ho 2022;
edm is -v) and alpha + sigma = 1 on rectified flow. alpha and sigma are numbers or tensors that broadcast
against x.
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

Kind = Literal["noise", "data", "v", "edm", "score", "flow"]
Level = float | Tensor

KINDS: tuple[str, ...] = get_args(Kind)


def to_data(output: Tensor, x: Tensor, alpha: Level, sigma: Level, kind: Kind) -> Tensor:
    """Data x0 that a network's output implies.

    Raises:
        ValueError: For an unknown kind, or noise and score at alpha = 0, where they say nothing about the
            data.
    """
    if kind == "data":
        return output
    if kind == "v":
        return (alpha * x - sigma * output) / (alpha**2 + sigma**2)
    if kind == "edm":
        return (alpha * x + sigma * output) / (alpha**2 + sigma**2)
    if kind == "flow":
        return (x - sigma * output) / (alpha + sigma)
    _check(kind)
    _check_level("alpha", alpha, f"{kind} to data")
    noise = output if kind == "noise" else -sigma * output
    return (x - sigma * noise) / alpha


def to_noise(output: Tensor, x: Tensor, alpha: Level, sigma: Level, kind: Kind) -> Tensor:
    """Noise that a network's output implies.

    Raises:
        ValueError: For an unknown kind, or data at sigma = 0, where it says nothing about the noise.
    """
    if kind == "noise":
        return output
    if kind == "v":
        return (alpha * output + sigma * x) / (alpha**2 + sigma**2)
    if kind == "edm":
        return (sigma * x - alpha * output) / (alpha**2 + sigma**2)
    if kind == "flow":
        return (x + alpha * output) / (alpha + sigma)
    if kind == "score":
        return -sigma * output
    _check(kind)
    _check_level("sigma", sigma, "data to noise")
    return (x - alpha * output) / sigma


def from_data(data: Tensor, x: Tensor, alpha: Level, sigma: Level, kind: Kind) -> Tensor:
    """Output of a given kind that implies the data x0.

    Raises:
        ValueError: For an unknown kind, or any kind but data at sigma = 0.
    """
    _check(kind)
    if kind == "data":
        return data
    _check_level("sigma", sigma, f"data to {kind}")
    noise = (x - alpha * data) / sigma
    return from_pair(data, noise, alpha, sigma, kind)


def from_pair(data: Tensor, noise: Tensor, alpha: Level, sigma: Level, kind: Kind) -> Tensor:
    """Output of a given kind for a pair of data and noise: the target of training.

    Raises:
        ValueError: For an unknown kind, or score at sigma = 0.
    """
    _check(kind)
    if kind == "data":
        return data
    if kind == "noise":
        return noise
    if kind == "v":
        return alpha * noise - sigma * data
    if kind == "edm":
        return sigma * data - alpha * noise
    if kind == "flow":
        return noise - data
    _check_level("sigma", sigma, "noise to score")
    return -noise / sigma


def convert(output: Tensor, x: Tensor, alpha: Level, sigma: Level, kind: Kind, wanted: Kind) -> Tensor:
    """Output of one kind as the output of another.

    Raises:
        ValueError: For an unknown kind, or where the output does not determine the wanted one.
    """
    if kind == wanted:
        _check(kind)
        return output
    if wanted == "data":
        return to_data(output, x, alpha, sigma, kind)
    noise = to_noise(output, x, alpha, sigma, kind)
    if wanted in ("noise", "score"):
        return from_pair(output, noise, alpha, sigma, wanted)
    return from_pair(to_data(output, x, alpha, sigma, kind), noise, alpha, sigma, wanted)


def _check(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"prediction {kind!r} is not known; known: {', '.join(KINDS)}")


def _check_level(name: str, level: Level, what: str) -> None:
    """Refuse a division by zero where it can be seen without waiting for a device."""
    if not isinstance(level, Tensor) and level == 0:
        raise ValueError(f"{what} is not determined at {name} = 0")
