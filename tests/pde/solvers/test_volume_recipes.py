"""Compressible, wave and Helmholtz recipes make samples in the catalog's layout, by seed and index alone."""

from dataclasses import replace

import pytest
import torch

from thalweg.pde.data import catalog
from thalweg.pde.solvers import euler_initial, euler_recipes, recipes, richtmyer_meshkov
from thalweg.pde.solvers.generated_file import sizes
from thalweg.pde.solvers.recipes import Check, Recipe
from thalweg.pde.solvers.seeding import generator

GASES = [*euler_recipes.GASES, "CE-RM"]
NAMES = [*GASES, "GCE-RT", "Wave-Gauss", "Wave-Layer", "Helmholtz"]


def short(made: Recipe, **options: object) -> recipes.SampleRequest:
    """Request for two small samples, of three frames where there are frames."""
    frames = 3 if made.times else None
    return made.request((0, 1), **{"seed": 0, "resolution": 16, "frames": frames, **options})


@pytest.mark.parametrize("name", NAMES)
def test_samples_have_the_layout_of_the_catalog(name: str) -> None:
    made, spec = recipes.get(name), catalog.get(name)
    assert len(made.times) == (0 if spec.steady else spec.frames)
    request = short(made)
    fields = made.sample(request)
    expected = sizes(spec, samples=2, frames=max(1, request.frames), resolution=16)
    assert {variable: tuple(field.shape) for variable, field in fields.items()} == expected
    for field in fields.values():
        assert bool(torch.isfinite(field).all())
        assert float((field[0] - field[1]).abs().max()) > 0


