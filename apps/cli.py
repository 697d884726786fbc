"""The ``thalweg`` command: trainer commands go to Lightning, the other verbs are typed functions.

Nothing heavy is imported before it is needed, so ``thalweg --help`` answers in well under a second.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

from thalweg.apps.errors import as_exit, explain

# verb -> (target "module:function", or one target per sub-verb; one line of help)
VERBS: dict[str, tuple[str | dict[str, str], str]] = {
    "apps": ("thalweg.apps.listing:apps", "show the registered apps, or one of them in full"),
    "data": (
        {
            "list": "thalweg.apps.data:list_",
            "info": "thalweg.apps.data:info",
            "generate": "thalweg.apps.generate:generate",
            "assemble": "thalweg.apps.data:assemble",
        },
        "list, describe, generate or assemble PDE data",
    ),
    "evaluate": ("thalweg.apps.evaluate:evaluate", "score a checkpoint: JSON, predictions, pictures"),
    "gains": ("thalweg.apps.gains:gains", "efficiency and accuracy gains from scaling curves"),
    "export": (
        "thalweg.apps.export:export",
        "Lightning checkpoint -> Hugging Face folder, optionally pushed",
    ),
    "import": ("thalweg.apps.export:import_", "published checkpoint -> verified local folder"),
    "demo": ("thalweg.apps.demo:demo", "the whole story on two CPU cores, with a report"),
}
# verbs whose only positional word may be left out, and the option it stands for
BARE_WORD = {"apps": "--name"}
TRAINER = {
    "fit": "train or fine-tune (--app NAME | --config FILE ... | --resume RUN)",
    "validate": "run the validation set",
    "test": "run the test set",
    "predict": "write predictions",
}


def main(argv: list[str] | None = None) -> None:
    """Entry point of the console script and of ``python -m apps``."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return
    if words[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(f"thalweg {version('thalweg')}")
        return
    verb, rest = words[0], words[1:]
    if verb in TRAINER:
        from thalweg.apps.trainer_cli import run

        run(verb, rest)
    elif verb in VERBS:
        run_verb(verb, rest)
    else:
        from thalweg.apps.errors import near

        known = [*TRAINER, *VERBS]
        raise SystemExit(f"error: unknown command {verb!r}.{near(verb, known)} Commands: {', '.join(known)}")


def usage() -> str:
    """The one-screen help."""
    rows = [*TRAINER.items(), *((name, text) for name, (_, text) in VERBS.items())]
    lines = [f"  {name:<10} {text}" for name, text in rows]
    return "\n".join(
        [
            "usage: thalweg COMMAND [options]      (thalweg COMMAND --help for its options)",
            "",
            *lines,
            "",
            "Examples: thalweg fit --app poseidon --print_config",
            "          thalweg data generate NS-Sines --out data --samples 64 --resolution 64",
        ]
    )


def run_verb(verb: str, argv: list[str]) -> None:
    """Parse the arguments of a verb from its function's signature and call it.

    Raises:
        SystemExit: With one line on what the user can mend.
    """
    target = VERBS[verb][0]
    if verb in BARE_WORD and argv and not argv[0].startswith("-"):
        argv = [BARE_WORD[verb], *argv]
    prog = f"thalweg {verb}"
    from jsonargparse import ArgumentError, auto_cli

    try:
        if isinstance(target, dict):
            target, argv, prog = pick_subverb(verb, target, argv)
        auto_cli(load(target), args=argv, prog=prog, exit_on_error=False, as_positional=True)
    except ArgumentError as error:
        raise as_exit(ValueError(f"{explain(str(error))} (see {prog} --help)")) from None
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        raise as_exit(error) from None
    except KeyboardInterrupt:
        raise SystemExit(
            f"stopped; {prog} continues where it was when the same command is run again"
        ) from None


def pick_subverb(verb: str, targets: dict[str, str], argv: list[str]) -> tuple[str, list[str], str]:
    """Choose among the sub-verbs of a verb, e.g. ``data info``."""
    from thalweg.apps.errors import near

    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: thalweg {verb} {{{','.join(targets)}}} ...")
        for name, target in targets.items():
            print(f"  {name:<10} {(load(target).__doc__ or '').strip().splitlines()[0]}")
        raise SystemExit(0)
    if argv[0] not in targets:
        hint = near(argv[0], targets)
        raise ValueError(f"unknown command 'thalweg {verb} {argv[0]}'.{hint} Known: {', '.join(targets)}")
    return targets[argv[0]], argv[1:], f"thalweg {verb} {argv[0]}"


def load(target: str) -> Callable[..., Any]:
    """Import ``module:function``."""
    module, _, name = target.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function
