"""The ``thalweg`` command: trainer commands go to Lightning, the other verbs are typed functions.

Nothing heavy is imported before it is needed, so ``thalweg --help`` answers in well under a second.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from thalweg.apps.errors import as_exit, explain, near

SubVerbs = dict[str, tuple[str, str]]
# verb -> (target "module:function", or such a table of its sub-verbs; one line of help)
VERBS: dict[str, tuple[str | SubVerbs, str]] = {
    "apps": ("thalweg.apps.listing:apps", "show the registered apps, or one of them in full"),
    "data": (
        {
            "list": ("thalweg.apps.data:list_", "the table of PDE data sets"),
            "info": ("thalweg.apps.data:info", "what a file holds"),
            "generate": ("thalweg.apps.generate:generate", "make a data set with our solvers"),
            "assemble": ("thalweg.apps.data:assemble", "join published shards into one file"),
        },
        "list, describe, generate or assemble PDE data",
    ),
    "evaluate": (
        "thalweg.apps.evaluate:evaluate",
        "score a PDE checkpoint (--ckpt), images (--pipeline), a set of prompts (--suite)",
    ),
    "optim": (
        {
            "list": ("thalweg.apps.optim_cli:list_", "the table of optimizers and schedules"),
            "explain": ("thalweg.apps.optim_cli:explain", "equations, options, state and source of one"),
        },
        "list the optimizers, or explain one",
    ),
    "bench": (
        {"optim": ("thalweg.apps.optim_bench:optim", "compare optimizers, each tuned over the same budget")},
        "compare optimizers on small problems",
    ),
    "gains": ("thalweg.apps.gains:gains", "efficiency and accuracy gains from scaling curves"),
    "search": ("thalweg.apps.search:search", "the best few-step solver schedules of an image pipeline"),
    "refine": (
        "thalweg.apps.refine:refine",
        "descend the Frechet distance of a searched scheduler's images",
    ),
    "sample": ("thalweg.apps.sample:sample", "images from a diffusers pipeline and any scheduler"),
    "reward-server": ("thalweg.apps.reward_server:reward_server", "scores of pictures over HTTP"),
    "export": (
        "thalweg.apps.export:export",
        "Lightning checkpoint -> Hugging Face folder, optionally pushed",
    ),
    "import": ("thalweg.apps.export:import_", "published checkpoint -> verified local folder"),
    "ema": ("thalweg.apps.ema_profiles:ema", "weights averaged over any stretch of a run, afterwards"),
    "demo": ("thalweg.apps.demo:demo", "the whole story on two CPU cores, with a report"),
}
# verbs that do something else where an option is given: verb -> {option: target}
OTHERWISE = {
    "evaluate": {
        "--pipeline": "thalweg.apps.quality:evaluate_pipeline",
        "--suite": "thalweg.apps.suite:evaluate_suite",
    }
}
# verbs whose only positional word may be left out, and the option it stands for
BARE_WORD = {"apps": "--name"}
# commands that continue where they were stopped when they are given again
CONTINUING = (
    "thalweg data generate",
    "thalweg demo",
    "thalweg search",
    "thalweg refine",
    "thalweg evaluate --suite",
    "thalweg bench optim",
)
TRAINER = {
    "fit": "train or fine-tune (--app NAME | --config FILE ... | --resume RUN)",
    "validate": "run the validation set",
    "test": "run the test set",
    "predict": "write predictions",
}


def main(argv: list[str] | None = None) -> None:
    """Entry point of the console script and of ``python -m apps``.

    Raises:
        SystemExit: With one line on what is wrong and status 1, with 130 after Ctrl-C, as shells have it, and
            with 141 when whoever reads the output has gone, as `head` does.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        dispatch(words)
        sys.stdout.flush()
    except KeyboardInterrupt as stop:
        print("; ".join(filter(None, ("stopped", str(stop)))), file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        # Python flushes standard output once more when it exits, and would complain then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None


def dispatch(words: list[str]) -> None:
    """Run one command line."""
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
        known = [*TRAINER, *VERBS]
        raise SystemExit(f"error: unknown command {verb!r}.{near(verb, known)} Commands: {', '.join(known)}")


def usage() -> str:
    """The one-screen help."""
    rows = [*TRAINER.items(), *((name, text) for name, (_, text) in VERBS.items())]
    lines = [f"  {name:<13} {text}" for name, text in rows]
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
    prog = f"thalweg {verb}"
    given = {word.partition("=")[0] for word in argv}
    for option, other in OTHERWISE.get(verb, {}).items():
        if option in given:
            target, prog = other, f"{prog} {option}"
            argv = ["--help"] if given & {"-h", "--help"} else argv
    if verb in BARE_WORD and argv and not argv[0].startswith("-"):
        argv = [BARE_WORD[verb], *argv]
    from jsonargparse import ArgumentError, auto_cli, capture_parser

    options: dict[str, Any] = {}
    try:
        if isinstance(target, dict):
            target, argv, prog = pick_subverb(verb, target, argv)
        argv = located(argv)
        function = load(target)
        how: dict[str, Any] = {"prog": prog, "exit_on_error": False, "as_positional": True}
        options = vars(capture_parser(auto_cli, function, args=[], **how).get_defaults())
        auto_cli(function, args=spell_out_switches(argv, options), **how)
    except BrokenPipeError:
        raise
    except ArgumentError as error:
        raise as_exit(ValueError(f"{explain(str(error), options)} (see {prog} --help)")) from None
    except (ValueError, OSError, ImportError, RuntimeError, ArithmeticError) as error:
        raise as_exit(error) from None
    except KeyboardInterrupt:
        advice = "the same command continues where it was" if prog in CONTINUING else ""
        raise KeyboardInterrupt(advice) from None


def pick_subverb(verb: str, table: SubVerbs, argv: list[str]) -> tuple[str, list[str], str]:
    """Choose among the sub-verbs of a verb, e.g. ``data info``."""
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: thalweg {verb} {{{','.join(table)}}} ...")
        for name, (_, text) in table.items():
            print(f"  {name:<10} {text}")
        raise SystemExit(0)
    if argv[0] not in table:
        hint = near(argv[0], table)
        raise ValueError(f"unknown command 'thalweg {verb} {argv[0]}'.{hint} Known: {', '.join(table)}")
    return table[argv[0]][0], argv[1:], f"thalweg {verb} {argv[0]}"


def load(target: str) -> Callable[..., Any]:
    """Import ``module:function``."""
    module, _, name = target.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


def located(argv: list[str]) -> list[str]:
    """Replace the names of shipped configuration files after ``--config`` by their paths."""
    if not any(word.partition("=")[0] == "--config" for word in argv):
        return argv
    from thalweg.apps.trainer_cli import find_config

    found: list[str] = []
    words = iter(argv)
    for word in words:
        flag, has_value, value = word.partition("=")
        if flag == "--config":
            found += [flag, str(find_config(value if has_value else next(words, "")))]
        else:
            found.append(word)
    return found


def spell_out_switches(argv: list[str], defaults: dict[str, Any]) -> list[str]:
    """Give bare boolean options their value: ``--plots`` is true, ``--no-plots`` and ``--no_plots`` false."""
    names = [name for name, value in defaults.items() if isinstance(value, bool)]
    bare = {f"--{name}": f"--{name}=true" for name in names}
    bare |= {f"--no{mark}{name}": f"--{name}=false" for name in names for mark in "-_"}
    following = [word.lower() for word in [*argv[1:], ""]]
    return [
        word if after in ("true", "false") else bare.get(word, word) for word, after in zip(argv, following)
    ]
