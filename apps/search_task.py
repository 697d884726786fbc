"""What ``thalweg search`` is asked to do, and who evaluates for it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thalweg.diffusion.s3.fit import Path as TeacherPath
    from thalweg.diffusion.s3.pool import ObjectiveRef, Pool

FRESH, TEST, LEARN = 1_000_003, 2_000_003, 3_000_017
"""What is added to the seed for the noises of the finals, of the comparison, and of the refinement."""
PATHS = 16
"""Samples on whose paths dynamic programming looks for grids."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What to search for; the arguments of :func:`search`, checked."""

    model: str
    out: Path
    objective: str
    options: dict[str, Any]
    budget: int
    fit: int
    gits: bool
    samples: tuple[int, ...]
    fresh: int
    predictor: bool
    refine: int
    examples: int
    max_order: int
    seed: int


def check(task: Task, nfe: Sequence[int]) -> None:
    """Refuse what cannot be searched before anything is loaded.

    Raises:
        ValueError: Naming the option, its value and what is allowed.
    """
    from thalweg.checkpoints import hub
    from thalweg.diffusion.s3.objectives import OBJECTIVES
    from thalweg.diffusion.s3.samplers import draws_pixels

    if task.objective not in OBJECTIVES:
        raise ValueError(f"objective is {task.objective!r}, allowed: {', '.join(OBJECTIVES)}")
    if not nfe or min(nfe) < 1 or len(set(nfe)) != len(nfe):
        raise ValueError(f"nfe is {list(nfe)}, allowed: different numbers of at least 1")
    for name in ("budget", "fresh", "examples", "max_order"):
        if getattr(task, name) < 1:
            raise ValueError(f"{name} is {getattr(task, name)}, allowed: 1 and more")
    if not task.samples or task.samples[0] < 1:
        raise ValueError(f"samples is {list(task.samples)}, allowed: one or more numbers of at least 1")
    if task.fit < 0:
        raise ValueError(f"fit is {task.fit}, allowed: 0 (no fitted weights) and more")
    if task.refine < 0:
        raise ValueError(f"refine is {task.refine}, allowed: 0 (no gradients) and more")
    local = Path(task.model).is_dir() or hub.shipped(task.model) is not None
    if task.refine and local and not draws_pixels(task.model):
        raise ValueError(f"refine is {task.refine}, allowed: 0, since {task.model} does not denoise pixels")


def keep_settings(settings: dict[str, Any], path: Path) -> None:
    """Note the settings of a search, or see that they are those noted before.

    Raises:
        ValueError: If they are not.
    """
    from thalweg.apps.results import write_json

    settings = json.loads(json.dumps(settings))
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(settings, path)
    earlier = json.loads(path.read_text(encoding="utf-8"))
    changed = [f"{k}={earlier.get(k)} (now {v})" for k, v in settings.items() if earlier.get(k) != v]
    if changed:
        raise ValueError(f"{path.parent} holds a search with {', '.join(changed)}; choose another --out")


class Pools:
    """The workers of a search and, once they are needed, those of its finals.

    Args:
        task: What to search.
        name: Kind of pool.
        workers: Number of workers.
        devices: Their devices, in turn.
        options: More arguments of the pool.
    """

    def __init__(
        self, task: Task, name: str, workers: int, devices: tuple[str, ...], options: dict[str, Any]
    ) -> None:
        self.task, self.workers, self.devices, self.options = task, workers, devices, options
        self.name = ("inline" if workers == 1 else "process") if name == "auto" else name
        self._made: dict[int, Pool] = {}
        self._learning: tuple[Any, Any] | None = None
        self._path: TeacherPath | None = None

    def get(self, offset: int, count: int) -> Pool:
        """Workers that judge on ``count`` noises of the seed plus ``offset``."""
        from thalweg.diffusion.s3.pools import make_pool

        if offset not in self._made:
            reference = objective_of(self.task, offset, count, fit=bool(self.task.fit) and offset == 0)
            self._made[offset] = make_pool(self.name, reference, self.workers, self.devices, **self.options)
        return self._made[offset]

    def learning(self, device: str) -> tuple[Any, Any]:
        """Denoiser and examples of the refinement, made once for all numbers of evaluations."""
        from thalweg.diffusion.s3.image_model import image_examples

        if self._learning is None:
            options = {name: value for name, value in self.task.options.items() if name == "teacher_steps"}
            scale = self.task.options["guidance_scale"]
            options["guidance_scale"] = 1.0 if scale is None else scale
            self._learning = image_examples(
                device, self.task.model, count=self.task.examples, seed=self.task.seed + LEARN, **options
            )
        return self._learning

    def path(self, device: str) -> TeacherPath:
        """A fine solver's path of a few samples, made once for all numbers of evaluations."""
        from thalweg.diffusion.s3.image_model import TEACHER_STEPS
        from thalweg.diffusion.s3.samplers import open_sampler

        if self._path is None:
            known = inspect.signature(open_sampler).parameters
            options = {name: value for name, value in self.task.options.items() if name in known}
            sampler = open_sampler(device, **options, count=PATHS, seed=self.task.seed + LEARN)
            self._path = sampler.path(self.task.options.get("teacher_steps", TEACHER_STEPS))
        return self._path

    def close(self) -> None:
        """Let go of all workers."""
        for pool in self._made.values():
            pool.close()


def objective_of(task: Task, offset: int, count: int, fit: bool = False) -> ObjectiveRef:
    """How a worker makes the objective on ``count`` noises, able to fit weights or not."""
    from thalweg.diffusion.s3.objectives import OBJECTIVES
    from thalweg.diffusion.s3.pool import ObjectiveRef
    from thalweg.diffusion.s3.samplers import FITTED

    options = {**task.options, "count": count, "seed": task.seed + offset}
    function = OBJECTIVES[task.objective]
    if fit:
        options, function = {**options, "objective": function}, FITTED
    return ObjectiveRef(function=function, options=options)
