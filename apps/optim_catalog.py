"""What ``thalweg optim`` shows, as data: every rule of the registry, the wrappers and the schedules."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

EXAMPLE = (512, 2048)
"""Shape of the matrix for which states are listed."""


@dataclass(frozen=True)
class Entry:
    """A row of the table."""

    name: str
    title: str
    """Importable from thalweg.core_optim."""
    kind: str
    state: str
    """In multiples of the parameters."""
    decay: str
    source: str
    summary: str


@dataclass(frozen=True)
class Wrapper:
    """A method around an optimizer or a training loop."""

    target: str
    """Module under thalweg.core_optim, and class or function."""
    kind: str
    state: str
    source: str
    decay: str = "of its base"
    theory: str = ""
    """Module under thalweg.core_optim whose first lines have the equations, if the class has not."""

    def load(self) -> Any:
        """The class or function."""
        module, _, name = self.target.partition(":")
        return getattr(importlib.import_module(f"thalweg.core_optim.{module}"), name)

    def about(self) -> str:
        """Equations and description, without the arguments."""
        parts = [inspect.getdoc(self.load()) or ""]
        if self.theory:
            module = importlib.import_module(f"thalweg.core_optim.{self.theory}")
            parts.insert(0, (inspect.getdoc(module) or "").partition("\n\nShapes:")[0])
        shown = (part.partition("\nArgs:")[0].partition("\nRaises:")[0] for part in parts)
        return "\n\n".join(map(str.rstrip, shown))


WRAPPERS = {
    "sam": Wrapper(
        "sam:SAM",
        "wrapper, 2 gradients a step",
        "base + 1 during a step",
        "Foret et al. 2021, arXiv:2010.01412; ASAM: Kwon et al. 2021, arXiv:2102.11600",
    ),
    "saf": Wrapper(
        "trajectory_store:TrajectoryStore",
        "loss term, outputs of past epochs",
        "outputs of a few epochs, on the host",
        "Du et al. 2022, arXiv:2205.14083",
        theory="trajectory",
    ),
    "mesa": Wrapper(
        "trajectory:distance_to_past",
        "loss term, outputs of averaged weights",
        "1",
        "Du et al. 2022, arXiv:2205.14083",
        theory="trajectory",
    ),
    "mezo": Wrapper(
        "mezo:MeZO",
        "forward passes, 2 a step",
        "0",
        "Malladi et al. 2023, arXiv:2305.17333; code princeton-nlp/MeZO",
        "with the update",
    ),
    "zo2": Wrapper(
        "zo2:ZO2",
        "forward passes, blocks streamed",
        "0, one block on the device",
        "Wang et al. 2025, arXiv:2503.12668; code liangyuwang/zo2",
        "with the update",
    ),
    "ema": Wrapper("ema:EMA", "average of weights", "1 fp32", "Polyak & Juditsky 1992; timm, torch", "-"),
    "power-ema": Wrapper(
        "ema:PowerEMA",
        "averages of weights",
        "1 fp32 per profile",
        "Karras et al. 2024, arXiv:2312.02696",
        "-",
    ),
}
"""Name -> method that works on top of the rules."""

SCHEDULES = {
    "cosine": ("f + (1 - f) (1 + cos(pi s)) / 2", "", "Loshchilov & Hutter 2017"),
    "linear": ("f + (1 - f) (1 - s)", "", ""),
    "linear-to-zero": ("1 - s", "f must be 0", "Zamani & Glineur 2023, Defazio et al. 2023"),
    "one-minus-sqrt": ("f + (1 - f) (1 - sqrt(s))", "", "Hägele et al. 2024"),
    "power": ("f + (1 - f) (1 - s)^power", "power", ""),
    "inverse-sqrt": ("max(f, sqrt(T / (T + step - w)))", "timescale T; 0 takes w", "Vaswani et al. 2017"),
    "cyclic": (
        "k equal cycles, each from 1 to f",
        "cycles k, decay_shape, cycle_rise",
        "Loshchilov & Hutter 2017, Smith 2017",
    ),
    "wsd": ("1, then from 1 to f at the end of the run", "decay_ratio, decay_shape", "Hu et al. 2024"),
    "constant": ("1", "", ""),
}
"""Name -> factor after the warm-up, its options, source."""
LEGEND = "with warm-up over w of n steps, f = final_ratio, s = (step - w) / (n - w); warm-up: step / w"


def rules() -> list[Entry]:
    """Every rule of the registry, in its order."""
    from thalweg.core_optim import registry

    return [_entry(registry.rule(name)) for name in registry.RULES]


def wrappers() -> list[Entry]:
    """Methods around the rules."""
    return [
        Entry(
            name,
            wrapper.target.partition(":")[2],
            wrapper.kind,
            wrapper.state,
            wrapper.decay,
            wrapper.source,
            (inspect.getdoc(wrapper.load()) or "").splitlines()[0],
        )
        for name, wrapper in WRAPPERS.items()
    ]


def _entry(rule: Any) -> Entry:
    from thalweg.core_optim.engine.rule import MatrixRule

    kind = "matrix" if isinstance(rule, MatrixRule) else "elements"
    if getattr(rule, "sums", False):
        kind = "elements and their sums"
    defaults = {name: option.default for name, option in rule.options.items()}
    decay = rule.way_of_decay(defaults) if "weight_decay" in rule.options else "-"
    return Entry(rule.name, rule.title, kind, rule.state_size, decay, rule.source, rule.summary)


def states(rule: Any, shape: Sequence[int] = EXAMPLE) -> list[tuple[str, str, str, float]]:
    """Name, shape, dtype and elements per element of each state of an fp32 parameter of a shape."""
    import torch

    from thalweg.core_optim.engine.groups import COMMON

    defaults = {name: option.default for name, option in {**COMMON, **rule.options}.items()}
    sizes = {"like": tuple(shape), "rows": (shape[0], 1)}
    found = []
    for name, spec in rule.states(torch.Size(shape), defaults).items():
        size = sizes[spec.shape] if isinstance(spec.shape, str) else tuple(spec.shape)
        dtype = str(spec.dtype or torch.float32).removeprefix("torch.")
        elements = torch.Size(size).numel() / torch.Size(shape).numel()
        found.append((name, " x ".join(map(str, size)) or "scalar", dtype, elements))
    return found


def markdown() -> str:
    """The table of the documentation; ``thalweg optim list --markdown`` prints it."""
    header = ["name", "class", "works on", "state x", "decay", "source"]
    rows = [
        [f"`{e.name}`", f"`{e.title}`", e.kind, e.state, e.decay, e.source] for e in (*rules(), *wrappers())
    ]
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
