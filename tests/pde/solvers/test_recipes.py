"""Every recipe is in the catalog, and the spectral ones make samples in its layout."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from thalweg.pde.data import catalog
from thalweg.pde.solvers import recipes
from thalweg.pde.solvers.fourier import SpectralGrid
from thalweg.pde.solvers.generated_file import sizes

SPECTRAL = [
    "NS-Sines",
    "NS-Gauss",
    "NS-PwC",
    "NS-Tracer-PwC",
    "NS-BB",
    "NS-SL",
    "NS-SVS",
    "FNS-KF",
    "ACE",
    "Poisson-Gauss",
]


def test_every_recipe_has_a_row_in_the_catalog() -> None:
    assert [name for name in recipes.names() if name not in catalog.names()] == []


def test_listing_imports_no_torch() -> None:
    code = (
        "import sys; from thalweg.pde.solvers import recipes; recipes.names(); print('torch' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
    )


@pytest.mark.parametrize("name", ["NS-Sine", "ns-sines", "NSSines"])
def test_unknown_name_lists_near_matches(name: str) -> None:
    with pytest.raises(ValueError, match=f"no generator for '{name}'; did you mean NS-Sines"):
        recipes.get(name)


@pytest.mark.parametrize("name", SPECTRAL)
def test_samples_have_the_layout_of_the_catalog(name: str) -> None:
    made, spec = recipes.get(name), catalog.get(name)
    request = made.request((0, 1), seed=0, resolution=32)
    frames = max(1, request.frames)
    assert frames == spec.frames
    fields = made.sample(request)
    expected = sizes(spec, samples=2, frames=frames, resolution=32)
    assert {variable: tuple(field.shape) for variable, field in fields.items()} == expected
    for field in fields.values():
        assert field.dtype == torch.float32
        assert bool(torch.isfinite(field).all())
        assert float((field[0] - field[1]).abs().max()) > 0


@pytest.mark.parametrize("name", SPECTRAL)
def test_snapshots_are_equidistant_as_the_catalog_says(name: str) -> None:
    times, spec = recipes.get(name).times, catalog.get(name)
    assert list(times) == pytest.approx([k * spec.time_step for k in range(len(times))], abs=1e-12)


@pytest.mark.parametrize("name", SPECTRAL)
def test_sample_does_not_depend_on_its_batch(name: str) -> None:
    made = recipes.get(name)
    together = made.request((3, 5, 6), seed=1, resolution=16, dtype="float64")
    alone = made.sample(replace(together, indices=(5,)))
    for variable, field in made.sample(together).items():
        assert torch.equal(field[1:2], alone[variable])


@pytest.mark.parametrize("name", [name for name in SPECTRAL if name.startswith(("NS", "FNS"))])
def test_stored_velocity_is_free_of_divergence_once_transposed_as_the_catalog_says(name: str) -> None:
    made, spec = recipes.get(name), catalog.get(name)
    (field,) = made.sample(made.request((0,), seed=0, resolution=32, frames=3, dtype="float64")).values()
    velocity = (field.mT if spec.transpose else field)[0, :, :2].double()
    grid = SpectralGrid(32)
    spectrum = grid.forward(velocity)
    u_x, v_y = grid.backward(1j * grid.kx * spectrum[:, 0]), grid.backward(1j * grid.ky * spectrum[:, 1])
    # float32 storage is the only source of divergence
    assert float((u_x + v_y).abs().max() / u_x.abs().max()) < 1e-4


def test_tracer_set_is_the_set_without_tracer_channel() -> None:
    with_tracer, without = recipes.get("NS-Tracer-PwC"), recipes.get("NS-PwC")
    fields = [r.sample(r.request((2,), seed=4, resolution=16, frames=2)) for r in (with_tracer, without)]
    assert torch.equal(fields[0]["velocity"], fields[1]["velocity"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": 33}, "resolution of NS-Sines must be a multiple of 8 and at least 16, got 33"),
        ({"resolution": 8}, "at least 16, got 8"),
        ({"frames": 1}, r"frames of NS-Sines must be in 2..21, got 1"),
        ({"frames": 22}, "got 22"),
        ({"dtype": "float16"}, "float32 or float64, got 'float16'"),
    ],
)
def test_impossible_requests_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipes.get("NS-Sines").request((0,), **{"seed": 0, "resolution": 32, **options})


def test_steady_problems_have_no_frames() -> None:
    with pytest.raises(ValueError, match="Poisson-Gauss is steady"):
        recipes.get("Poisson-Gauss").request((0,), seed=0, resolution=32, frames=2)
