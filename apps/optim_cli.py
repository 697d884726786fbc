"""``thalweg optim list`` and ``thalweg optim explain``: the optimizers by name."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def list_(*, markdown: bool = False) -> None:
    """Show all optimizers, the wrappers around them and the schedules.

    Args:
        markdown: Print the table of the documentation instead.
    """
    from rich.table import Table

    from thalweg.apps import optim_catalog as catalog

    if markdown:
        print(catalog.markdown())
        return
    console = _console()
    for title, entries in (("rules", catalog.rules()), ("around them", catalog.wrappers())):
        table = Table("name", "class", "works on", "state x", "decay", "source", title=title, box=None)
        for e in entries:
            table.add_row(*map(_plain, (e.name, e.title, e.kind, e.state, e.decay, e.source)))
        console.print(table)
    table = Table("schedule", "factor", "options", "source", title="schedules", box=None)
    for name, words in catalog.SCHEDULES.items():
        table.add_row(*map(_plain, (name, *words)))
    console.print(table)
    print(f"schedules: {catalog.LEGEND}")
    print("thalweg optim explain NAME shows equations and options")


def explain(name: str) -> None:
    """Show the equations, options, state and source of an optimizer, a wrapper or a schedule.

    Args:
        name: As in ``thalweg optim list``: the name in configurations or the class.

    Raises:
        ValueError: If there is none of that name; near names are offered.
    """
    from thalweg.apps import optim_catalog as catalog
    from thalweg.apps.errors import near
    from thalweg.core_optim import registry

    rules, wrappers, schedules = list(registry.RULES), list(catalog.WRAPPERS), list(catalog.SCHEDULES)
    titles = {title.lower(): rule for title, rule in registry.CLASSES.items()}
    titles |= {wrapper.target.partition(":")[2].lower(): key for key, wrapper in catalog.WRAPPERS.items()}
    key = name if name in (*rules, *wrappers, *schedules) else titles.get(name.lower(), name.lower())
    if key in rules:
        _explain_rule(registry.rule(key))
    elif key in wrappers:
        _explain_wrapper(key, catalog.WRAPPERS[key])
    elif key in schedules:
        _explain_schedule(key, *catalog.SCHEDULES[key])
    else:
        known = [*rules, *wrappers, *schedules]
        raise ValueError(f"optimizer {name!r} is unknown.{near(key, known)} Known: {', '.join(known)}")


def _explain_rule(rule: Any) -> None:
    from thalweg.apps import optim_catalog as catalog
    from thalweg.core_optim.engine.groups import COMMON
    from thalweg.core_optim.engine.rule import DECAYS

    print(f"{rule.title} ({rule.name}): {rule.summary}")
    print(f"source: {rule.source}\n\n{_indented(rule.equations)}\n")
    defaults = {name: option.default for name, option in rule.options.items()}
    if "weight_decay" in rule.options:
        decay = rule.way_of_decay(defaults)
        print(f"weight decay: {decay}: {DECAYS[decay]}")
    shape = " x ".join(map(str, catalog.EXAMPLE))
    print(f"state: {rule.state_size} x the parameters; of a {shape} matrix:")
    found = catalog.states(rule)
    for state, size, dtype, share in found:
        print(f"  {state:<20} {size:<14} {dtype:<9} " + (f"{share:.3g} x" if share else "allocated later"))
    print("" if found else "  none\n", end="")
    console = _console()
    for title, options in (("options", rule.options), ("options of every optimizer", COMMON)):
        rows = [(n, _show(o.default), o.check.allowed, o.doc) for n, o in options.items()]
        console.print(_option_table(title, rows))
    print(f"\nin YAML:   optim: {{name: {rule.name}, lr: {defaults['lr']:g}}}")
    print(f"in Python: from thalweg.core_optim import {rule.title}")


def _explain_wrapper(name: str, wrapper: Any) -> None:
    cls = wrapper.load()
    print(f"{cls.__name__} ({name}): {wrapper.kind}; state {wrapper.state}\nsource: {wrapper.source}\n")
    print(_indented(wrapper.about()) + "\n")
    docs = _documented(inspect.getdoc(cls) or "")
    rows = [
        (key, "" if p.default is p.empty else _show(p.default), "", docs.get(key, ""))
        for key, p in inspect.signature(cls).parameters.items()
    ]
    _console().print(_option_table("arguments", rows))
    print(f"\nin Python: from {cls.__module__} import {cls.__name__}")


def _explain_schedule(name: str, formula: str, options: str, source: str) -> None:
    from dataclasses import fields

    from thalweg.apps.optim_catalog import LEGEND
    from thalweg.core_optim.config import ScheduleConfig

    print(f"{name}: factor {formula}\n  {LEGEND}")
    print(f"options: {', '.join(filter(None, ('warmup_steps or warmup_ratio', options)))}")
    print(f"source: {source or '-'}")
    mentioned = ("warmup_steps", "warmup_ratio", "final_ratio", *options.replace(",", " ").split())
    rows = [(f.name, _show(f.default), "", "") for f in fields(ScheduleConfig) if f.name in mentioned]
    _console().print(_option_table("defaults", rows))
    print(f"\nin YAML:   optim: {{schedule: {{name: {name}, warmup_ratio: 0.05}}}}")


def _option_table(title: str, rows: list[tuple[str, str, str, str]]) -> Any:
    from rich.table import Table

    headings = ("option", "default", "allowed", "meaning")
    kept = [i for i in range(4) if any(row[i] for row in rows)]
    table = Table(*(headings[i] for i in kept), title=title, title_justify="left", box=None)
    for row in rows:
        table.add_row(*(_plain(row[i]) for i in kept))
    return table


def _documented(text: str) -> dict[str, str]:
    """Descriptions under ``Args:`` of a docstring."""
    found: dict[str, str] = {}
    name = ""
    for line in text.partition("\nArgs:\n")[2].splitlines():
        if not line.strip() or not line.startswith("    "):
            break
        if not line.startswith("     "):
            name, _, rest = line.strip().partition(": ")
            found[name] = rest
        elif name:
            found[name] += " " + line.strip()
    return found


def _indented(text: str) -> str:
    return "\n".join(f"  {line}".rstrip() for line in text.splitlines())


def _show(value: Any) -> str:
    if isinstance(value, tuple | list):
        return ", ".join(map(_show, value))
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "none"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _plain(text: str) -> Any:
    """Text in which brackets are brackets."""
    from rich.text import Text

    return Text(text)


def _console() -> Console:
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 150)
    return console
