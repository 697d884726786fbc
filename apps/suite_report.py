"""What ``thalweg evaluate --suite`` leaves behind: a table, results.json, pictures.csv and a grid."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thalweg.diffusion.suites.known import Suite
    from thalweg.diffusion.suites.pictures import Arm, Picture, Scores
    from thalweg.diffusion.suites.tables import Cell

PRINTED: dict[str, float] = {"pickscore": 26.0, "unifiedreward": 5.0}
"""Factors of rewards in published tables."""
SHOWN = 24
"""Pictures, or pairs of them, on the grid."""
COLUMNS = 6
"""Of the grid."""
WIDTH = 240
"""Characters that a table may have."""
PRINTED_SETTINGS = (
    *("model", "lora", "prompts", "prompts_from", "samples_per_prompt", "steps", "guidance_scale"),
    *("scheduler", "scheduler_class", "max_sequence_length", "seed", "dtype", "device"),
)
"""What is printed below the tables."""


@dataclass(frozen=True)
class Finished:
    """An evaluation whose pictures are all drawn and scored."""

    suite: Suite
    """Which one."""
    pictures: Sequence[Picture]
    """All of them."""
    rewards: Sequence[str]
    """Names of the rewards of this evaluation, in order."""
    arm: Arm
    """The model."""
    before: Arm | None
    """What it is compared with."""
    settings: Mapping[str, Any]
    """How it was done."""

    def scores(self, arm: Arm) -> list[Scores]:
        """Scores of these rewards for all pictures of an arm."""
        return [
            {k: v for k, v in row.items() if k.partition("/")[0] in self.rewards}
            for row in arm.read(self.pictures)
        ]


def report(done: Finished, folder: Path) -> None:
    """Write and print everything."""
    from thalweg.apps.results import provenance, write_json
    from thalweg.checkpoints.atomic import write_text
    from thalweg.diffusion.suites.tables import cells

    scores = done.scores(done.arm)
    before = None if done.before is None else done.scores(done.before)
    found = cells(done.pictures, scores, before)
    shown = grid_of(done, folder)
    content = {
        "protocol": done.suite.protocol,
        "settings": dict(done.settings),
        "compared_with": compared_with(done, folder),
        "table": [dataclasses.asdict(cell) for cell in found],
        "grid": [{"index": p.item.index, "copy": p.copy, "prompt": p.item.text} for p in shown],
        "provenance": provenance(),
    }
    write_json(content, folder / "results.json")
    write_text(folder / "pictures.csv", table_of_pictures(done, scores, before))
    print_tables(done, found)
    print(f"written to {folder}")


def compared_with(done: Finished, folder: Path) -> str | None:
    """What the column before shows: the same model without its LoRA, or another evaluation."""
    if done.before is None:
        return None
    own = done.before.folder == folder
    return "the same without its LoRA" if own else str(done.before.folder / done.before.name)


def table_of_pictures(done: Finished, scores: Sequence[Scores], before: Sequence[Scores] | None) -> str:
    """CSV with a row for each picture."""
    metrics = list(dict.fromkeys(name for row in scores for name in row))
    text = io.StringIO()
    heads = [*metrics, *(f"{name} before" for name in metrics if before is not None)]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["index", "copy", "file", "split", "task", "prompt", *heads])
    for i, picture in enumerate(done.pictures):
        item = picture.item
        values = [scores[i].get(name) for name in metrics]
        values += [] if before is None else [before[i].get(name) for name in metrics]
        writer.writerow([item.index, picture.copy, picture.file, item.split, item.tag, item.text, *values])
    return text.getvalue()


def grid_of(done: Finished, folder: Path) -> list[Picture]:
    """Write grid.png: pictures from all over the suite; pairs, before at the left, where there are two."""
    from PIL import Image

    from thalweg.checkpoints.atomic import replacing
    from thalweg.diffusion.sheet import grid

    firsts = [picture for picture in done.pictures if picture.copy == 0]
    number = min(SHOWN, len(firsts))
    shown = [firsts[i * len(firsts) // number] for i in range(number)]
    arms = [arm for arm in (done.before, done.arm) if arm is not None]
    images = [Image.fromarray(arm.load(picture)) for picture in shown for arm in arms]
    with replacing(folder / "grid.png") as temporary:
        grid(images, min(COLUMNS, number) * len(arms)).save(temporary, format="PNG")
    return shown


def print_tables(done: Finished, found: Sequence[Cell]) -> None:
    """Print a table for each reward, or for each metric where two models are compared."""
    from rich.console import Console

    # Tables are as wide as they need to be, also where the terminal is not.
    console = Console(highlight=False, soft_wrap=True, width=WIDTH)
    splits = list(dict.fromkeys(cell.split for cell in found))
    for metric in dict.fromkeys(cell.metric for cell in found):
        part = [cell for cell in found if cell.metric.partition("/")[0] == metric]
        if done.before is not None:
            console.print(two_models([cell for cell in found if cell.metric == metric], splits))
        elif part:
            console.print(one_model(part, splits))
    console.print(f"{done.suite.protocol}.", markup=False)
    for key in PRINTED_SETTINGS:
        console.print(f"  {key}: {done.settings[key]}", markup=False)
    if done.before is not None:
        console.print(f"  before: {compared_with(done, done.arm.folder)}", markup=False)


def one_model(found: Sequence[Cell], splits: Sequence[str]) -> Any:
    """Table of a reward and its parts by task, with standard errors of the means below."""
    from thalweg.diffusion.suites.tables import MACRO, MICRO, table_of

    known = table_of(found)
    columns = [(m, split) for m in dict.fromkeys(cell.metric for cell in found) for split in splits]
    title = found[0].metric
    heads = [m.removeprefix(f"{title}/") if "/" in m else "score" for m, _ in columns]
    table = empty(heading(title), [column(h, s, splits) for h, (_, s) in zip(heads, columns, strict=True)])
    for task in dict.fromkeys(cell.task for cell in found):
        row = [known.get((metric, split, task)) for metric, split in columns]
        values = [
            "-" if cell is None else number(title, cell.value, cell.error if task in (MACRO, MICRO) else None)
            for cell in row
        ]
        table.add_row(task, counts(row[: len(splits)]), *values)
    return table


def two_models(found: Sequence[Cell], splits: Sequence[str]) -> Any:
    """Table of one metric by task: before, after, and the difference with its standard error."""
    from thalweg.diffusion.suites.tables import table_of

    known, metric = table_of(found), found[0].metric
    heads = [column(name, split, splits) for split in splits for name in ("before", "after", "difference")]
    table = empty(heading(metric), heads)
    for task in dict.fromkeys(cell.task for cell in found):
        row = [known.get((metric, split, task)) for split in splits]
        values: list[str] = []
        for cell in row:
            if cell is None or cell.before is None or cell.difference is None:
                values += ["-", "-" if cell is None else number(metric, cell.value), "-"]
            else:
                values += [number(metric, cell.before), number(metric, cell.value)]
                values.append(number(metric, cell.difference, cell.difference_error, sign=True))
        table.add_row(task, counts(row), *values)
    return table


def empty(title: str, heads: Sequence[str]) -> Any:
    """A table without rows, whose first columns are tasks and numbers of pictures."""
    from rich.table import Table

    table = Table(box=None, header_style="bold", title=title, title_justify="left")
    for i, head in enumerate(("task", "pictures", *heads)):
        table.add_column(head, justify="left" if i == 0 else "right", no_wrap=True)
    return table


def heading(metric: str) -> str:
    """Name of a metric, with the factor of published tables."""
    factor = PRINTED.get(metric)
    return metric if factor is None else f"{metric} x {factor:g}"


def column(name: str, split: str, splits: Sequence[str]) -> str:
    """Name of a column; parts of the suite are told apart where there are several."""
    return name if len(splits) == 1 else f"{name} ({split.replace('_', ' ')})"


def counts(row: Sequence[Cell | None]) -> str:
    """Pictures of a row, by part of the suite."""
    return "+".join("0" if cell is None else str(cell.pictures) for cell in row)


def number(metric: str, value: float, error: float | None = None, sign: bool = False) -> str:
    """A number, with its standard error where there is one."""
    factor = PRINTED.get(metric, 1.0)
    text = f"{factor * value:{'+' if sign else ''}.3f}"
    return text if error is None else f"{text} +- {factor * error:.3f}"
