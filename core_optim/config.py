"""What a config file says about optimisation; plain data, checked where it is made.

Example:
    ```yaml
    optim:
      lr: 5.0e-4
      weight_decay: 0.1
      schedule: {name: cosine, warmup_ratio: 0.05}
      groups:
        - {name: no_decay, pattern: 'bias', weight_decay: 0.0}
    ```
    ```yaml
    optim:
      name: muon
      lr: 2.0e-2
      options: {adjust_lr: original}
      fallback: {lr: 1.0e-3}
    ```

The classes have no slots: jsonargparse reads default instances through their ``__dict__``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal, get_args


def _require(condition: bool, owner: str, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{owner}: {name} is {value!r}, allowed: {allowed}")


def _check_hyperparameters(
    owner: str,
    lr: float | None,
    weight_decay: float | None,
    betas: tuple[float, float] | None,
    eps: float | None,
) -> None:
    _require(lr is None or lr >= 0.0, owner, "lr", lr, "a number >= 0")
    _require(
        weight_decay is None or weight_decay >= 0.0, owner, "weight_decay", weight_decay, "a number >= 0"
    )
    if betas is not None:
        good = len(betas) == 2 and all(0.0 <= beta < 1.0 for beta in betas)
        _require(good, owner, "betas", betas, "two numbers in [0, 1)")
    _require(eps is None or eps > 0.0, owner, "eps", eps, "a number > 0")


Kind = Literal["norm", "bias", "embedding", "head", "table", "lora_a", "lora_b", "vector", "matrix", "conv"]
"""What a parameter is for, told by its module (``thalweg.core_optim.kinds``)."""


@dataclass(frozen=True, kw_only=True)
class GroupRule:
    """Parameters that match a pattern and a kind form one group; of several matching rules the first wins."""

    name: str
    """Name of the group in tables and logs, unique within one optimizer."""
    pattern: str = ""
    """Regular expression searched anywhere in a parameter's full name; anchor it with ^ and $ if needed."""
    kind: Kind | None = None
    """What the parameters are for, as their modules tell; alone or together with a pattern."""
    rule: str | None = None
    """Algorithm of the group; the optimizer's own if not given."""
    lr: float | None = None
    """Peak learning rate of the group; the optimizer's own if not given, or that of its own rule."""
    weight_decay: float | None = None
    """Weight decay of the group; the optimizer's own if not given."""
    betas: tuple[float, float] | None = None
    """Moment coefficients of the group; the optimizer's own if not given."""
    eps: float | None = None
    """Term added to the denominator in this group; the optimizer's own if not given."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further options of the algorithm for this group, e.g. heads of Muon or block of Adam-mini."""
    optional: bool = False
    """Accept a rule that matches no parameter, which otherwise is an error."""

    def __post_init__(self) -> None:
        """Check the values."""
        owner = f"group rule {self.name!r}"
        _require(bool(self.name), owner, "name", self.name, "a non-empty text")
        _check_hyperparameters(owner, self.lr, self.weight_decay, self.betas, self.eps)
        if not self.pattern and self.kind is None:
            allowed = ", ".join(get_args(Kind))
            raise ValueError(f"{owner} has neither a pattern nor a kind (allowed: {allowed})")
        try:
            re.compile(self.pattern)
        except re.error as err:
            raise ValueError(
                f"{owner}: pattern {self.pattern!r} is not a regular expression ({err})"
            ) from None


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Factor on every group's learning rate as a function of the optimizer step."""

    name: Literal[
        "cosine",
        "linear",
        "linear-to-zero",
        "one-minus-sqrt",
        "power",
        "inverse-sqrt",
        "cyclic",
        "wsd",
        "constant",
    ] = "cosine"
    """What follows the warm-up; thalweg.core_optim.schedules has the formulas."""
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up from 0; excludes warmup_ratio."""
    warmup_ratio: float = 0.0
    """Warm-up as a share of all optimizer steps, rounded up; excludes warmup_steps."""
    final_ratio: float = 0.0
    """Factor reached at the last step (inverse-sqrt: the least factor), as a share of the peak; constant
    ignores it and linear-to-zero takes 0 alone."""
    decay_ratio: float = 0.2
    """Share of all optimizer steps that wsd spends decaying; other schedules ignore it."""
    decay_shape: Literal["linear", "cosine", "sqrt"] = "linear"
    """Curve of each decay of wsd and cyclic; sqrt is 1 - sqrt(progress) of Haegele et al. (2024)."""
    power: float = 2.0
    """Exponent of power: 1 is a straight line, more falls faster at first."""
    timescale: int = 0
    """Steps after which inverse-sqrt has fallen to 1 / sqrt(2); 0 takes the warm-up's, at least one."""
    cycles: int = 4
    """Equal cycles of cyclic, each falling from the peak to final_ratio."""
    cycle_rise: float = 0.0
    """Share of each cycle of cyclic, the first apart, that climbs back to the peak in a straight line: 0
    restarts at once, 0.5 makes triangles."""

    def __post_init__(self) -> None:
        """Check the values."""
        owner = f"schedule {self.name!r}"
        _require(self.warmup_steps >= 0, owner, "warmup_steps", self.warmup_steps, "an integer >= 0")
        for name in ("warmup_ratio", "final_ratio", "decay_ratio"):
            value = getattr(self, name)
            _require(0.0 <= value <= 1.0, owner, name, value, "a number in [0, 1]")
        _require(self.power > 0.0, owner, "power", self.power, "a number > 0")
        _require(self.timescale >= 0, owner, "timescale", self.timescale, "an integer >= 0")
        _require(self.cycles >= 1, owner, "cycles", self.cycles, "an integer >= 1")
        _require(0.0 <= self.cycle_rise < 1.0, owner, "cycle_rise", self.cycle_rise, "a number in [0, 1)")
        if self.name == "linear-to-zero":
            _require(self.final_ratio == 0.0, owner, "final_ratio", self.final_ratio, "0")
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError(
                f"{owner}: warmup_steps ({self.warmup_steps}) and warmup_ratio ({self.warmup_ratio}) exclude"
                " each other"
            )


