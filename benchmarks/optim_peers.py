"""What `optim_step.py` compares: for each of our rules the classes of the peers that have it.

A peer is listed where its rule is the same up to details that cost no time. Left out are Lion of heavyball,
which computes something else, and AdamMini of pytorch_optimizer, which asks for a model with the names of a
language model.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

Make = Callable[[list[torch.Tensor]], Optimizer]
EACH = ({"foreach": True}, {"foreach": False})
PO, TIMM, HEAVY = "pytorch_optimizer", "timm", "heavyball"


@dataclasses.dataclass(frozen=True)
class Peer:
    """A class of a library with the options that make it do what our rule does."""

    library: str
    target: str
    """Class name, after the module inside timm.optim for timm."""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    variants: tuple[Mapping[str, Any], ...] = ({},)
    """Modes, each timed."""
    group: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What the parameter group says."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One of our rules, how it is run here, and its peers."""

    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    peers: tuple[Peer, ...] = ()
    official_state: str = "2"
    """State in multiples of the parameters, as the official code keeps it."""
    matrices: bool = False
    """Run on the matrices of one block instead of the whole list."""
    period: int = 1
    """Steps after which the work repeats; the time is the mean over them."""


ELEMENTWISE = {
    "AdamW": Case(
        peers=(Peer(PO, "AdamW", variants=EACH), Peer(TIMM, "adamw:AdamWLegacy"), Peer(HEAVY, "AdamW"))
    ),
    "NAdamW": Case(peers=(Peer(TIMM, "nadamw:NAdamW", variants=EACH), Peer(HEAVY, "NAdam"))),
    "AdaBelief": Case(
        {"rectify": False},
        (
            Peer(PO, "AdaBelief", {"rectify": False}, EACH),
            Peer(TIMM, "adabelief:AdaBelief", {"rectify": False}, EACH),
        ),
    ),
    "DiffGrad": Case(peers=(Peer(PO, "DiffGrad", {"rectify": False}, EACH),), official_state="3"),
    "AdamP": Case(peers=(Peer(PO, "AdamP", variants=EACH), Peer(TIMM, "adamp:AdamP"))),
    "SGDP": Case(
        {"momentum": 0.9, "nesterov": True},
        (
            Peer(PO, "SGDP", {"momentum": 0.9, "nesterov": True}),
            Peer(TIMM, "sgdp:SGDP", {"momentum": 0.9, "nesterov": True}),
        ),
        "1",
    ),
    "SGDSaI": Case(
        {"momentum": 0.9}, (Peer(PO, "SGDSaI", {"momentum": 0.9}, EACH),), official_state="1 + a number each"
    ),
    "Lion": Case(
        peers=(Peer(PO, "Lion", variants=EACH), Peer(TIMM, "lion:Lion", variants=EACH)), official_state="1"
    ),
    "AdamMini": Case(official_state="1"),
    "MARS": Case(
        peers=(
            Peer(PO, "MARS", variants=EACH),
            Peer(TIMM, "mars:Mars"),
            Peer(HEAVY, "AdamW", {"mars": True}),
        ),
        official_state="3",
    ),
    "CAdamW": Case(
        peers=(
            Peer(TIMM, "adamw:AdamWLegacy", {"caution": True}),
            Peer(HEAVY, "AdamW", {"caution": True}),
        )
    ),
    "ScheduleFreeAdamW": Case(
        peers=(Peer(PO, "ScheduleFreeAdamW", variants=EACH), Peer(HEAVY, "SFAdamW")),
    ),
    "SGD": Case(
        {"momentum": 0.9},
        (Peer(PO, "SGDW", {"momentum": 0.9}, EACH), Peer(TIMM, "sgdw:SGDW", {"momentum": 0.9}, EACH)),
        "1",
    ),
}
MATRIX = {
    "Muon": Case(
        peers=(
            Peer(PO, "Muon", variants=EACH, group={"use_muon": True}),
            Peer(TIMM, "muon:Muon", {"nesterov": True}),
            Peer(HEAVY, "Muon"),
        ),
        official_state="1",
        matrices=True,
    ),
    "Scion": Case(peers=(Peer(PO, "SCION"), Peer(HEAVY, "Scion")), official_state="1", matrices=True),
    "SOAP": Case(
        {"precondition_frequency": 3},
        (Peer(PO, "SOAP", {"precondition_frequency": 3}), Peer(HEAVY, "SOAP", {"precondition_frequency": 3})),
        "2 + 2 sum d^2 / prod d",
        matrices=True,
        period=3,
    ),
    "Kron": Case(
        {"preconditioner_update_probability": 1.0},
        (
            Peer(PO, "Kron", {"pre_conditioner_update_probability": 1.0}),
            Peer(TIMM, "kron:Kron", {"preconditioner_update_probability": 1.0}),
            Peer(HEAVY, "PSGDKron", {"preconditioner_update_probability": 1.0}),
        ),
        "1 + sum d^2 / prod d",
        matrices=True,
    ),
    "SWAN": Case(official_state="0", matrices=True),
    "FRUGAL": Case(official_state="2 rho", matrices=True),
}
CASES = {**ELEMENTWISE, **MATRIX}


