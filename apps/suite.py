"""``thalweg evaluate --suite``: pictures of a pipeline for a set of prompts, and their scores."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from thalweg.diffusion.rewards.base import Reward
    from thalweg.diffusion.suites.known import Item, Suite
    from thalweg.diffusion.suites.pictures import Arm, Draw, Picture

Name = Literal["geneval", "ocr", "drawbench", "pickscore", "shapes"]
SETTINGS = "suite.json"
"""Settings of an evaluation, by which its folder is continued."""
EDGE = 2**20
"""Bytes at both ends of a file that its fingerprint reads."""


def evaluate_suite(
    *,
    suite: Name,
    model: str,
    lora: str | None = None,
    before: bool = True,
    compare: str | None = None,
    prompts: str | None = None,
    num_prompts: int | None = None,
    samples_per_prompt: int | None = None,
    rewards: dict[str, dict[str, Any] | None] | None = None,
    steps: int = 40,
    scheduler: str | None = None,
    guidance: float = 1.0,
    max_sequence_length: int | None = None,
    size: tuple[int, int] | None = None,
    batch_size: int = 16,
    seed: int = 0,
    device: str = "auto",
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    out: str = "runs/suite",
) -> None:
    """Draw the pictures of a suite of prompts with a diffusers pipeline, and score them.

    The noise of a picture depends on the seed, the number of its prompt and its own number alone, so that two
    models are compared on equal noises. Pictures and scores stay in the folder: the same command continues
    where it was stopped, and more rewards score the pictures that are there.

    Args:
        suite: geneval (prompts of its grammar where no file is given), ocr, drawbench, pickscore, shapes
            (captions of ShapesWorld, also of combinations that are held out from training).
        model: Folder of a diffusers pipeline, or its name on the Hub.
        lora: Adapter to put into its transformer: a folder or file of `thalweg export`, diffusers or PEFT.
        before: With a LoRA, draw and score the pipeline without it as well.
        compare: Folder of another evaluation of the same prompts and noises, for the column before.
        prompts: File of prompts: .txt with one a line, or .jsonl of GenEval's metadata.
        num_prompts: Prompts to take: the first of a file, or how many are made.
        samples_per_prompt: Pictures of each prompt; the suite's number by default.
        rewards: More rewards, or options of the suite's, by name: "{clipscore: {folder: FOLDER}}".
        steps: Network evaluations for each picture; guidance takes two in each.
        scheduler: Folder of a scheduler such as that of `thalweg search`, JSON file of a solver schedule, or
            class of diffusers such as UniPCMultistepScheduler; the pipeline's own by default, which is Euler
            for Stable Diffusion 3.
        guidance: Of classifier-free guidance; 1 for none.
        max_sequence_length: Tokens of the T5 encoder; by default those that the pipeline's folder names, or
            its own number.
        size: Height and width in pixels; the pipeline's own by default.
        batch_size: Pictures at once.
        seed: Of the noises.
        device: cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.
        dtype: Precision of the networks.
        out: Folder for the pictures, their scores, results.json, pictures.csv and a grid.

    Raises:
        ValueError: If suite, pipeline, prompts, rewards and folder do not fit together.
    """
    import torch

    from thalweg.apps.suite_report import Finished, report
    from thalweg.diffusion.loading import call_options
    from thalweg.diffusion.rewards.registry import open_rewards
    from thalweg.diffusion.suites.drawing import add_lora, drawer, open_model, read_fitting
    from thalweg.diffusion.suites.known import items_of, rewards_of, suite_of
    from thalweg.diffusion.suites.pictures import check_batch, pictures_of, settings_match

    check_batch(batch_size)
    known = suite_of(suite)
    items = items_of(known, prompts, num_prompts)
    samples = known.samples if samples_per_prompt is None else samples_per_prompt
    pictures = pictures_of(items, samples)
    specs, folder = rewards_of(known, rewards or {}), Path(out)
    options = {
        "guidance_scale": guidance,
        "max_sequence_length": max_sequence_length,
        **({} if size is None else {"height": size[0], "width": size[1]}),
    }
    where = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    settings: dict[str, Any] = {
        **noises(known, items, samples, seed),
        "prompts_from": known.made if prompts is None else prompts,
        "model": fingerprint(model),
        "lora": None if lora is None else fingerprint(lora),
        "scheduler": None if scheduler is None else fingerprint(scheduler),
        "steps": steps,
        **options,
        "batch_size": batch_size,
        "dtype": dtype,
        "device": where,
        "rewards": specs,
    }
    settings_match(folder / SETTINGS, settings)
    other = None if compare is None else compared(Path(compare), settings, pictures)
    scorers = open_rewards(specs, where).rewards
    pipe = open_model(model, scheduler, getattr(torch, dtype), where)
    draw = drawer(pipe, steps=steps, seed=seed, options=options)
    adapter = None if lora is None else read_fitting(pipe, lora)
    keep(folder, settings, items)
    arms = arms_of(folder, adapter is not None, before and other is None)
    for arm in arms:
        if adapter is not None and arm.name == "after":
            add_lora(pipe, *adapter)
        paint(arm, pictures, draw, scorers, batch_size)
    first = other or (arms[0] if len(arms) > 1 else None)
    said = {name: value for name, value in call_options(pipe).items() if settings[name] is None}
    settings |= {**said, "scheduler_class": type(pipe.scheduler).__name__}
    report(Finished(known, pictures, list(specs), arms[-1], first, settings), folder)


def noises(suite: Suite, items: Sequence[Item], samples: int, seed: int) -> dict[str, Any]:
    """The settings that two evaluations share where they have the same prompts and noises."""
    text = json.dumps([[item.text, dict(item.metadata), item.split] for item in items], sort_keys=True)
    return {
        "suite": suite.name,
        "prompts": f"{len(items)} prompts, sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}",
        "samples_per_prompt": samples,
        "seed": seed,
    }


def fingerprint(source: str) -> str:
    """A path with a digest of its files' names, sizes and both ends; a name on the Hub as it is."""
    from thalweg.checkpoints import hub

    path = Path(source)
    if not path.exists():
        path = hub.shipped(source) or path
    if not path.exists():
        return source
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    found = hashlib.sha256()
    for file in files:
        length = file.stat().st_size
        found.update(f"{file.relative_to(path)} {length}\n".encode())
        with file.open("rb") as content:
            found.update(content.read(EDGE))
            content.seek(max(EDGE, length - EDGE))
            found.update(content.read(EDGE))
    return f"{source}, sha256 {found.hexdigest()[:16]}"


