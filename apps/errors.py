"""One-line errors for people, tracebacks for whoever asks for them."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import os
import re
import typing
from collections.abc import Iterable, Iterator

NOISE = re.compile(
    r"\s*(- ?)?(usage:|tip:|subtypes:|errors:|given value|does not validate|expected a <class 'nonetype'>|"
    r"problem with given class_path|parser key \"(model|data|network)\":$)",
    flags=re.IGNORECASE,
)
BAD_KEY = re.compile(r"(?:[Oo]ption '([\w.]+)'|unrecognized arguments?: --([\w.+]+)|[Kk]ey '([\w.]+)')")
TRAINER_OPTIONS = ("model", "data", "trainer", "config", "app", "resume", "ckpt_path", "seed_everything")
"""Options of ``fit`` and its kin."""
CLASS_PATH = re.compile(r"class_path '([\w.]+)'")


def as_exit(error: BaseException) -> SystemExit:
    """Turn an error that the user can mend into ``error: ...`` and exit status 1.

    With ``THALWEG_DEBUG=1`` in the environment the original error is raised again, traceback and all.
    """
    if os.environ.get("THALWEG_DEBUG"):
        raise error
    text = str(error).strip() or type(error).__name__
    return SystemExit(f"error: {text}")


def near(word: str, known: Iterable[str]) -> str:
    """Hint with the nearest known words, or an empty string."""
    found = difflib.get_close_matches(word, list(dict.fromkeys(known)), n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(found)}?" if found else ""


def explain(message: str, options: Iterable[str] = TRAINER_OPTIONS) -> str:
    """The telling lines of a jsonargparse message; a mistyped key gets the nearest accepted option.

    Args:
        message: Text of an ``ArgumentError``.
        options: Option names of the command, where the message names no class that has the key.
    """
    lines = [line.strip(" -") for line in message.splitlines() if line.strip() and not NOISE.match(line)]
    text = "; ".join(dict.fromkeys(lines)) or message.strip()
    classes = CLASS_PATH.findall(message)
    if classes:
        text = f"{classes[-1]}: {text}"
    if match := BAD_KEY.search(message):
        key = next(group for group in match.groups() if group)
        if hint := near(key.rsplit(".", 1)[-1], accepted_options(classes, key, options)):
            text = f"{text.rstrip(chr(46))}.{hint}"
    return text


def accepted_options(classes: list[str], key: str, options: Iterable[str]) -> Iterator[str]:
    """Option names that could have been meant: those of the named classes, else the trainer's and ours."""
    yield from options
    for path in classes or (["lightning.Trainer"] if key.startswith("trainer") else []):
        module, _, name = path.rpartition(".")
        try:
            target = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError):
            continue
        yield from parameter_names(target)


def parameter_names(target: object) -> Iterator[str]:
    """Parameters of a class, and the fields of configuration dataclasses among them, recursively."""
    try:
        hints = typing.get_type_hints(target.__init__)  # type: ignore[misc]
        yield from inspect.signature(target).parameters  # type: ignore[arg-type]
    except (TypeError, ValueError, NameError):
        return
    for hint in hints.values():
        for part in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(part):
                yield from parameter_names(part)