def load_peers(folder: str | None) -> dict[str, Callable[[str], type[Optimizer]]]:
    """Look-up of a class by its target for each library in the folder.

    The packages of timm import its models, and with them torchvision; its optimizers need neither, so their
    modules are loaded under packages that are empty but for their place.
    """
    if folder is None:
        return {}
    sys.path.append(folder)
    for name in ("timm", "timm.optim"):
        package = types.ModuleType(name)
        package.__path__ = [str(Path(folder, *name.split(".")))]
        sys.modules[name] = package
    import heavyball
    import pytorch_optimizer

    heavyball.utils.compile_mode = "default"
    return {
        PO: lambda target: getattr(pytorch_optimizer, target),
        HEAVY: lambda target: getattr(heavyball, target),
        TIMM: lambda target: getattr(
            importlib.import_module(f"timm.optim.{target.partition(':')[0]}"), target.partition(":")[2]
        ),
    }


def peer_contenders(case: Case, libraries: dict[str, Callable[[str], type[Optimizer]]]) -> dict[str, Make]:
    """Constructors of the peers of a case, by the label in the table."""
    made: dict[str, Make] = {}
    for peer in case.peers:
        if peer.library not in libraries:
            continue
        cls = libraries[peer.library](peer.target)
        for variant in peer.variants:
            label = " ".join([peer.library, peer.target.rpartition(":")[2], *map(_word, variant.items())])
            made[label] = _constructor(cls, {**peer.options, **variant}, peer.group)
    return made


def torch_contenders(name: str) -> dict[str, Make]:
    """What torch itself has, for orientation; the first one is the unit of all ratios."""
    unit: dict[str, Make] = {"torch AdamW foreach": _constructor(torch.optim.AdamW, {"foreach": True})}
    own: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
        "AdamW": (torch.optim.AdamW, {"fused": True}),
        "NAdamW": (torch.optim.NAdam, {"foreach": True, "decoupled_weight_decay": True}),
        "SGD": (torch.optim.SGD, {"foreach": True, "momentum": 0.9}),
        "Muon": (torch.optim.Muon, {}),
    }
    if name in own:
        cls, options = own[name]
        label = " ".join(["torch", cls.__name__, *(key for key, value in options.items() if value is True)])
        unit[label] = _constructor(cls, options)
    return unit


def _constructor(
    cls: type[Optimizer], options: Mapping[str, Any], group: Mapping[str, Any] | None = None
) -> Make:
    return lambda parameters: cls(
        [{"params": parameters, **(group or {})}], lr=1e-4, weight_decay=0.01, **options
    )


def _word(item: tuple[str, Any]) -> str:
    key, value = item
    return key if value is True else "loop" if (key, value) == ("foreach", False) else f"{key}={value}"
