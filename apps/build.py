"""From configuration trees of ``class_path`` and ``init_args`` to live objects, through jsonargparse.

The trees are those that ``thalweg fit`` embeds in checkpoints under ``app_config``, and those in the
``config.json`` of exported networks. Nothing is evaluated: values are checked against the signatures.
"""

from __future__ import annotations

import difflib
import importlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    from lightning import LightningDataModule, LightningModule
    from torch import nn

T = TypeVar("T")
Tree = Mapping[str, Any]
PARSER_KEY = re.compile(r'Parser key "([\w.]+)":\s*')


def build_network(app_config: Tree) -> nn.Module:
    """The network of a run, with fresh weights; its LightningModule is not built.

    Raises:
        ValueError: If the configuration has no network, or names a class or argument that does not exist.
    """
    from torch import nn

    model = _section(app_config, "model")
    network = (model.get("init_args") or {}).get("network")
    if not isinstance(network, Mapping):
        raise ValueError(f"{model.get('class_path')} is configured without a network, so none can be built")
    return instantiate(network, nn.Module, "network")


def build_module(app_config: Tree) -> LightningModule:
    """The LightningModule of a run, with fresh weights.

    Raises:
        ValueError: If the configuration has no model, or names a class or argument that does not exist.
    """
    from lightning import LightningModule

    return instantiate(_section(app_config, "model"), LightningModule, "model")


def build_datamodule(app_config: Tree) -> LightningDataModule:
    """The data module of a run, not yet set up.

    Raises:
        ValueError: If the configuration has no data, or names a class or argument that does not exist.
    """
    from lightning import LightningDataModule

    return instantiate(_section(app_config, "data"), LightningDataModule, "data")


def load_network(ref: str | Path, packages: Sequence[str] = ("thalweg",)) -> nn.Module:
    """A network with its weights, from a folder that ``thalweg export`` or a scOT wrote, or from the hub.

    Args:
        ref: Folder, ``org/name`` or ``hf://org/name[@revision]``.
        packages: Top-level packages whose classes a configuration may name; a downloaded file must not
            decide what is imported.

    Raises:
        ValueError: If the configuration is not understood, or the weights do not fit it.
    """
    from torch import nn

    from thalweg.checkpoints import hub, strict, tensors

    folder = hub.resolve(ref)
    config = read_config(hub.resolve(folder, "config.json"))
    if "class_path" not in config:
        from thalweg.pde.poseidon import ScOT

        return ScOT.from_pretrained(str(folder))
    for path in class_paths(config):
        if path.split(".")[0] not in packages:
            allowed = ", ".join(packages)
            raise ValueError(
                f"{folder} asks for {path}, allowed packages: {allowed}; pass packages= to trust it"
            )
    network = instantiate(config, nn.Module, "network")
    weights = hub.weight_file(folder)
    strict.load_strict(network, tensors.load(weights), weights)
    return network


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ValueError: If the file holds anything else.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as err:
        raise ValueError(f"{path} is no valid JSON: {err}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}, not an object with named values")
    return config


def instantiate(tree: Tree, base: type[T], key: str) -> T:
    """An object of a subclass of ``base`` from its tree; ``key`` is its name in messages.

    Raises:
        ValueError: If a class cannot be imported or is of another kind, or an argument does not fit.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    from thalweg.apps.errors import explain

    for path in class_paths(tree):
        import_class(path)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument(f"--{key}", type=base, required=True)
    try:
        config = parser.parse_object({key: dict(tree)})
    except ArgumentError as err:
        where = ".".join(dict.fromkeys((key, *PARSER_KEY.findall(str(err)))))
        raise ValueError(f"{where}: {explain(PARSER_KEY.sub('', str(err)))}") from None
    return cast(T, parser.instantiate(config)[key])


def class_paths(tree: Any) -> Iterator[str]:
    """Every ``class_path`` in a tree, outer ones first."""
    if isinstance(tree, Mapping):
        if isinstance(path := tree.get("class_path"), str):
            yield path
        for value in tree.values():
            yield from class_paths(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from class_paths(value)


def import_class(path: str) -> Any:
    """The object at a dotted path.

    Raises:
        ValueError: If its module cannot be imported or lacks it; the message names near matches.
    """
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise ValueError(f"class {path!r} needs its full path, e.g. thalweg.pde.poseidon.ScOT")
    try:
        module = importlib.import_module(module_name)
    except ImportError as err:
        raise ValueError(f"class {path} cannot be imported ({err}): is its package installed?") from err
    try:
        return getattr(module, name)
    except AttributeError:
        near = difflib.get_close_matches(name, [*dir(module), *getattr(module, "__all__", ())], n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"class {path} does not exist: {module_name} has no {name!r}{hint}") from None


def _section(app_config: Tree, name: str) -> Tree:
    section = app_config.get(name)
    if not isinstance(section, Mapping) or "class_path" not in section:
        raise ValueError(
            f"the configuration has no {name!r} with a class_path (found: {', '.join(app_config)})"
        )
    return section