def arms_of(folder: Path, adapted: bool, before: bool) -> list[Arm]:
    """What is drawn: one model, or one without and then with its LoRA."""
    from thalweg.diffusion.suites.pictures import Arm

    names = (["before"] if before else []) + ["after"] if adapted else ["pictures"]
    return [Arm(folder=folder, name=name) for name in names]


def compared(folder: Path, settings: Mapping[str, Any], pictures: Sequence[Picture]) -> Arm:
    """The pictures of another evaluation.

    Raises:
        ValueError: If there is none, it has other prompts or noises, or it is not finished.
    """
    from thalweg.diffusion.suites.pictures import Arm

    path = folder / SETTINGS
    if not path.is_file():
        raise ValueError(f"{folder} is no folder of thalweg evaluate --suite: it has no {SETTINGS}")
    theirs = json.loads(path.read_text(encoding="utf-8"))
    for name in ("suite", "prompts", "samples_per_prompt", "seed"):
        if theirs.get(name) != settings[name]:
            raise ValueError(
                f"{folder} cannot be compared with: its {name} is {theirs.get(name)}, here {settings[name]}"
            )
    arm = Arm(folder=folder, name="after" if theirs.get("lora") else "pictures")
    undone = sum(
        not (scores and arm.path(picture).is_file())
        for picture, scores in zip(pictures, arm.read(pictures), strict=True)
    )
    if undone:
        raise ValueError(f"{folder} lacks {undone} of {len(pictures)} pictures or scores; finish it first")
    return arm


def keep(folder: Path, settings: Mapping[str, Any], items: Sequence[Item]) -> None:
    """Write the settings, those of earlier rewards among them, and the prompts."""
    from thalweg.apps.results import write_json
    from thalweg.checkpoints.atomic import write_text

    path = folder / SETTINGS
    old = json.loads(path.read_text(encoding="utf-8"))["rewards"] if path.is_file() else {}
    write_json({**settings, "rewards": {**old, **settings["rewards"]}}, path)
    rows = [
        {"index": item.index, "split": item.split, "prompt": item.text, "metadata": dict(item.metadata)}
        for item in items
    ]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_text(folder / "prompts.jsonl", lines)


def paint(
    arm: Arm, pictures: Sequence[Picture], draw: Draw, rewards: Mapping[str, Reward], batch: int
) -> None:
    """Draw and score what is missing, with a progress bar."""
    from rich.progress import Progress

    from thalweg.diffusion.suites.pictures import complete

    with Progress() as bar:
        task = bar.add_task(arm.name, total=len(pictures))
        for done in complete(arm, pictures, draw, rewards, batch):
            bar.advance(task, done)
