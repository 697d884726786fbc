"""The index over the suite: which apps exist, what they train, on which data, judged by which metrics.

Entries are frozen records of strings, so importing this module costs milliseconds and no torch. The YAML that
an entry names is what runs; tests tie the two together. Third parties add apps through the entry-point group
``thalweg.apps``: an entry point names a callable without arguments that calls :func:`register`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from thalweg.apps.errors import near

ENTRY_POINTS = "thalweg.apps"


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetRef:
    """A data set by name, and where its description comes from."""

    name: str
    """Key in the registry, e.g. ``pde/NS-Sines``."""
    target: str
    """Dotted path ``package.module:function`` that describes or opens the data set."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of the target."""
    summary: str = ""
    """One line for tables."""
    source: str = ""
    """Where the published data lies, or how it is generated."""
    licence: str = ""
    """Licence of the published data."""
    size: str = ""
    """Published size, for people."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricRef:
    """A metric by name, with the direction in which it improves and the protocol that makes it comparable."""

    name: str
    """Key in the registry, e.g. ``pde/rel_l1``."""
    target: str
    """Dotted path ``package.module:name`` of a torchmetrics metric, or of a function of features."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Constructor arguments at their published protocol."""
    higher_is_better: bool = False
    """Direction of improvement."""
    ideal: float = 0.0
    """Value on identical prediction and target."""
    protocol: str = ""
    """How the published number is taken."""


@dataclass(frozen=True, kw_only=True, slots=True)
class App:
    """One application: what is trained, on what, judged by what."""

    name: str
    """Key in the registry and value of ``--app``."""
    summary: str
    """One line for tables."""
    module: str
    """Class path of the LightningModule."""
    datamodule: str
    """Class path of the LightningDataModule."""
    datasets: tuple[str, ...]
    """Keys of :func:`datasets`."""
    metrics: tuple[str, ...]
    """Keys of :func:`metrics`."""
    config: str
    """Default configuration, a file below ``thalweg.configs``."""
    paper: str
    """Reference to cite."""
    extra: str | None = None
    """Extra of the package that brings optional requirements."""


_APPS: dict[str, App] = {}
_DATASETS: dict[str, DatasetRef] = {}
_METRICS: dict[str, MetricRef] = {}
_loaded = False


def register(app: App, *, datasets: Iterable[DatasetRef] = (), metrics: Iterable[MetricRef] = ()) -> None:
    """Add an app with the data sets and metrics it brings.

    Raises:
        ValueError: If the app's name is taken, or it names a data set or metric that nobody registered.
    """
    if app.name in _APPS:
        raise ValueError(f"app {app.name!r} is already registered by {_APPS[app.name].module}")
    _DATASETS.update({ref.name: ref for ref in datasets})
    _METRICS.update({ref.name: ref for ref in metrics})
    for kind, wanted, known in (("data set", app.datasets, _DATASETS), ("metric", app.metrics, _METRICS)):
        if unknown := [name for name in wanted if name not in known]:
            raise ValueError(f"app {app.name!r} names unregistered {kind}s: {', '.join(unknown)}")
    _APPS[app.name] = app


def apps() -> dict[str, App]:
    """All apps by name, our own and those of installed entry points."""
    _load()
    return dict(_APPS)


def datasets() -> dict[str, DatasetRef]:
    """All data sets by name."""
    _load()
    return dict(_DATASETS)


def metrics() -> dict[str, MetricRef]:
    """All metrics by name."""
    _load()
    return dict(_METRICS)


def get(name: str) -> App:
    """One app by exact name.

    Raises:
        ValueError: If there is none; the message lists near matches and all names.
    """
    found = apps()
    if name not in found:
        raise ValueError(f"unknown app {name!r}.{near(name, found)} Known: {', '.join(sorted(found))}")
    return found[name]


def _load() -> None:
    """Register the suite's own apps, then those of third parties, once."""
    global _loaded
    if _loaded:
        return
    _loaded = True
    from thalweg.apps import catalog

    catalog.register_all()
    for entry in metadata.entry_points(group=ENTRY_POINTS):
        entry.load()()