@dataclass(frozen=True, kw_only=True)
class AlgorithmConfig:
    """An algorithm with its options."""

    name: str = "adamw"
    """Algorithm; ``thalweg optim list`` shows all of them."""
    lr: float | None = None
    """Peak learning rate; the algorithm's own default if not given."""
    weight_decay: float = 0.0
    """Weight decay; ``thalweg optim explain NAME`` says how it enters."""
    betas: tuple[float, float] | None = None
    """Decay rates of the first and second moment; the algorithm's own if not given."""
    eps: float | None = None
    """Term added to the denominator, in the units of a gradient; the algorithm's own if not given."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further options of the algorithm, and those of all: cautious, decay, maximize, state_dtype,
    stochastic_rounding, complex."""

    def __post_init__(self) -> None:
        """Check the values."""
        _check_hyperparameters(f"optimizer {self.name!r}", self.lr, self.weight_decay, self.betas, self.eps)


@dataclass(frozen=True, kw_only=True)
class FallbackConfig(AlgorithmConfig):
    """Algorithm of what the optimizer's own is not for: with Muon and SWAN all but hidden matrices."""


@dataclass(frozen=True, kw_only=True)
class SAMConfig:
    """Sharpness-aware minimisation around the optimizer; each step evaluates the loss twice."""

    rho: float = 0.05
    """Distance to the worst place near the weights."""
    adaptive: bool = False
    """Distances relative to the size of each weight (ASAM); wants about ten times the rho."""
    replay_random: bool = False
    """Let the second evaluation draw the same random numbers (dropout) as the first."""

    def __post_init__(self) -> None:
        """Check the values."""
        _require(self.rho >= 0.0, "sam", "rho", self.rho, "a number >= 0")


@dataclass(frozen=True, kw_only=True)
class OptimConfig(AlgorithmConfig):
    """Optimizer, its defaults, parameter groups and schedule."""

    kernel: Literal["auto", "fused", "foreach", "loop", "compile"] = "auto"
    """Implementation of elementwise updates; compile makes one pass over the memory."""
    seed: int = 0
    """Seed of optimizers that draw random numbers."""
    fallback: FallbackConfig = field(default_factory=FallbackConfig)
    """Algorithm of the parameters that the optimizer's own is not for."""
    sam: SAMConfig | None = None
    """Sharpness-aware minimisation around the optimizer."""
    groups: list[GroupRule] = field(default_factory=list)
    """Rules tried in this order, before the rules that the module brings along."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Learning-rate schedule, one factor for all groups."""
