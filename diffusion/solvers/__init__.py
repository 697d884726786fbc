"""Solver schedules, their compiler, known solvers as schedules, and grids of nodes.

Names are resolved lazily, so that importing the package costs nothing.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thalweg.diffusion.solvers.compile import Compiled
    from thalweg.diffusion.solvers.linear import LinearSchedule
    from thalweg.diffusion.solvers.schedule import SolverSchedule

__all__ = ["Compiled", "LinearSchedule", "SolverSchedule"]

_HOME = {"Compiled": "compile", "LinearSchedule": "linear", "SolverSchedule": "schedule"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
