"""Schedulers of diffusers for a network: none is forgotten, and each evaluates as often as it is told."""

import inspect
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from torch import Tensor

from thalweg.diffusion import library
from thalweg.diffusion.library import library_schedulers, like, run_library, steps_for
from thalweg.diffusion.schedules import Flow
from thalweg.diffusion.solvers.named import named
from thalweg.diffusion.solvers.schedule import Node
from thalweg.diffusion.solvers.scheduler import SearchedScheduler

BETAS = DDIMScheduler(clip_sample=False, timestep_spacing="trailing").config
FLOW = FlowMatchEulerDiscreteScheduler(shift=3.0).config
X_T = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0))


def test_every_scheduler_of_diffusers_is_listed_or_left_out_for_a_reason() -> None:
    classes = {
        name
        for name in dir(diffusers)
        if name.endswith("Scheduler") and inspect.isclass(getattr(diffusers, name))
    }
    listed = {family for family, _ in (*library.BETAS, *library.FLOWS, *library.EDMS)}
    assert classes - listed == set(library.LEFT_OUT)


def counted(entry: Any, nfe: int) -> int:
    """Evaluations that are made."""
    calls = 0

    def network(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        nonlocal calls
        calls += 1
        return 0.3 * x

    with suppress(ArithmeticError):  # some are at fault, see below
        assert run_library(entry, network, X_T, nfe=nfe).shape == X_T.shape
    return calls


def one_of_each(config: Mapping[str, Any]) -> list[library.LibraryScheduler]:
    return list({entry.family: entry for entry in library_schedulers(config).values()}.values())


@pytest.mark.parametrize("config", [BETAS, FLOW], ids=["betas", "flow"])
@pytest.mark.parametrize("nfe", [5, 14])
def test_a_variant_of_each_makes_the_evaluations_asked_for(config: Mapping[str, Any], nfe: int) -> None:
    for entry in one_of_each(config):
        if nfe == 5 and entry.family == "PNDMScheduler":
            assert "near it: 13, 14" in error_of(entry, 5)
        elif nfe == 14 and ("Heun" in entry.family or "KDPM2" in entry.family):
            assert "near it: 13, 15" in error_of(entry, 14)
        else:
            assert counted(entry, nfe) == nfe, entry.name


def error_of(entry: library.LibraryScheduler, nfe: int) -> str:
    with pytest.raises(ValueError, match="cannot ask the network") as error:
        entry.steps(nfe)
    return str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("config", [BETAS, FLOW], ids=["betas", "flow"])
@pytest.mark.parametrize("nfe", [5, 6, 8, 15])
def test_every_variant_makes_the_evaluations_asked_for(config: Mapping[str, Any], nfe: int) -> None:
    for entry in library_schedulers(config).values():
        try:
            entry.steps(nfe)
        except ValueError:
            continue
        assert counted(entry, nfe) == nfe, entry.name


@pytest.mark.parametrize(
    ("name", "nfe"),
    [
        ("UniPCMultistep bh1 2 trailing", 5),  # minus infinity times zero at sigma 0
        ("DPMSolverMultistep dpmsolver++ 2M heun karras sigma_min", 15),  # the last step has no length
    ],
)
def test_faults_of_diffusers_are_errors_and_not_images(name: str, nfe: int) -> None:
    with pytest.raises(ArithmeticError, match=f"with {nfe} evaluations gives values that are not finite"):
        run_library(library_schedulers(BETAS)[name], lambda x, t, c: 0.3 * x, X_T, nfe=nfe)


def test_ddim_and_euler_of_flow_are_the_named_solvers_on_their_nodes() -> None:
    scheduler = library_schedulers(BETAS)["DDIM trailing"].make()
    scheduler.set_timesteps(5)
    levels = [float(scheduler.alphas_cumprod[t]) for t in scheduler.timesteps] + [1.0]
    labels = [float(t) for t in scheduler.timesteps] + [None]
    nodes = [Node(alpha=a**0.5, sigma=(1 - a) ** 0.5, label=t) for a, t in zip(levels, labels)]
    agree(BETAS, "DDIM trailing", SearchedScheduler.from_schedules([named("ddim", nodes)]))
    flow = library_schedulers(FLOW)["FlowMatchEulerDiscrete"].make()
    flow.set_timesteps(5)
    nodes = [Node(alpha=1 - s, sigma=s, label=1000 * s) for s in flow.sigmas.tolist()]
    ours = SearchedScheduler.from_schedules([named("flow_euler", nodes)], prediction_type="flow_prediction")
    agree(FLOW, "FlowMatchEulerDiscrete", ours)


def agree(config: Mapping[str, Any], name: str, ours: SchedulerMixin) -> None:
    def network(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        return torch.sin(x) * (1 - t.float() / 2000)

    theirs = run_library(library_schedulers(config)[name], network, X_T, nfe=5)
    torch.testing.assert_close(library.sample_with(ours, network, X_T, None, 5), theirs, rtol=0, atol=1e-4)


def test_added_noise_comes_from_the_seed() -> None:
    for name in ("EulerAncestralDiscrete trailing", "DPMSolverMultistep sde-dpmsolver++ 2M midpoint lu"):
        entry = library_schedulers(BETAS)[name]
        ends = [run_library(entry, lambda x, t, c: 0.3 * x, X_T, nfe=5, seed=seed) for seed in (1, 1, 2)]
        assert torch.equal(ends[0], ends[1])
        assert not torch.equal(ends[0], ends[2])


def test_our_scheduler_can_be_exchanged_for_one_of_diffusers() -> None:
    nodes = [Node(alpha=1 - s, sigma=s, label=1000 * s) for s in (1.0, 0.6, 0.2, 0.0)]
    ours = SearchedScheduler.from_schedules(
        [named("flow_euler", nodes)], prediction_type="flow_prediction", noise_schedule=Flow().to_dict()
    )
    assert steps_for(ours, 3) == 3
    with pytest.raises(ValueError, match="no schedule for 4 evaluations"):
        steps_for(ours, 4)
    made = like(ours.config, diffusers.UniPCMultistepScheduler)
    assert made.config.use_flow_sigmas
    with pytest.raises(ValueError, match="EulerDiscreteScheduler is not for networks that predict flow"):
        like(ours.config, diffusers.EulerDiscreteScheduler)
    with pytest.raises(ValueError, match="scheduler 'DDIM' is unknown, allowed: DDIM trailing"):
        run_library("DDIM", diffusers.DDPMPipeline(None, DDIMScheduler()), X_T, nfe=4)
