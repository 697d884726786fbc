"""Equality with the published implementation, recorded for small networks with strong random weights."""

from pathlib import Path

import pytest
import torch
from golden_scot import CASES, case_with, load_case, read_json
from safetensors.torch import load_file

from thalweg.pde.poseidon.rollout import rollout

cases = pytest.mark.parametrize("folder", CASES.values(), ids=CASES.keys())


def test_shipped_cases_cover_the_branches() -> None:
    assert {"learn_residual", "odd_grid_52", "resnet_skips", "unconditioned"} <= CASES.keys()


@cases
def test_float64_output_loss_and_gradients(folder: Path) -> None:
    model, io = load_case(folder)
    model.double()
    result = model(io["pixel_values"].double(), io["time"], io.get("pixel_mask"), io["labels"].double())
    assert (result.output - io["output"]).abs().max() < 1e-10
    assert abs(result.loss - io["loss"]) < 1e-12
    result.loss.backward()
    norms = {name: p.grad.norm().item() for name, p in model.named_parameters()}
    expected = {n.replace(".gamma", ".weight"): v for n, v in read_json(folder / "grad_norms.json").items()}
    assert norms == pytest.approx(expected, rel=1e-8, abs=1e-9)


@cases
def test_float32_output(folder: Path) -> None:
    model, io = load_case(folder)
    with torch.no_grad():
        output = model(io["pixel_values"], io["time"], io.get("pixel_mask"), io["labels"]).output
    assert (output - io["output"]).norm() / io["output"].norm() < 2e-5


@cases
def test_hidden_states_in_the_published_order(folder: Path) -> None:
    model, io = load_case(folder)
    levels = model.config.num_levels
    with torch.no_grad():
        states = model(io["pixel_values"], io["time"], output_hidden_states=True).hidden_states
    names = ["decoder_input", *(f"decoder.{m}" for m in range(levels))]
    names += ["embedding", *(f"encoder.{i}" for i in range(levels))]
    assert len(states) == len(names)
    for name, state in zip(names, states):
        expected = io[f"hidden.{name}"]
        assert (state - expected).norm() / expected.norm() < 2e-5, name


def test_unmasked_output_where_a_mask_was_recorded() -> None:
    for folder in CASES.values():
        model, io = load_case(folder)
        if "output_unmasked" in io:
            with torch.no_grad():
                output = model.double()(io["pixel_values"].double(), io["time"]).output
            assert (output - io["output_unmasked"]).abs().max() < 1e-10


ROLLOUTS = [
    pytest.param(folder, record, id=f"{name}-{record['id']}")
    for name, folder in case_with("autoregressive.json").items()
    for record in read_json(folder / "autoregressive.json")
]


@pytest.mark.parametrize(("folder", "record"), ROLLOUTS)
def test_autoregressive_rollout(folder: Path, record: dict) -> None:
    model, io = load_case(folder)
    states = load_file(folder / "autoregressive.safetensors")
    x, labels = io["pixel_values"][:1].double(), io["labels"][:1].double()
    mask = None
    if record["pixel_mask"] is not None:
        mask = torch.zeros(labels.shape[:2], dtype=torch.bool)
        mask[:, -1] = True
    with torch.no_grad():
        result = rollout(
            model.double(), x, record["lead_time"], record["ar_steps"], labels=labels, pixel_mask=mask
        )
    assert (result.output - states[f"{record['id']}.output"]).abs().max() < 1e-8
    assert result.losses.tolist() == pytest.approx(record["loss_per_step"], abs=1e-8)
    assert result.loss.item() == pytest.approx(record["loss"], abs=1e-8)
    assert result.times[0].diff(prepend=torch.zeros(1)).tolist() == pytest.approx(record["step_lead_times"])
    if f"{record['id']}.steps" in states:
        assert torch.allclose(result.states.float(), states[f"{record['id']}.steps"], atol=1e-5)


def test_resampled_inputs() -> None:
    for folder in case_with("resize.safetensors").values():
        model, _ = load_case(folder)
        recorded = load_file(folder / "resize.safetensors")
        for name in {key.split(".")[0] for key in recorded}:
            with torch.no_grad():
                output = model.double()(
                    recorded[f"{name}.pixel_values"].double(), recorded[f"{name}.time"]
                ).output
            assert (output - recorded[f"{name}.output"]).abs().max() < 1e-10
