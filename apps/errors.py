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
BAD_KEY = re.compile(r"(?:[Oo]ption '([\w.]+)'|unrecognized arguments?: --([\w.+-]+)|[Kk]ey '([\w.]+)')")
NO_ATTRIBUTE = re.compile(r"module '([\w.]+)' has no attribute '(\w+)'")
TRAINER_OPTIONS = ("model", "data", "trainer", "config", "app", "resume", "ckpt_path", "seed_everything")
"""Options of ``fit`` and its kin."""
CLASS_PATH = re.compile(r"class_path '([\w.]+)'")


def as_exit(error: BaseException) -> SystemExit:
    """Turn an error that the user can mend into ``error: ...`` and exit status 1.

    With ``THALWEG_DEBUG=1`` in the environment the original error is raised again, traceback and all.
    """
    if os.environ.get("THALWEG_DEBUG"):
        raise error
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return SystemExit(f"error: {one_line(text) or type(error).__name__}")


def one_line(message: str) -> str:
    """A message without what foreign code wraps around the cause."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    if lines and lines[0].startswith("Error(s) in loading state_dict"):
        details = lines[1:]
        first = details[0].removesuffix(".") if details else "unknown reason"
        return (
            f"the checkpoint does not fit the configured network ({len(details)} differences, the first:"
            f" {first}); use the configuration it was trained with, or give it as model.init_args.pretrained"
        )
    if "Does not validate against" in message or "Given value type:" in message:
        return explain(message)
    return message.strip()


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
    text = "; ".join(dict.fromkeys(lines)).replace('":; ', '": ') or message.strip()
    classes = CLASS_PATH.findall(message)
    if classes:
        text = f"{classes[-1]}: {text}"
    if match := BAD_KEY.search(message):
        key = next(group for group in match.groups() if group)
        accepted = list(accepted_options(classes, key, options))
        words = (key.rsplit(".", 1)[-1], key.split(".", 1)[0].removeprefix("no-").removeprefix("no_"))
        if hint := next(filter(None, (near(word, accepted) for word in words)), ""):
            text = f"{text.rstrip(chr(46))}.{hint}"
    elif match := NO_ATTRIBUTE.search(message):
        text += f".{near(match[2], names_in(match[1]))}"
    return text


def names_in(module: str) -> list[str]:
    """Public names of a module that can be imported, else none."""
    try:
        return [name for name in dir(importlib.import_module(module)) if not name.startswith("_")]
    except ImportError:
        return []


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
