"""Images from any diffusers pipeline, each from a random generator of its own, with any scheduler.

Image i starts from ``torch.Generator().manual_seed(seed + i)`` on the CPU, so it depends neither on how many
are drawn at once nor on the device, but for the rounding of the network.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from thalweg.checkpoints import hub
from thalweg.diffusion.from_diffusers import network_of
from thalweg.diffusion.library import like, steps_for
from thalweg.diffusion.loading import call_options
from thalweg.diffusion.solvers.levels import level_of_label
from thalweg.diffusion.solvers.schedule import SolverSchedule

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin
    from PIL.Image import Image

    from thalweg.diffusion.solvers.scheduler import SearchedScheduler

Content = int | str | None
"""What an image is to show: a class, a prompt, or nothing in particular."""
Takes = Literal["prompts", "classes", "neither"]
ALL_CLASSES = 20
"""Most classes that are drawn when none is named."""
TOLERANCE = 1e-3
"""Largest difference of alpha and sigma between a schedule and its network, and of the scale of noise."""


def open_pipeline(
    name: str, dtype: torch.dtype | Mapping[str, torch.dtype] = torch.float32, revision: str | None = None
) -> DiffusionPipeline:
    """A pipeline from a folder, one that is shipped, or the Hub; classes come as our ``ClassImagePipeline``.

    Args:
        name: Folder, or owner/name on the Hub.
        dtype: Precision of all parts, or by name of a part, with ``default`` for the others.
        revision: Of a repository on the Hub.

    Raises:
        ValueError: If there is no such folder, or it holds no pipeline.
    """
    from diffusers import DiffusionPipeline

    from thalweg.diffusion.loading import import_parts, keep_call, quiet
    from thalweg.diffusion.pipeline import ClassImagePipeline

    folder = Path(name)
    if not folder.exists() and (shipped := hub.shipped(name)) is not None:
        folder, name = shipped, str(shipped)
    if folder.suffix == ".ckpt":
        raise ValueError(f"{name} is a checkpoint: thalweg export --ckpt {name} --to FOLDER makes a pipeline")
    if folder.is_file():
        raise ValueError(
            f"{name} is a file; from_single_file(...).save_pretrained(FOLDER) of its class in "
            "diffusers makes a folder of it"
        )
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise ValueError(f"{name} is no pipeline's folder: it has no model_index.json")
    if not folder.exists() and (folder.is_absolute() or name.count("/") != 1 or name.startswith(".")):
        raise ValueError(f"there is no folder {name}, and it is no owner/name of one on the Hub either")
    try:
        config = DiffusionPipeline.load_config(name, revision=revision)
        import_parts(config)
        found = config["_class_name"]
        # parts that it was saved without, such as the T5 encoder of Stable Diffusion 3
        absent = {key: None for key, value in config.items() if value == [None, None]}
        ours = (found[-1] if isinstance(found, list) else found) == ClassImagePipeline.__name__
        kind = ClassImagePipeline if ours else DiffusionPipeline
        with quiet():
            pipe = kind.from_pretrained(name, dtype=dtype, revision=revision, **absent)
    except OSError as error:
        raise ValueError(f"{name} is neither a folder nor a pipeline that the Hub gives: {error}") from None
    keep_call(pipe, config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def dtype_of(name: str) -> torch.dtype:
    """A precision by name.

    Raises:
        ValueError: For another name.
    """
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ValueError(f"dtype is {name!r}, allowed: {', '.join(known)}")
    return known[name]


def takes(pipe: DiffusionPipeline) -> Takes:
    """What a pipeline wants to be told about its images.

    Raises:
        ValueError: If it wants an image to start from.
    """
    known = inspect.signature(pipe.__call__).parameters
    if "image" in known and "strength" in known:
        raise ValueError(f"{type(pipe).__name__} starts from an image; this draws from noise")
    if "prompt" in known:
        return "prompts"
    with_classes = "class_labels" in known and pipe.config.get("null_label", 0) is not None
    return "classes" if with_classes else "neither"


def contents(
    pipe: DiffusionPipeline,
    classes: Sequence[int | str] | None = None,
    prompts: Sequence[str] | None = None,
    count: int = 1,
) -> list[Content]:
    """What each image is to show: ``count`` of every class or prompt, or ``count`` in all.

    Raises:
        ValueError: For prompts where the pipeline takes classes and the reverse, and for unknown classes.
    """
    name, kind = type(pipe).__name__, takes(pipe)
    for word, given in (("prompts", prompts), ("classes", classes)):
        if given is not None and kind != word:
            wanted = "neither classes nor prompts" if kind == "neither" else kind
            raise ValueError(f"{name} takes {wanted}, but {word} were given")
    if count < 1:
        raise ValueError(f"count is {count}, allowed: 1 and more")
    if kind == "prompts":
        if not prompts:
            raise ValueError(f"{name} takes prompts, but none was given")
        return [prompt for prompt in prompts for _ in range(count)]
    if kind == "neither":
        return [None] * count
    table = class_table(pipe)
    if classes is None:
        classes = sorted(set(table.values()))
        if len(classes) > ALL_CLASSES:
            raise ValueError(f"{name} knows {len(classes)} classes: say which to draw")
    for given in classes:
        if given not in table:
            names = list(dict.fromkeys(map(str, table)))
            known = ", ".join(names[: 2 * ALL_CLASSES])
            more = ", ..." if len(names) > 2 * ALL_CLASSES else ""
            raise ValueError(f"class {given!r} is unknown, allowed: {known}{more}")
    return [table[given] for given in classes for _ in range(count)]


def class_table(pipe: DiffusionPipeline) -> dict[int | str, int]:
    """Labels by label and by name."""
    if "class_names" in pipe.config:
        names = {name: label for label, name in enumerate(pipe.config["class_names"])}
        count = int(pipe.config["null_label"])
    else:  # DiTPipeline
        names = dict(getattr(pipe, "labels", {}))
        count = int(network(pipe).config["num_embeds_ada_norm"])
    return {**names, **{label: label for label in range(count)}}


def network(pipe: DiffusionPipeline) -> torch.nn.Module:
    """The network that is evaluated in every step.

    Raises:
        ValueError: If the pipeline has none that is known.
    """
    for name in ("unet", "transformer", "prior"):
        if isinstance(found := getattr(pipe, name, None), torch.nn.Module):
            return found
    raise ValueError(f"{type(pipe).__name__} has neither a unet nor a transformer")


def choose_scheduler(pipe: DiffusionPipeline, source: str) -> SchedulerMixin:
    """A scheduler for a pipeline.

    Args:
        pipe: The pipeline, whose own scheduler tells noise schedule and prediction of the network.
        source: Folder of a scheduler (``thalweg search`` writes OUT/scheduler; OUT will do), JSON file of a
            solver schedule, or class of diffusers such as ``UniPCMultistepScheduler``.

    Raises:
        ValueError: If there is no such scheduler, or it is for another network.
    """
    import diffusers

    from thalweg.diffusion.solvers.scheduler import SearchedScheduler

    path = Path(source)
    if path.is_dir():
        places = [path, path / "scheduler"]
        folder = next((place for place in places if (place / "scheduler_config.json").is_file()), None)
        if folder is None:
            raise ValueError(f"{source} is no scheduler's folder: it has no scheduler_config.json")
        try:
            name = json.loads((folder / "scheduler_config.json").read_text())["_class_name"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{folder / 'scheduler_config.json'} is no scheduler's file: {error!r}"
            ) from None
        if name != SearchedScheduler.__name__:
            return _class(str(name)).from_pretrained(folder)
        found = SearchedScheduler.from_pretrained(folder)
        check_network(found, pipe.scheduler.config)
        return found
    if path.is_file():
        return scheduler_of(pipe.scheduler.config, [SolverSchedule.load(path)])
    if not source.isidentifier() or not hasattr(diffusers, source):
        known = [cls.__name__ for cls in pipe.scheduler.compatibles]
        raise ValueError(
            f"scheduler {source!r} is no folder, no file and no class of diffusers; those for this pipeline:"
            f" {', '.join(sorted(known)) or 'unknown'}"
        )
    return like(pipe.scheduler.config, _class(source))


def _class(name: str) -> Any:
    import diffusers

    found = getattr(diffusers, name, None)
    if not (inspect.isclass(found) and issubclass(found, diffusers.SchedulerMixin)):
        raise ValueError(f"{name!r} is no scheduler of diffusers")
    return found


def scheduler_of(config: Mapping[str, Any], schedules: Sequence[Any]) -> SearchedScheduler:
    """Solver schedules as a scheduler for the network of another scheduler's configuration.

    Raises:
        ValueError: If they are for another network.
    """
    from thalweg.diffusion.from_diffusers import KINDS
    from thalweg.diffusion.solvers.scheduler import SearchedScheduler

    noise, kind = network_of(config)
    names = {kind: name for name, kind in KINDS.items()}
    found = SearchedScheduler.from_schedules(
        schedules,
        prediction_type=names[kind],
        num_train_timesteps=config.get("num_train_timesteps", 1000),
        noise_schedule=noise.to_dict(),
    )
    check_network(found, config)
    return found


def check_network(scheduler: SearchedScheduler, config: Mapping[str, Any]) -> None:
    """Make sure that solver schedules are for the network of a scheduler's configuration.

    Raises:
        ValueError: If the prediction, or alpha and sigma at a node, are different ones. These are known by
            the time of the node, or by its label, which refinement may have moved away.
    """
    from thalweg.diffusion.from_diffusers import KINDS

    noise, kind = network_of(config)
    said = scheduler.config.prediction_type
    if KINDS[said] != kind:
        names = {kind: name for name, kind in KINDS.items()}
        raise ValueError(f"the schedule is for networks of {said}, but the pipeline's gives {names[kind]}")
    values = noise.to_dict()
    for nfe, schedule in scheduler.schedules.items():
        for i, node in enumerate(schedule.nodes[:-1]):
            if i == 0 and schedule.first != "network":
                continue
            label = node.t if node.label is None else node.label
            alpha, sigma = level_of_label(values, float(label or 0.0))
            known = [(alpha, sigma)]
            if node.t is not None:
                known.append((float(noise.alpha(node.t)), float(noise.sigma(node.t))))
            if min(max(abs(a - node.alpha), abs(s - node.sigma)) for a, s in known) > TOLERANCE:
                raise ValueError(
                    f"the schedule for {nfe} evaluations is for another noise schedule: at node {i} (label"
                    f" {label:g}) it has alpha {node.alpha:.4f} and sigma {node.sigma:.4f}, the pipeline's"
                    f" network {alpha:.4f} and {sigma:.4f}"
                )


def set_scheduler(pipe: DiffusionPipeline, scheduler: SchedulerMixin) -> None:
    """Give a pipeline a scheduler.

    Raises:
        ValueError: If the pipeline does not treat it as it needs to be.
    """
    from diffusers import DDPMPipeline, DiTPipeline

    name, where = type(scheduler).__name__, type(pipe).__name__
    scale = float(getattr(scheduler, "init_noise_sigma", 1.0))
    if isinstance(pipe, DDPMPipeline | DiTPipeline) and abs(scale - 1) > TOLERANCE:
        raise ValueError(f"{where} does not scale noise, which {name} needs (by {scale:.4g}); use another")
    if isinstance(pipe, DDPMPipeline) and "generator" not in inspect.signature(scheduler.step).parameters:
        raise ValueError(f"{where} gives its generator to every step, but {name} takes none; use another")
    pipe.scheduler = scheduler


def draw(
    pipe: DiffusionPipeline,
    shown: Sequence[Content],
    *,
    nfe: int,
    seed: int = 0,
    batch: int = 16,
    **options: Any,
) -> Iterator[list[Image]]:
    """Draw images in batches.

    Args:
        pipe: Pipeline with its scheduler.
        shown: What each image is to show, from :func:`contents`.
        nfe: Evaluations of the network per image.
        seed: Image i has the generator of ``seed + i``.
        batch: Images at once.
        options: For the pipeline; those that are None are left to it.

    Raises:
        ValueError: If the scheduler cannot do with ``nfe`` evaluations, or the pipeline knows no such option.
    """
    if batch < 1:
        raise ValueError(f"batch is {batch}, allowed: 1 and more")
    kind, known = takes(pipe), inspect.signature(pipe.__call__).parameters
    asked = {name: value for name, value in options.items() if value is not None}
    given: dict[str, Any] = {**call_options(pipe), **asked}
    for name in given:
        if name not in known:
            raise ValueError(f"{type(pipe).__name__} has no option {name}")
    given["num_inference_steps"] = steps_for(pipe.scheduler, nfe)
    for start in range(0, len(shown), batch):
        part = shown[start : start + batch]
        words = {"prompts": "prompt", "classes": "class_labels"}
        subject = {"batch_size": len(part)} if kind == "neither" else {words[kind]: list(part)}
        if "negative_prompt" in given:
            subject["negative_prompt"] = [given["negative_prompt"]] * len(part)
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        yield pipe(**{**given, **subject}, generator=generators, output_type="pil").images
