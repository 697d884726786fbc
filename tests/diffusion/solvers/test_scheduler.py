"""SearchedScheduler: the plain sampler behind diffusers' interface, in pipelines, saved, from the middle."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, UNet2DModel
from golden import golden_files
from torch import Tensor

from thalweg.diffusion.schedules import VE, Flow, NoiseSchedule, VPDiscrete
from thalweg.diffusion.solvers.levels import level_of_label
from thalweg.diffusion.solvers.sample import sample
from thalweg.diffusion.solvers.schedule import Corrector, Derivative, Node, SolverSchedule, Step, multistep
from thalweg.diffusion.solvers.scheduler import SearchedScheduler
from thalweg.diffusion.solvers.tail import from_node

VP, FLOW = VPDiscrete(), Flow(shift=3.0)
(GOLDEN,) = golden_files("s3", "usf_cases.json")


def nodes(noise: NoiseSchedule, count: int, end: bool) -> tuple[Node, ...]:
    times = np.linspace(1.0, 0.05, count + (not end))
    found = [
        Node(
            alpha=float(noise.alpha(t)), sigma=float(noise.sigma(t)), t=float(t), label=float(noise.label(t))
        )
        for t in times
    ]
    return (*found, Node(alpha=1.0, sigma=0.0)) if end else tuple(found)


def mixed(noise: NoiseSchedule, count: int, end: bool = True) -> SolverSchedule:
    """Orders 1 to 3, both predictions, a corrector, and data prediction of first order at the end."""
    steps = []
    for i in range(count):
        order = 1 if i == count - 1 else min(i + 1, 3)
        prediction = "noise" if i % 3 == 2 else "data"
        corrector = None
        if i == 1:
            corrector = Corrector(order=2, derivatives=(Derivative(k=1, nodes=(2,)),))
        steps.append(
            Step(
                start=i,
                prediction=prediction,
                order=order,
                derivatives=multistep(order, i),
                corrector=corrector,
            )
        )
    return SolverSchedule(nodes=nodes(noise, count, end), steps=tuple(steps))


def data(x: Tensor, node: Node) -> Tensor:
    """Denoiser of a Gaussian with mean 0.5 and variance 0.3, bent a little."""
    gain = 0.3 * node.alpha / (0.3 * node.alpha**2 + node.sigma**2)
    return 0.5 + gain * (x - 0.5 * node.alpha) + 0.1 * torch.sin(x)


def output(kind: str, x: Tensor, node: Node) -> Tensor:
    x0 = data(x, node)
    noise = (x - node.alpha * x0) / node.sigma
    return {
        "epsilon": noise,
        "sample": x0,
        "v_prediction": node.alpha * noise - node.sigma * x0,
        "flow_prediction": noise - x0,
    }[kind]


def drive(scheduler: SearchedScheduler, kind: str, x: Tensor, schedule: SolverSchedule) -> list[Tensor]:
    states = [x]
    for t, node in zip(scheduler.timesteps, schedule.nodes):
        inputs = scheduler.scale_model_input(states[-1], t)
        states.append(scheduler.step(output(kind, inputs, node), t, states[-1]).prev_sample)
    return states


@pytest.mark.parametrize("noise", [VP, FLOW], ids=["vp", "flow"])
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "flow_prediction"])
def test_every_kind_of_network_gives_the_states_of_the_plain_sampler(noise: NoiseSchedule, kind: str) -> None:
    if noise is FLOW and kind == "epsilon":
        pytest.skip("a noise prediction at pure noise says nothing about the data")
    schedule = mixed(noise, 7)
    scheduler = SearchedScheduler.from_schedules([schedule], prediction_type=kind)
    scheduler.set_timesteps(7)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    for ours, plain in zip(drive(scheduler, kind, x, schedule), sample(schedule, data, x), strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-10)


def golden_vp() -> list[SolverSchedule]:
    cases = json.loads(GOLDEN.read_text())["cases"]
    return [SolverSchedule.from_dict({k: c[k] for k in ("nodes", "steps", "v3") if k in c}) for c in cases]


def test_every_recorded_decision_vector_runs_as_a_scheduler() -> None:
    for schedule in golden_vp():
        scheduler = SearchedScheduler.from_schedules([schedule], prediction_type="sample")
        scheduler.set_timesteps(schedule.nfe)
        x = torch.randn(2, 3, 2, 2, dtype=torch.float64)
        last = drive(scheduler, "sample", x, schedule)[-1]
        torch.testing.assert_close(last, sample(schedule, data, x)[-1], rtol=1e-8, atol=1e-8)


def test_the_ring_is_as_long_as_the_schedule_looks_back() -> None:
    schedule = mixed(VP, 12)
    scheduler = SearchedScheduler.from_schedules([schedule])
    scheduler.set_timesteps(12)
    drive(scheduler, "epsilon", torch.randn(1, 3, 2, 2), schedule)
    assert scheduler._run is not None
    assert 3 <= len(scheduler._run.rows) <= 5


def test_a_run_that_begins_again_uses_its_memory_and_nothing_that_lies_in_it() -> None:
    schedule = mixed(VP, 6)
    scheduler = SearchedScheduler.from_schedules([schedule])
    x = torch.randn(2, 3, 2, 2)
    results, rings = [], []
    for start in (x, 1e30 * x, x, x.double(), x):
        scheduler.set_timesteps(6)
        results.append(drive(scheduler, "epsilon", start, schedule)[-1])
        rings.append(scheduler._run.rows[0].data_ptr())
    assert rings[0] == rings[1] == rings[2]
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[0], results[4])
    torch.testing.assert_close(results[3].float(), results[0])
    with torch.inference_mode():
        scheduler.set_timesteps(6)
        drive(scheduler, "epsilon", x, schedule)
    scheduler.set_timesteps(6)
    assert torch.equal(drive(scheduler, "epsilon", x, schedule)[-1], results[0])


def test_half_precision_rounds_the_interface_and_not_the_state() -> None:
    """The same half-precision outputs, fed to a run in float64, lead to the same state."""
    schedule = mixed(VP, 20, end=False)
    half, double = (SearchedScheduler.from_schedules([schedule], prediction_type="sample") for _ in range(2))
    state = torch.randn(8, 3, 8, 8).bfloat16()
    wide = state.double()
    for t, node in zip(half.timesteps, schedule.nodes):
        out = data(state, node).bfloat16()
        state, wide = half.step(out, t, state).prev_sample, double.step(out, t, wide).prev_sample
        assert state.dtype == torch.bfloat16
    assert half._run is not None
    assert half._run.state.dtype == torch.float32
    torch.testing.assert_close(half._run.state.double(), wide, rtol=0, atol=2e-5)
    assert (state.double() - wide).abs().max() > 1e-3


def test_a_state_that_the_pipeline_has_changed_is_honoured() -> None:
    schedule = mixed(VP, 6)
    scheduler = SearchedScheduler.from_schedules([schedule], prediction_type="sample")
    for change in (lambda x: x + 1, lambda x: x.add_(1)):
        scheduler.set_timesteps(6)
        state = torch.randn(1, 3, 2, 2)
        for i, (t, node) in enumerate(zip(scheduler.timesteps, schedule.nodes)):
            if i == 3:
                before = scheduler.step(data(state, node), t, state.clone()).prev_sample
                scheduler._run.index -= 1
                state = change(state)
                ratio = schedule.compile().steps()[0][3]
                after = scheduler.step(data(state - 1, node), t, state).prev_sample
                torch.testing.assert_close(after - before, torch.full_like(after, ratio))
                break
            state = scheduler.step(data(state, node), t, state).prev_sample


def test_image_to_image_starts_in_the_middle() -> None:
    schedule = mixed(VP, 8)
    scheduler = SearchedScheduler.from_schedules([schedule], prediction_type="sample")
    x0, noise = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64)
    for by_index in (True, False):
        scheduler.set_timesteps(8)
        rest = scheduler.timesteps[3:]
        if by_index:
            scheduler.set_begin_index(3)
        state = scheduler.add_noise(x0, noise, rest[:1])
        node = schedule.nodes[3]
        torch.testing.assert_close(state, node.alpha * x0 + node.sigma * noise)
        truth = sample(from_node(schedule, 3), data, state)[-1]
        for t, at in zip(rest, schedule.nodes[3:]):
            state = scheduler.step(data(state, at), t, state).prev_sample
        torch.testing.assert_close(state, truth, rtol=0, atol=1e-10)


def test_the_part_from_every_node_is_a_schedule_of_its_own() -> None:
    for schedule in golden_vp():
        for begin in range(len(schedule.steps)):
            part = from_node(schedule, begin)
            assert part.nodes == schedule.nodes[begin:]
            part.compile()


def test_noise_is_added_at_labels_between_the_nodes() -> None:
    for noise in (VP, FLOW):
        scheduler = SearchedScheduler.from_schedules([mixed(noise, 5)], noise_schedule=noise.to_dict())
        t = np.array([0.33, 0.71])
        x0, e = torch.randn(2, 2, 1, 2, 2, dtype=torch.float64)
        found = scheduler.add_noise(x0, e, torch.tensor(noise.label(t)))
        alpha, sigma = (torch.tensor(f(t)).view(2, 1, 1, 1) for f in (noise.alpha, noise.sigma))
        torch.testing.assert_close(found, alpha * x0 + sigma * e, rtol=1e-6, atol=1e-6)
        assert torch.equal(found, scheduler.scale_noise(x0, torch.tensor(noise.label(t)), e))


@pytest.mark.parametrize("kind", ["sigma", "edm"])
def test_labels_of_exploding_noise_are_turned_back(kind: str) -> None:
    noise = VE(label_kind=kind)
    for t in (0.002, 1.0, 80.0):
        found = level_of_label(noise.to_dict(), float(noise.label(t)))
        assert found == pytest.approx((1.0, t), rel=1e-12)


def test_saved_schedules_come_back_whole(tmp_path: Path) -> None:
    schedules = [mixed(VP, n) for n in (4, 6)]
    scheduler = SearchedScheduler.from_schedules(schedules, noise_schedule=VP.to_dict(), clip_data=1.0)
    scheduler.save_pretrained(tmp_path)
    json.loads((tmp_path / "scheduler_config.json").read_text(), parse_constant=pytest.fail)
    back = SearchedScheduler.from_pretrained(tmp_path)
    assert dict(back.schedules) == {4: schedules[0], 6: schedules[1]}
    assert back.config.clip_data == 1.0


def unet() -> UNet2DModel:
    return UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
    ).eval()


def test_a_pipeline_saved_with_it_samples_the_same_when_loaded(tmp_path: Path) -> None:
    scheduler = SearchedScheduler.from_schedules([mixed(VP, 4), mixed(VP, 6)])
    pipeline = DDPMPipeline(unet(), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    run: dict[str, Any] = {"batch_size": 2, "num_inference_steps": 6, "output_type": "np"}
    images = pipeline(**run, generator=torch.Generator().manual_seed(3)).images
    pipeline.save_pretrained(tmp_path)
    loaded = DDPMPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert isinstance(loaded.scheduler, SearchedScheduler)
    again = loaded(**run, generator=torch.Generator().manual_seed(3)).images
    assert np.array_equal(images, again)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    network = pipeline.unet

    def denoise(state: Tensor, node: Node) -> Tensor:
        with torch.no_grad():
            noise = network(state.float(), torch.tensor(node.label, dtype=torch.float32)).sample
        return (state - node.sigma * noise) / node.alpha

    truth = (sample(mixed(VP, 6), denoise, x)[-1] / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    np.testing.assert_allclose(images, truth.numpy(), atol=1e-4)


def test_clipped_predictions_are_those_that_are_combined() -> None:
    schedule = mixed(VP, 6)
    scheduler = SearchedScheduler.from_schedules([schedule], clip_data=0.4)
    scheduler.set_timesteps(6)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    ours = drive(scheduler, "epsilon", x, schedule)[-1]
    truth = sample(schedule, lambda state, node: data(state, node).clamp(-0.4, 0.4), x)[-1]
    torch.testing.assert_close(ours, truth, rtol=0, atol=1e-10)


def test_mistakes_are_one_clear_error() -> None:
    schedule = mixed(VP, 4)
    scheduler = SearchedScheduler.from_schedules([schedule])
    with pytest.raises(ValueError, match="no schedule for 5 evaluations; there are: 4"):
        scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match="prediction_type is 'noise', allowed: epsilon"):
        SearchedScheduler.from_schedules([schedule], prediction_type="noise")
    with pytest.raises(ValueError, match="the schedule for 9 evaluations has 4"):
        SearchedScheduler(schedules={"9": schedule.to_dict()})
    with pytest.raises(ValueError, match="two schedules have 4"):
        SearchedScheduler.from_schedules([schedule, schedule])
    with pytest.raises(ValueError, match="no schedule for 4 evaluations; there are: none"):
        SearchedScheduler().set_timesteps(4)
    with pytest.raises(ValueError, match=r"label 123\.0 is no node"):
        scheduler.add_noise(torch.zeros(1, 1), torch.zeros(1, 1), torch.tensor([123.0]))
    x = torch.zeros(1, 3, 2, 2)
    for t in scheduler.timesteps:
        x = scheduler.step(x, t, x).prev_sample
    with pytest.raises(ValueError, match="all 4 steps are done"):
        scheduler.step(x, 0, x)
    flow = SearchedScheduler.from_schedules([mixed(FLOW, 4)])
    with pytest.raises(ValueError, match="node 0 is pure noise"):
        flow.step(x, 1000.0, x)
