"""What a scheduler's file says, checked, and what pipelines say about times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from thalweg.diffusion.schedules import NoiseSchedule
from thalweg.diffusion.solvers.linear import LinearSchedule
from thalweg.diffusion.solvers.schedule import SolverSchedule

FILE = "scheduler_config.json"
FAULTS = (ValueError, TypeError, AttributeError, KeyError, OverflowError)
"""What values of a wrong kind lead to, besides what is checked."""


class StoredScheduler(SchedulerMixin):
    """A scheduler whose file is read with errors that name it."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path | None = None,
        subfolder: str | None = None,
        return_unused_kwargs: bool = False,
        **kwargs: Any,
    ) -> Self | tuple[Self, dict[str, Any]]:
        """Read a scheduler from a folder, or from the Hub.

        Args:
            pretrained_model_name_or_path: Folder with a ``scheduler_config.json``, or a repository.
            subfolder: Of it.
            return_unused_kwargs: Give those of ``kwargs`` that are not used as well.
            kwargs: What is to differ from the file, and options of ``ConfigMixin.load_config``.

        Raises:
            ValueError: If the file is not JSON, is that of another scheduler, or says what no scheduler can
                do; the message names it.
            OSError: If there is no such file.
        """
        name = Path(str(pretrained_model_name_or_path))
        folder = name / (subfolder or "")
        place = str(folder / FILE) if name.is_dir() else str(folder)
        try:
            config, rest, _ = cls.load_config(  # type: ignore[attr-defined]
                pretrained_model_name_or_path,
                subfolder=subfolder,
                return_unused_kwargs=True,
                return_commit_hash=True,
                **kwargs,
            )
        except OSError as error:
            if "not a valid JSON" in str(error):
                raise ValueError(f"{place} is not JSON; it is cut off, or another file") from None
            raise
        if not isinstance(config, Mapping):
            raise ValueError(f"{place} holds {type(config).__name__}, not an object")
        found = config.get("_class_name", cls.__name__)
        if found != cls.__name__:
            raise ValueError(f"{place} is the configuration of {found}, not of {cls.__name__}")
        try:
            made: Self = cls.from_config(config, return_unused_kwargs=return_unused_kwargs, **rest)  # type: ignore[attr-defined]
        except FAULTS as error:
            raise ValueError(f"{place}: {error}") from None
        return made


def read_schedules(values: object) -> dict[int, SolverSchedule | LinearSchedule]:
    """Solver schedules by number of evaluations.

    Raises:
        ValueError: If they are not.
    """
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise ValueError(f"schedules are an object by number of evaluations, not {type(values).__name__}")
    found = {}
    for name, entry in values.items():
        if not str(name).isdecimal():
            raise ValueError(f"schedules are by number of evaluations, found {str(name)!r}")
        try:
            schedule = SolverSchedule.from_dict(entry)
        except FAULTS as error:
            raise ValueError(f"the schedule for {name} evaluations: {error}") from None
        if schedule.nfe != int(name):
            raise ValueError(f"the schedule for {name} evaluations has {schedule.nfe}")
        found[int(name)] = schedule
    return found


def read_noise(values: object) -> NoiseSchedule | None:
    """The noise schedule of a network.

    Raises:
        ValueError: If it is none.
    """
    if values is None:
        return None
    if not isinstance(values, Mapping):
        raise ValueError(f"noise_schedule is an object, not {type(values).__name__}")
    try:
        return NoiseSchedule.from_dict(values)
    except TypeError as error:
        raise ValueError(f"noise_schedule: {error}") from None


def plain_sigmas(sigmas: Sequence[float] | Tensor) -> int:
    """Number n of the sigmas 1, 1 - 1/n, .. 1/n.

    Raises:
        ValueError: For others.
    """
    values = np.asarray(sigmas, np.float64)
    plain = np.linspace(1, 1 / max(values.size, 1), values.size)
    if not values.size or values.shape != plain.shape or not np.abs(values - plain).max() <= 1e-6:
        raise ValueError("a searched schedule has times of its own: give num_inference_steps, not sigmas")
    return values.size
