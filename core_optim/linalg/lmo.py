"""Linear minimisation oracles of Scion: the steepest direction of size 1 in a norm, and initial weights.

Shapes: weights are (out, in, ...).  Source: Pethick et al. 2025, arXiv:2502.07529, table 2, and
LIONS-EPFL/scion.  Norms and their settings:

    Spectral      orthogonal matrix times sqrt(out / in)                  max, normalized, steps
    SpectralConv  the same on (out, rest), divided by the kernel's size   steps
    Sign          sign(m) / in                                            normalized
    ColNorm       columns of root mean square 1 (normalized: over in)     normalized, transpose
    RowNorm       rows of 2-norm 1 / sqrt(in)                             normalized, transpose
    BiasRMS       entries of root mean square 1
    Auto          by dimensions: BiasRMS for 0 and 1, Spectral for 2, SpectralConv for more
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from thalweg.core_optim.linalg.newton_schulz import orthogonalise

SETTINGS: dict[str, dict[str, Any]] = {
    "Auto": {},
    "Spectral": {"max": False, "normalized": True, "steps": 5},
    "SpectralConv": {"steps": 5},
    "Sign": {"normalized": True},
    "ColNorm": {"normalized": False, "transpose": False},
    "RowNorm": {"normalized": True, "transpose": False},
    "BiasRMS": {},
}
"""Norms, with their settings and defaults."""

EPS = 1e-8
"""Added to sizes before dividing, as published."""


def settings(norm: str, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """All settings of a norm.

    Raises:
        ValueError: For an unknown norm or setting.
    """
    if norm not in SETTINGS:
        raise ValueError(f"norm is {norm!r}, allowed: {', '.join(SETTINGS)}")
    known = SETTINGS[norm]
    for key, value in (given or {}).items():
        if key not in known or type(value) is not type(known[key]) or (key == "steps" and value < 1):
            names = ", ".join(f"{k} ({type(v).__name__})" for k, v in known.items()) or "none"
            raise ValueError(f"norm_kwargs of {norm} has {key}: {value!r}, allowed: {names}")
    return {**known, **(given or {})}


def resolve(norm: str, ndim: int) -> str:
    """The norm that stands behind ``Auto`` for a number of dimensions."""
    if norm != "Auto":
        return norm
    return "BiasRMS" if ndim < 2 else "Spectral" if ndim == 2 else "SpectralConv"


def unsuitable(norm: str, shape: Sequence[int]) -> str | None:
    """Why a norm does not fit a shape, or None."""
    if norm == "SpectralConv":
        few = len(shape) < 3
        return f"SpectralConv is for kernels of 3 or more dimensions, not {len(shape)}" if few else None
    if norm in ("Spectral", "ColNorm", "RowNorm", "Sign") and len(shape) != 2:
        return f"{norm} is for matrices, not for {len(shape)} dimensions"
    return None


def directions(
    momenta: Sequence[Tensor], norm: str, given: Mapping[str, Any] | None, ns_dtype: str
) -> list[Tensor]:
    """Steepest directions of several tensors in one norm, spectral ones in batches of one shape.

    Args:
        momenta: Tensors.
        norm: Key of ``SETTINGS``.
        given: Settings that differ from the defaults.
        ns_dtype: Number type of the Newton-Schulz iteration.
    """
    options = settings(norm, given)
    kinds = [resolve(norm, m.ndim) for m in momenta]
    spectral = [n for n, kind in enumerate(kinds) if kind.startswith("Spectral")]
    found = list(momenta)
    for n, kind in enumerate(kinds):
        if n not in spectral:
            found[n] = _entrywise(momenta[n], kind, options)
    flat = [momenta[n].reshape(momenta[n].shape[0], -1) for n in spectral]
    for n, o in zip(spectral, orthogonalise(flat, ns_dtype, steps=options.get("steps", 5))):
        found[n] = o.reshape(momenta[n].shape) * spectral_scale(momenta[n].shape, kinds[n], options)
    return found


def spectral_scale(shape: Sequence[int], kind: str, options: Mapping[str, Any]) -> float:
    """Factor on an orthogonal matrix or kernel."""
    if kind == "SpectralConv":
        return math.sqrt(shape[0] / shape[1]) / math.prod(shape[2:])
    scale = math.sqrt(shape[0] / shape[1]) if options.get("normalized", True) else math.sqrt(shape[0])
    return max(1.0, scale) if options.get("max", False) else scale


def _entrywise(m: Tensor, kind: str, options: Mapping[str, Any]) -> Tensor:
    if kind == "BiasRMS":
        return m / (m.square().mean().sqrt() + EPS) if m.ndim == 0 else m / (_rms(m, 0) + EPS)
    if kind == "Sign":
        return m.sign() / (m.shape[1] if options["normalized"] else 1)
    x = m.mT if options["transpose"] else m
    if kind == "ColNorm":
        size = _rms(x, 0) * (x.shape[1] if options["normalized"] else 1)
    else:
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        size = size * (math.sqrt(x.shape[1]) if options["normalized"] else 1)
    x = x / (size + EPS)
    return x.mT if options["transpose"] else x


def _rms(x: Tensor, dim: int) -> Tensor:
    return x.square().mean(dim, keepdim=True).sqrt()


@torch.no_grad()
def init_(
    weight: Tensor,
    norm: str = "Auto",
    given: Mapping[str, Any] | None = None,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fill a weight with a random point of size 1 in a norm, in place (zeros for BiasRMS).

    Args:
        weight: Parameter.
        norm: Key of ``SETTINGS``.
        given: Settings that differ from the defaults.
        generator: Source of randomness.

    Raises:
        ValueError: If the norm is unknown or does not fit the shape.
    """
    options = settings(norm, given)
    kind = resolve(norm, weight.ndim)
    if reason := unsuitable(kind, weight.shape):
        raise ValueError(reason)
    if kind == "BiasRMS":
        return weight.zero_()
    draw = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    if kind == "Sign":
        draw = torch.where(draw < 0, -1.0, 1.0) / (weight.shape[1] if options["normalized"] else 1)
    elif kind.startswith("Spectral"):
        flat = draw.view(*weight.shape[:2], -1)
        for k in range(flat.shape[2]):
            kernel = torch.empty(weight.shape[:2], dtype=torch.float64)
            flat[:, :, k] = nn.init.orthogonal_(kernel, generator=generator)
        draw *= spectral_scale(weight.shape, kind, options)
    else:
        draw = _entrywise(draw, kind, options)
    return weight.copy_(draw)
