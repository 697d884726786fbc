"""Strict loading with errors that people can act on."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

SHOWN = 4
"""Names listed per kind of mismatch before the message counts the rest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mismatch:
    """How a state dict differs from what a module holds."""

    missing: tuple[str, ...]
    """Names that the module has and the state lacks."""
    unexpected: tuple[str, ...]
    """Names that the state has and the module lacks."""
    reshaped: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    """Name, shape in the state and shape in the module."""

    def __bool__(self) -> bool:
        """True if there is any difference."""
        return bool(self.missing or self.unexpected or self.reshaped)

    def message(self) -> str:
        """All kinds of difference in one sentence, with examples and near matches."""
        parts = []
        if self.missing:
            parts.append(f"{len(self.missing)} tensors are missing ({_shorten(self.missing)})")
        if self.unexpected:
            listed = [_with_near_match(name, self.missing) for name in self.unexpected[:SHOWN]]
            rest = len(self.unexpected) - len(listed)
            more = f", and {rest} more" if rest else ""
            parts.append(
                f"{len(self.unexpected)} tensors are not part of the model ({', '.join(listed)}{more})"
            )
        if self.reshaped:
            listed = [f"{n} is {a} but the model has {b}" for n, a, b in self.reshaped]
            parts.append(f"{len(self.reshaped)} tensors have another shape ({_shorten(listed)})")
        return "; ".join(parts)


def compare(module: nn.Module, state: Mapping[str, Tensor]) -> Mismatch:
    """Difference between a state dict and the parameters and buffers of a module, without loading it."""
    own = module.state_dict()
    return Mismatch(
        missing=tuple(name for name in own if name not in state),
        unexpected=tuple(name for name in state if name not in own),
        reshaped=tuple(
            (name, tuple(value.shape), tuple(own[name].shape))
            for name, value in state.items()
            if name in own and value.shape != own[name].shape
        ),
    )


def load_strict(module: nn.Module, state: Mapping[str, Tensor], source: object) -> None:
    """Load a state dict that must match name for name and shape for shape.

    Args:
        module: Receives the values; left untouched on error.
        state: Tensors by name.
        source: What the tensors came from, for the message.

    Raises:
        ValueError: If anything is missing, left over or of another shape.
    """
    mismatch = compare(module, state)
    if mismatch:
        raise ValueError(f"{source} does not fit {type(module).__name__}: {mismatch.message()}")
    module.load_state_dict(state, strict=True)


def check_finite(state: Mapping[str, Tensor], source: object) -> None:
    """Refuse weights with NaN or infinity, which a diverged run or an uninitialised tensor leaves behind.

    Raises:
        ValueError: Naming the tensors.
    """
    bad = [name for name, value in state.items() if not bool(value.isfinite().all())]
    if bad:
        raise ValueError(f"{source} holds NaN or infinity in {len(bad)} tensors ({_shorten(bad)})")


def _shorten(names: Sequence[str]) -> str:
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f", and {rest} more" if rest > 0 else "")


def _with_near_match(name: str, candidates: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, candidates, n=1, cutoff=0.8)
    return f"{name}, perhaps {near[0]}" if near else name
