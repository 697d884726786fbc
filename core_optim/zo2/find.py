"""Which parts of a network to stream."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


def find_blocks(network: nn.Module) -> list[nn.Module]:
    """Blocks of a network, outermost ones only, in the order of its modules.

    Those that a part of it names itself: ``wrap_modules()`` (scOT), or the classes in ``_no_split_modules``
    (diffusers, transformers); of networks that name none, the members of the module lists nearest to the top.

    Raises:
        ValueError: If there is none.
    """
    found = _named(network) or _listed(network)
    if not found:
        raise ValueError(
            f"{type(network).__name__} names no blocks (wrap_modules, _no_split_modules) and has no module"
            " lists: pass the blocks to stream"
        )
    return found


def _named(network: nn.Module, names: frozenset[str] = frozenset()) -> list[nn.Module]:
    if callable(wrap := getattr(network, "wrap_modules", None)):
        return outermost(wrap())
    names |= frozenset(getattr(network, "_no_split_modules", None) or ())
    found: list[nn.Module] = []
    for child in network.children():
        if type(child).__name__ in names:
            found.append(child)
        else:
            found += _named(child, names)
    return found


def _listed(network: nn.Module) -> list[nn.Module]:
    found: list[nn.Module] = []
    for child in network.children():
        if isinstance(child, nn.ModuleList) and len(child) > 0:
            found += list(child)
        else:
            found += _listed(child)
    return found


def outermost(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """Modules that are no part of another one in the list."""
    inner = {id(part) for module in modules for part in module.modules() if part is not module}
    return [module for module in modules if id(module) not in inner]
