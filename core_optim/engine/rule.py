"""What an algorithm is to the engine: its options, its state and its update, and nothing else.

Two kinds. An :class:`ElementRule` works element by element, perhaps with sums over rows or a whole parameter;
it is written once and runs in a loop, on lists of tensors, compiled, and on shards. A :class:`MatrixRule`
sees whole parameters, many at a time, and batches them by shape itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from thalweg.core_optim.engine.options import BETAS, Option, at_least, more_than
from thalweg.core_optim.engine.random import Randomness
from thalweg.core_optim.engine.reduce import Context

Decay = Literal["coupled", "decoupled", "after", "independent", "corrected", "cautious"]
DECAYS: dict[str, str] = {
    "coupled": "g <- g + wd p, before everything else",
    "decoupled": "p <- p (1 - lr wd), before the update",
    "after": "p <- p (1 - lr wd), after the update",
    "independent": "p <- p (1 - wd), before the update",
    "corrected": "p <- p (1 - lr wd lr / lr_peak), before the update (Defazio 2025)",
    "cautious": "p <- p - lr wd p where update and p have the same sign",
}
"""Ways in which weight decay may enter, with their formulas."""


@dataclass(frozen=True)
class StateSpec:
    """One tensor of a parameter's state."""

    shape: Sequence[int] | Literal["like", "rows"] = "like"
    """Like the parameter, one number per row, or a shape."""
    dtype: torch.dtype | None = None
    """Fixed dtype; None follows the option ``state_dtype``."""
    fill: float = 0.0
    """Initial value."""


LIKE = StateSpec()
"""State in the shape of the parameter that starts at zero."""


class Rule:
    """An algorithm. Instances hold nothing; all that changes is in the state of the parameters."""

    name: ClassVar[str]
    """Key in configs and tables."""
    title: ClassVar[str]
    """Name of the importable class."""
    summary: ClassVar[str] = ""
    """One line."""
    source: ClassVar[str] = ""
    """Paper and official code."""
    equations: ClassVar[str] = ""
    """Update in plain text."""
    state_size: ClassVar[str] = ""
    """State in multiples of the parameter's size, for tables."""
    decay: ClassVar[Decay] = "decoupled"
    """How weight decay enters unless the user says otherwise."""
    options: ClassVar[Mapping[str, Option]] = {}
    """Options beside the common ones."""

    outside: ClassVar[Mapping[str, Any] | None] = None
    """For algorithms of hidden matrices: options of the group with all else; empty for the fallback."""

    def states(self, shape: torch.Size, o: Mapping[str, Any]) -> dict[str, StateSpec]:
        """State of a parameter of a shape."""
        raise NotImplementedError

    def state_elements(
        self, shapes: Sequence[torch.Size], o: Mapping[str, Any]
    ) -> list[dict[str, StateSpec]]:
        """State of all parameters of a group after a step, if it is not the one they start with."""
        return [self.states(shape, o) for shape in shapes]

    def refuse(self, parameter: Tensor, o: Mapping[str, Any]) -> str | None:
        """Why a parameter cannot be handled, or None."""
        return None

    def scalars(self, t: int, o: Mapping[str, Any]) -> dict[str, float]:
        """Numbers that depend on the step t, from 1. ``step_scale`` multiplies the learning rate."""
        return {}

    def begin(self, group: dict[str, Any], slots: Sequence[Any]) -> dict[str, Any]:
        """Once per step and group, before any update; may keep numbers in the group.

        Args:
            group: Options.
            slots: Parameters that have a gradient, as ``buckets.Slot``.

        Returns:
            More scalars.
        """
        return {}

    def way_of_decay(self, o: Mapping[str, Any]) -> Decay:
        """How weight decay enters unless the option ``decay`` says otherwise."""
        return self.decay

    def decays(self, shape: torch.Size, o: Mapping[str, Any]) -> bool:
        """Whether weight decay applies to a parameter of a shape."""
        return True

    def shrink(self, lr: float, o: Mapping[str, Any]) -> float | None:
        """Factor on the parameter before the update, in the place of weight decay; None for none."""
        return None


class ElementRule(Rule):
    """A rule on elements, written on flat or (rows, rest) views of a tensor or of a list of tensors."""

    view: ClassVar[Literal["flat", "rows"]] = "flat"
    """Shape in which parameters, gradients and states arrive."""
    sums: ClassVar[bool] = False
    """Whether it asks the context for sums, which a shard alone cannot give."""
    moduli: ClassVar[bool] = False
    """Whether a turned phase of all gradients turns the steps, with second moments of the modulus."""

    def variant(self, shape: torch.Size, o: Mapping[str, Any], t: int) -> str:
        """Name of a case by shape, options and step; parameters of one call are all of one case."""
        return ""

    def needs_sums(self, variant: str) -> bool:
        """Whether an update of a variant asks for sums."""
        return self.sums

    def case(self, slot: Any, o: Mapping[str, Any]) -> str:
        """The variant of a ``buckets.Slot``, for rules whose cases depend on more than the shape."""
        return self.variant(slot.parameter.shape, o, slot.t)

    def update(
        self, p: Tensor, g: Tensor, s: Mapping[str, Tensor], h: Mapping[str, Any], x: Context
    ) -> Tensor | tuple[Tensor, Tensor] | None:
        """Direction to subtract, times the learning rate, from p; changes the state in place.

        With a second result, weight decay is multiplied by it.

        Args:
            p: Parameter, not to be changed; a rule that does so anyway returns None.
            g: Gradient, not to be changed.
            s: State.
            h: Numeric options, ``beta1`` and ``beta2`` for betas, and the step's scalars.
            x: Options, variant and sums.
        """
        raise NotImplementedError


@dataclass
class Item:
    """One parameter as a matrix rule sees it: whole, plain and in fp32 or fp64."""

    p: Tensor
    """Parameter, not to be changed."""
    g: Tensor
    """Gradient, not to be changed."""
    s: dict[str, Tensor]
    """State; change it in place or put another tensor under a declared name."""
    t: int
    """Step of this parameter, from 1."""
    index: int
    """Number of the parameter in the optimizer."""
    name: str
    """Name of the parameter, for messages."""
    random: Randomness
    """Source of random numbers."""


class MatrixRule(Rule):
    """A rule on whole parameters; all those of a group arrive in one call."""

    def update(self, items: list[Item], h: Mapping[str, Any], o: Mapping[str, Any]) -> list[Tensor | None]:
        """Directions in the shapes of the parameters; None leaves a parameter as it is, decay included."""
        raise NotImplementedError


def adam_options(lr: float = 1e-3, eps: float = 1e-8, weight_decay: float = 0.0) -> dict[str, Option]:
    """The options of Adam and most of its relatives."""
    return {
        "lr": Option(lr, at_least(0.0), "learning rate"),
        "betas": Option((0.9, 0.999), BETAS, "decay rates of the first and second moment"),
        "eps": Option(eps, more_than(0.0), "term added to the denominator, in the units of a gradient"),
        "weight_decay": Option(weight_decay, at_least(0.0), "weight decay"),
    }


def bias_corrections(t: int, o: Mapping[str, Any]) -> dict[str, float]:
    """1 - beta1^t as ``bias1`` and the root of 1 - beta2^t as ``root_bias2``."""
    beta1, beta2 = o["betas"]
    return {"bias1": 1.0 - beta1**t, "root_bias2": (1.0 - beta2**t) ** 0.5}
