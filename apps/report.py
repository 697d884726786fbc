"""Self-contained HTML reports: text, tables and pictures in one file that opens anywhere, offline."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from thalweg.checkpoints.atomic import write_text

STYLE = """
:root { color-scheme: light dark;
  --line: #d5dbe1; --soft: #f3f6f8; --ink: #16202a; --paper: #ffffff; --mark: #0b6e8a; }
@media (prefers-color-scheme: dark) {
  :root { --line: #33414d; --soft: #1b252d; --ink: #dfe7ec; --paper: #11181e; --mark: #5cc4dd; }
}
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper);
       max-width: 62rem; margin: 2.5rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.9rem; margin-bottom: .2rem; }
h2 { margin-top: 2.4rem; border-bottom: 1px solid var(--line); padding-bottom: .3rem; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .8rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; }
tr.best td { font-weight: 650; color: var(--mark); }
figure { margin: 1.2rem 0; } img { max-width: 100%; background: #fff; border-radius: 4px; }
figcaption, .note { font-size: .9rem; opacity: .8; }
pre { background: var(--soft); padding: .7rem .9rem; overflow-x: auto; border-radius: 4px; }
""".strip()


@dataclass(kw_only=True, slots=True)
class Report:
    """A page under construction; every ``add_*`` appends to it."""

    title: str
    """Heading of the page."""
    subtitle: str = ""
    """One line below the heading."""
    parts: list[str] = field(default_factory=list)
    """HTML written so far."""

    def add_heading(self, text: str) -> None:
        """Start a section."""
        self.parts.append(f"<h2>{html.escape(text)}</h2>")

    def add_text(self, text: str, *, note: bool = False) -> None:
        """Add a paragraph, small if it is a note."""
        self.parts.append(f"<p{' class=note' if note else ''}>{html.escape(text)}</p>")

    def add_commands(self, lines: Sequence[str]) -> None:
        """Add a block of shell commands."""
        self.parts.append(f"<pre>{html.escape(chr(10).join(lines))}</pre>")

    def add_table(
        self, header: Sequence[str], rows: Sequence[Sequence[object]], *, best: int | None = None
    ) -> None:
        """Add a table; floats get four significant digits, row ``best`` stands out."""
        head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
        body = []
        for index, row in enumerate(rows):
            cells = "".join(f"<td>{html.escape(show(cell))}</td>" for cell in row)
            body.append(f"<tr{' class=best' if index == best else ''}>{cells}</tr>")
        self.parts.append(f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>")

    def add_image(self, path: Path, caption: str) -> None:
        """Embed a PNG with a caption."""
        data = base64.b64encode(path.read_bytes()).decode("ascii")
        text = html.escape(caption)
        picture = f'<img alt="{text}" src="data:image/png;base64,{data}">'
        self.parts.append(f"<figure>{picture}<figcaption>{text}</figcaption></figure>")

    def render(self) -> str:
        """The whole page."""
        title = html.escape(self.title)
        return (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<style>{STYLE}</style></head><body><h1>{title}</h1>"
            f"<p class=note>{html.escape(self.subtitle)}</p>{''.join(self.parts)}</body></html>\n"
        )

    def write(self, path: Path) -> Path:
        """Write the page atomically and return its path."""
        write_text(path, self.render())
        return path


def show(cell: object) -> str:
    """A table cell as text."""
    if isinstance(cell, float):
        return f"{cell:.4g}"
    return "-" if cell is None else str(cell)
