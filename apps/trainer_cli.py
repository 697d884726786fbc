"""``fit``, ``validate``, ``test`` and ``predict``: Lightning's command line with our resume rules.

Lightning overlays hyper-parameters stored in a checkpoint over config files and flags, so a flag given on
resume is silently lost. Our modules store none; the resolved configuration goes into the checkpoint under
``app_config`` instead, flags win, and :mod:`thalweg.apps.build` rebuilds a network from that mapping alone.
"""

from __future__ import annotations

import os
import sys
import warnings
from importlib import resources
from pathlib import Path
from typing import Any

from thalweg.apps import registry
from thalweg.apps.errors import as_exit, explain, near

COMMANDS = ("fit", "validate", "test", "predict")
RUNS = "runs"
OWN_HELP = """
thalweg's own options, expanded before Lightning's command line sees them:
  --app NAME            default configuration of an app (see `thalweg apps`); --config and flags override it
  --config FILE         a file, or one shipped with thalweg such as poseidon/tiny.yaml or trainer/cpu.yaml;
                        several overlay each other, the later wins
  --resume RUN|last     continue a run folder from its last.ckpt with its saved configuration (fit only)
  --dry-run             print parameters, memory and the work of an epoch, and train nothing (fit only);
                        nothing is downloaded
"""
DRY_RUN = ("--dry-run", "--dry_run")


def run(command: str, argv: list[str]) -> None:
    """Run one of Lightning's commands on expanded arguments.

    Raises:
        SystemExit: With one line on what the user can mend; set ``THALWEG_DEBUG=1`` for the traceback.
    """
    if any(flag in argv for flag in ("-h", "--help")):
        print(OWN_HELP)
    dry_run = any(word in DRY_RUN for word in argv)
    try:
        if dry_run and command != "fit":
            raise ValueError(f"--dry-run says what a fit would need; {command} has no such option")
        arguments = expand(command, [word for word in argv if word not in DRY_RUN])
    except (ValueError, OSError) as error:
        raise as_exit(error) from None
    sys.argv = ["thalweg", command, *arguments]
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from jsonargparse import ArgumentError

    from thalweg.apps.lightning_cli import launch

    try:
        with warnings.catch_warnings():
            quiet_known_warnings()
            launch(dry_run)
    except ArgumentError as error:
        text = explain(str(error))
        if f"required: {command}." in text:
            text = f"nothing to {command}: give --app NAME or --config FILE (see thalweg {command} --help)"
        raise as_exit(ValueError(text)) from None
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        raise as_exit(error) from None
    except KeyError as error:
        if "checkpoint contains only the model" not in str(error):
            raise
        reason = "it holds weights only; a fit can start from them with --model.init_args.pretrained"
        raise as_exit(ValueError(f"the checkpoint cannot be resumed: {reason}")) from None


def expand(command: str, argv: list[str]) -> list[str]:
    """Replace ``--app``, ``--resume`` and shipped config names by what LightningCLI understands."""
    out: list[str] = []
    first: list[str] = []
    words = iter(argv)
    for word in words:
        flag, has_value, value = word.partition("=")
        if flag not in ("--app", "--config", "-c", "--resume"):
            out.append(word)
            continue
        if not has_value:
            value = next(words, "")
        if not value:
            raise ValueError(f"{flag} needs a value")
        if flag == "--app":
            first += ["--config", str(find_config(registry.get(value).config))]
        elif flag == "--resume":
            if command != "fit":
                raise ValueError(f"--resume continues a fit; for {command} pass --ckpt_path FILE")
            config, checkpoint = find_run(value)
            first += ["--config", str(config)]
            out += ["--ckpt_path", str(checkpoint)]
        else:
            out += ["--config", str(find_config(value))]
    return first + out


def find_config(name: str) -> Path:
    """A configuration file: a path, or one shipped in ``thalweg.configs`` (with or without ``configs/``).

    Raises:
        ValueError: If there is none; the message lists the shipped ones.
    """
    path = Path(name)
    if path.is_file():
        check_yaml(path)
        return path
    root = shipped_configs()
    candidate = root / name.removeprefix("configs/")
    if candidate.is_file():
        return candidate
    known = sorted(p.relative_to(root).as_posix() for p in root.rglob("*.yaml"))
    hint = near(name.removeprefix("configs/"), known)
    raise ValueError(f"no configuration file {name!r}.{hint} Shipped ones: {', '.join(known)}")


def check_yaml(path: Path) -> None:
    """Refuse a file that is no YAML, by its name; the parser's own message has none.

    Raises:
        ValueError: If it cannot be read.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no YAML file: it is not text") from None
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" in line {where.line + 1}" if where else ""
        raise ValueError(f"{path} is no valid YAML{line}: {getattr(error, 'problem', error)}") from None
    if not isinstance(content, dict | None):
        kind = type(content).__name__
        raise ValueError(f"{path} holds a {kind}, not sections such as model, data and trainer")


def shipped_configs() -> Path:
    """Folder of the YAML files that ship with the package."""
    return Path(str(resources.files("thalweg.configs")))


def find_run(name: str) -> tuple[Path, Path]:
    """Configuration and newest checkpoint of a run folder; ``last`` means the newest run under ``runs/``.

    Raises:
        ValueError: If the folder holds no configuration or no checkpoint.
    """
    if name == "last":
        folders = [config.parent for config in Path(RUNS).rglob("config.yaml")]
        found = [(path.stat().st_mtime, folder) for folder in folders for path in folder.rglob("*.ckpt")]
        if not found:
            raise ValueError(f"nothing to resume: no run with a checkpoint under {RUNS}/")
        folder = max(found)[1]
    else:
        folder = Path(name)
    config = folder / "config.yaml"
    if not config.is_file():
        raise ValueError(f"{folder} is not a run folder: it has no config.yaml")
    checkpoints = sorted(folder.rglob("*.ckpt"), key=lambda p: (p.stat().st_mtime, p.name.startswith("last")))
    if not checkpoints:
        raise ValueError(f"run folder {folder} holds no checkpoint yet; start it again without --resume")
    return config, checkpoints[-1]


def quiet_known_warnings() -> None:
    """Hide Lightning's hints that say nothing about the user's run."""
    for text in (
        r".*does not have many workers.*",
        r".*LeafSpec.*deprecated.*",
        r".*`instantiate_classes`.*",
        r".*Checkpoint directory .* exists and is not empty.*",
        r".*WeightAveraging callback with a model that overrides.*",
        r".*The dirpath has changed.*",
        r".*module\(s\) in eval mode at the start of training.*",
    ):
        warnings.filterwarnings("ignore", message=f"(?s){text}")


def trainer_defaults() -> dict[str, Any]:
    """Defaults under every config: runs go to ``runs/`` and are logged as CSV, never into a source folder."""
    logger = {
        "class_path": "thalweg.apps.loggers.CSVLogger",
        "init_args": {"save_dir": RUNS, "name": "run"},
    }
    return {"default_root_dir": RUNS, "logger": logger}
