"""A step of SearchedScheduler never waits for the device: no value of a tensor reaches Python."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from pipeline_schedules import STEPS, same, searched
from tiny_pipelines import PIPELINES, build, inputs
from torch.utils._python_dispatch import TorchDispatchMode

WAITING = {"aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero", "aten.equal", "aten.masked_select"}


class NoWaiting(TorchDispatchMode):
    """Refuses what a GPU would have to be waited for, and counts the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__str__()
        devices = {x.device.type for x in args if isinstance(x, torch.Tensor)}
        target = (kwargs or {}).get("device")
        if name in WAITING or (name == "aten._to_copy" and target and target.type not in devices):
            raise AssertionError(f"{name} waits for the device")
        self.operations.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def watched(scheduler: Any, skip: int = 0) -> Iterator[list[list[str]]]:
    """Operations of every step but the first few."""
    plain, seen, calls = scheduler.step, [], 0

    def step(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls <= skip:
            return plain(*args, **options)
        with NoWaiting() as mode:
            result = plain(*args, **options)
        seen.append(mode.operations)
        return result

    scheduler.step = step
    try:
        yield seen
    finally:
        del scheduler.step


@pytest.mark.parametrize("theirs", [DDIMScheduler(), FlowMatchEulerDiscreteScheduler(shift=3.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_on_a_device_reads_nothing_back(theirs: Any, dtype: torch.dtype) -> None:
    """On the device "meta" tensors have no values, so that whatever asks for one fails."""
    scheduler = searched(theirs)
    scheduler.set_timesteps(STEPS, device="meta")
    state = torch.empty(2, 4, 8, 8, device="meta", dtype=dtype)
    with watched(scheduler) as steps:
        for t in scheduler.timesteps:
            state = scheduler.step(torch.empty_like(state), t, state).prev_sample
    assert len(steps) == STEPS
    copies = {"aten._to_copy"} if dtype == torch.bfloat16 else set()
    for operations in steps[1:]:
        # The two that compute; views cost nothing on the device.
        assert {"aten.add", "aten.addmv"} <= set(operations)
        assert set(operations) <= {"aten.add", "aten.addmv", "aten.view", "aten.slice", "aten.t"} | copies


def test_the_check_finds_waiting() -> None:
    with pytest.raises(AssertionError, match=r"aten\.nonzero waits"), NoWaiting():
        torch.ones(3).nonzero()
    with pytest.raises(AssertionError, match=r"aten\._local_scalar_dense waits"), NoWaiting():
        bool(torch.ones(1) > 0)
    theirs = DPMSolverMultistepScheduler()
    theirs.set_timesteps(STEPS)
    x = torch.ones(1, 1, 2, 2)
    with watched(theirs), pytest.raises(AssertionError, match="waits for the device"):
        theirs.step(x, theirs.timesteps[0], x)


@pytest.mark.parametrize("name", PIPELINES)
def test_steps_in_pipelines_read_nothing_back(name: str, tmp_path: Path) -> None:
    """On the CPU the first step may look at its label, which costs nothing there."""
    pipe = build(name, tmp_path)
    pipe.scheduler = same(pipe.scheduler)
    with watched(pipe.scheduler, skip=1) as steps:
        pipe(**inputs(name), num_inference_steps=STEPS)
    assert len(steps) == STEPS - 1
