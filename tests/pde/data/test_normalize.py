"""Normalisation is one invertible map per data set."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from thalweg.pde.data import catalog
from thalweg.pde.data.normalize import normalizer_for
from thalweg.pde.data.synthetic import write_synthetic
from thalweg.pde.data.trajectories import open_problem
from thalweg.pde.problem import ProblemSpec

ROWS = [spec for name, spec in catalog.PROBLEMS.items() if not name.endswith((".out", ".time"))]


@pytest.mark.parametrize("spec", ROWS, ids=lambda spec: spec.name)
def test_round_trip(spec: ProblemSpec) -> None:
    normalizer = normalizer_for(spec)
    rng = np.random.default_rng(0)
    for side, channels in (("inputs", spec.inputs), ("outputs", spec.outputs)):
        x = rng.normal(size=(2, len(channels), 4, 4))
        there = getattr(normalizer, f"normalize_{side}")(x)
        np.testing.assert_allclose(
            getattr(normalizer, f"denormalize_{side}")(there), x, rtol=1e-12, atol=1e-12
        )


@given(arrays(np.float32, (1, 4, 2, 2), elements=st.floats(-100, 100, width=32)))
def test_torch_and_numpy_agree(x: np.ndarray) -> None:
    normalizer = normalizer_for(catalog.get("CE-Gauss"))
    ours = normalizer.normalize_outputs(torch.from_numpy(x))
    assert ours.dtype == torch.float32
    np.testing.assert_array_equal(ours.numpy(), normalizer.normalize_outputs(x))


def test_mean_pressure_is_taken_off_first() -> None:
    normalizer = normalizer_for(catalog.get("CE-KH"))
    x = np.zeros((1, 4, 1, 1))
    x[0, 3] = 1.0 + 0.185
    assert normalizer.normalize_outputs(x)[0, :, 0, 0] == pytest.approx([-0.8 / 0.31, 0.0, 0.0, 1.0])


def test_density_of_incompressible_sets_is_the_published_constant() -> None:
    normalizer = normalizer_for(catalog.get("NS-Sines"))
    x = np.ones((1, 4, 1, 1))
    assert normalizer.normalize_inputs(x)[0, 0, 0, 0] == pytest.approx(0.645, abs=5e-4)


def test_constants_of_the_file_win(tmp_path: Path) -> None:
    constants = {"inputs": {"u": [0.5, 2.0]}, "outputs": {"u": [0.5, 2.0]}}
    write_synthetic("ACE", tmp_path, attributes={"constants": json.dumps(constants)})
    reader = open_problem("ACE", tmp_path)
    auto = normalizer_for(reader.spec, reader.constants)
    assert (auto.origin, auto.input_mean.tolist(), auto.input_std.tolist()) == ("file", [0.5], [2.0])
    published = normalizer_for(reader.spec, reader.constants, "published")
    assert published.output_std.tolist() == [0.65351176]


def test_constants_for_a_stored_channel_must_be_there() -> None:
    spec = catalog.get("NS-Sines")
    with pytest.raises(ValueError, match="lack channel 'u', found \\['rho'\\]"):
        normalizer_for(spec, {"inputs": {"rho": [1, 1]}, "outputs": {}})
    with pytest.raises(ValueError, match="stores no normalisation constants"):
        normalizer_for(spec, None, "file")


def test_computed_constants_standardise_the_training_part(tmp_path: Path) -> None:
    write_synthetic("CE-RP", tmp_path, samples=8)
    reader = open_problem("CE-RP", tmp_path)
    normalizer = normalizer_for(reader.spec, None, "compute", reader)
    fields = normalizer.normalize_outputs(reader.outputs(range(reader.splits.train), range(reader.frames)))
    np.testing.assert_allclose(fields.mean(axis=(0, 1, 3, 4)), 0, atol=1e-5)
    np.testing.assert_allclose(fields.std(axis=(0, 1, 3, 4)), 1, rtol=1e-5)