@pytest.mark.parametrize("name", [name for name in NAMES if name != "Helmholtz"])
def test_snapshots_are_equidistant_as_the_catalog_says(name: str) -> None:
    times, spec = recipes.get(name).times, catalog.get(name)
    assert list(times) == pytest.approx([k * spec.time_step for k in range(len(times))], abs=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", NAMES)
def test_sample_depends_on_seed_and_index_alone(name: str, dtype: str) -> None:
    made = recipes.get(name)
    together = short(made, seed=1, dtype=dtype)
    alone = made.sample(replace(together, indices=(1,)))
    other = made.sample(replace(together, indices=(1,), seed=2))
    for variable, field in made.sample(together).items():
        assert torch.equal(field[1:2], alone[variable])
        assert not torch.equal(other[variable], alone[variable])


@pytest.mark.parametrize("name", GASES)
def test_initial_states_look_the_same_at_every_resolution(name: str) -> None:
    """Averages over blocks of a fine grid tend to the values of a coarse one."""
    gas = euler_recipes.GASES[name] if name != "CE-RM" else richtmyer_meshkov.GAS
    coarse, fine = (gas.initial(generator(0, name, 0), n) for n in (64, 256))
    averaged = fine.reshape(4, 64, 4, 64, 4).mean((2, 4))
    # Velocities of CE-Gauss are sampled half a cell away from each other; borders cross some cells.
    assert float((averaged - coarse).abs().mean()) < 0.05 * float(fine.std((1, 2)).mean() + fine.mean().abs())


@pytest.mark.parametrize(
    ("name", "rho", "speed", "p"),
    [
        ("CE-RP", (0.1, 1.0), 1.0, (0.1, 1.0)),
        ("CE-CRP", (0.1, 1.0), 1.0, (0.1, 1.0)),
        ("CE-KH", (1.0, 2.0), 0.5, (2.5, 2.5)),
        ("CE-Gauss", (0.1, 0.1), 4.0, (2.5, 2.5)),
        ("CE-RPUI", (1.0, 3.0), 1.0, (1.0, 1.4)),
        ("CE-RM", (1.0, 2.0), 0.0, (1.0, 20.0)),
    ],
)
def test_initial_states_stay_in_their_ranges(
    name: str, rho: tuple[float, float], speed: float, p: tuple[float, float]
) -> None:
    gas = euler_recipes.GASES[name] if name != "CE-RM" else richtmyer_meshkov.GAS
    w = torch.stack([gas.initial(generator(0, name, i), 32) for i in range(40)])
    for values, (low, high) in ((w[:, 0], rho), (w[:, 3], p)):
        assert low <= float(values.min()) <= float(values.max()) <= high
        # Forty samples come close to both ends.
        assert float(values.min()) <= low + 0.1 * (high - low)
        assert float(values.max()) >= high - 0.1 * (high - low)
    assert float(w[:, 1:3].abs().max()) <= speed


@pytest.mark.parametrize("name", ["CE-RP", "CE-CRP", "CE-RPUI"])
def test_four_states_share_the_square(name: str) -> None:
    w = euler_recipes.GASES[name].initial(generator(0, name, 1), 64)
    states, counts = w.reshape(4, -1).unique(dim=1, return_counts=True)
    assert states.shape[1] == 4
    assert float(counts.min()) > 0.05 * 64 * 64


def test_layers_of_kelvin_helmholtz_lie_where_they_should() -> None:
    rho = euler_initial.shear_layers(generator(0, "CE-KH", 0), 200)[0]
    # 0.05 around the levels 1/4 and 3/4: rows 40..60 and 140..160 may be either.
    assert (rho[:, :40] == 1).all()
    assert (rho[:, 61:139] == 2).all()
    assert (rho[:, 160:] == 1).all()


def test_mean_density_of_richtmyer_meshkov_is_the_released_one() -> None:
    """1 + pi / 16 up to the wave; 1.1964 is the mean that the released data are normalised with."""
    rho = [richtmyer_meshkov.imploding_shock(generator(0, "CE-RM", i), 256)[0].mean() for i in range(20)]
    assert float(torch.stack(rho).mean()) == pytest.approx(1.1964, abs=2e-3)


def test_fifth_channel_is_the_total_energy() -> None:
    made = recipes.get("CE-RP")
    rho, u, v, p, energy = made.sample(short(made, dtype="float64"))["data"].double().unbind(2)
    assert torch.allclose(energy, p / 0.4 + 0.5 * rho * (u * u + v * v), rtol=1e-5, atol=0)


def test_stored_sums_of_conserved_variables_are_constant() -> None:
    made = recipes.get("CE-CRP")
    data = made.sample(made.request((0, 1), seed=3, resolution=32, dtype="float64"))["data"].double()
    rho, u, v, _, energy = data.unbind(2)
    for conserved in (rho, rho * u, rho * v, energy):
        total = conserved.mean((2, 3))
        # float32 storage is the only source of drift.
        assert float((total - total[:, :1]).abs().max()) < 1e-7


def test_finer_solver_grid_is_closer_to_a_converged_solution() -> None:
    request = short(euler_recipes.recipe("CE-RP"), resolution=32)
    coarse, fine, best = (
        euler_recipes.recipe("CE-RP", supersample=s).sample(request)["data"][:, -1] for s in (1, 2, 8)
    )
    assert float((fine - best).abs().mean()) < 0.7 * float((coarse - best).abs().mean())


def test_potential_of_rayleigh_taylor_is_static_and_has_its_well_in_the_middle() -> None:
    made = recipes.get("GCE-RT")
    phi = made.sample(short(made))["solution"][:, :, 5]
    assert torch.equal(phi[:, 0], phi[:, -1])
    assert (phi[:, 0, 7:9, 7:9].amax((1, 2)) < phi[:, 0, 0, 0]).all()


def test_tracer_of_rayleigh_taylor_stays_between_zero_and_one() -> None:
    made = recipes.get("GCE-RT")
    tracer = made.sample(short(made, resolution=32))["solution"][:, :, 4]
    assert -1e-3 < float(tracer.min()) < 0.01
    assert 0.99 < float(tracer.max()) < 1 + 1e-3


@pytest.mark.parametrize("name", ["CE-RP", "CE-RM", "GCE-RT", "Wave-Gauss", "Helmholtz"])
def test_family_offers_checks(name: str) -> None:
    found = recipes.family(name).checks()
    assert found
    assert all(isinstance(check, Check) for check in found)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_full_size_trajectories_are_finite_and_positive(name: str) -> None:
    made = recipes.get(name)
    for variable, field in made.sample(made.request(tuple(range(4)), seed=7, resolution=64)).items():
        assert bool(torch.isfinite(field).all())
        if variable in ("data", "solution") and name.startswith(("CE", "GCE")):
            assert float(field[:, :, 0].min()) > 0
            assert float(field[:, :, 3].min()) > 0
