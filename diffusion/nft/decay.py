"""How slowly the sampling policy and the average follow the trained one, by optimizer steps.

theta_old <- eta theta_old + (1 - eta) theta, once per epoch, after its optimizer steps. The schedule is asked
with the number of optimizer steps made so far, so its first argument is the number of steps of an epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Decay:
    """A decay of 0 for some steps that then rises linearly to a limit: min(rate (i - flat), cap).

    Raises:
        ValueError: For numbers with which it leaves [0, 1].
    """

    flat: int = 0
    """Optimizer steps at decay 0."""
    rate: float = 0.0
    """What it rises by at each step."""
    cap: float = 0.0
    """Its limit; 1 would freeze the sampling policy."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.flat < 0:
            raise ValueError(f"flat is {self.flat}, allowed: 0 and more")
        if self.rate < 0:
            raise ValueError(f"rate is {self.rate}, allowed: 0 and more")
        if not 0 <= self.cap < 1:
            raise ValueError(f"cap is {self.cap}, allowed: 0 to below 1")

    def __call__(self, steps: int) -> float:
        """Decay after a number of optimizer steps."""
        return min(self.rate * max(steps - self.flat, 0), self.cap)


DECAYS: dict[str, Decay] = {
    "hard_copy": Decay(),
    "linear_to_0_5": Decay(rate=0.001, cap=0.5),
    "delayed_linear_to_0_999": Decay(flat=75, rate=0.0075, cap=0.999),
}
"""The published schedules: on-policy, that of most runs, that of OCR."""

DECAY_TYPES: dict[int, str] = {0: "hard_copy", 1: "linear_to_0_5", 2: "delayed_linear_to_0_999"}
"""Their numbers in the authors' configurations (decay_type)."""


def decay(which: str | int | Decay) -> Decay:
    """A schedule by its name or the authors' number; schedules are returned as they are.

    Raises:
        ValueError: For another name or number.
    """
    if isinstance(which, Decay):
        return which
    name = DECAY_TYPES.get(which) if isinstance(which, int) else which
    if name not in DECAYS:
        numbered = ", ".join(f"{name} ({number})" for number, name in DECAY_TYPES.items())
        raise ValueError(f"decay is {which!r}, allowed: {numbered}")
    return DECAYS[name]


def ema_decay(steps: int, cap: float = 0.9) -> float:
    """Decay of the average used for evaluation, min((1 + i) / (10 + i), cap), after i optimizer steps."""
    return min((1 + steps) / (10 + steps), cap)


def polyak_(old: Sequence[Tensor], new: Sequence[Tensor], eta: float) -> None:
    """Move tensors in place: old <- eta old + (1 - eta) new; exactly new where eta is 0.

    Raises:
        ValueError: If eta is outside [0, 1], or tensors are as many or as precise as they should not be:
            in half precision an average of many steps would not move.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}, allowed: 0 to 1")
    if len(old) != len(new):
        raise ValueError(f"{len(old)} tensors cannot follow {len(new)}")
    if half := sorted({str(a.dtype) for a in old if a.dtype.itemsize < 4}):
        raise ValueError(f"averages are kept in float32 or float64, found {', '.join(half)}")
    with torch.no_grad():
        torch._foreach_lerp_(list(old), list(new), 1 - eta)
