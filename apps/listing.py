"""``thalweg apps``: the registry as a table."""

from __future__ import annotations

from thalweg.apps import registry


def apps(name: str | None = None) -> None:
    """Show the registered apps, or one of them in full.

    Args:
        name: App to show with its data sets and metrics; all apps in one table without it.
    """
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if name is None:
        table = Table("app", "what it does", "data sets", "metrics", "default config", title="thalweg apps")
        for app in registry.apps().values():
            table.add_row(app.name, app.summary, str(len(app.datasets)), ", ".join(app.metrics), app.config)
        console.print(table)
        console.print("thalweg apps NAME shows one app; thalweg fit --app NAME trains it", highlight=False)
        return
    app = registry.get(name)
    about = Table(show_header=False, box=None, title=f"{app.name}: {app.summary}", title_justify="left")
    rows = {
        "module": app.module,
        "data module": app.datamodule,
        "config": app.config,
        "paper": app.paper,
        "extra": app.extra or "-",
    }
    for key, value in rows.items():
        about.add_row(key, value)
    console.print(about)
    data = Table("data set", "what it is", "size", "licence")
    for key in app.datasets:
        ref = registry.datasets()[key]
        data.add_row(ref.name, ref.summary, ref.size, ref.licence)
    console.print(data)
    scores = Table("metric", "class", "better", "protocol")
    for key in app.metrics:
        metric = registry.metrics()[key]
        scores.add_row(
            metric.name, metric.target, "higher" if metric.higher_is_better else "lower", metric.protocol
        )
    console.print(scores)
