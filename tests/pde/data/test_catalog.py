"""The table of data sets is complete, consistent and found by exact names only."""

import subprocess
import sys
from dataclasses import replace
from importlib import metadata

import pytest

from thalweg.pde.data import catalog
from thalweg.pde.data.synthesis import synthesise
from thalweg.pde.problem import ProblemSpec

PRETRAINING = ("NS-Sines", "NS-Gauss", "CE-RP", "CE-CRP", "CE-KH", "CE-Gauss")
DOWNSTREAM = [
    *("NS-PwC", "NS-BB", "NS-SL", "NS-SVS", "NS-Tracer-PwC", "FNS-KF", "CE-RPUI", "CE-RM", "GCE-RT"),
    *("Wave-Layer", "Wave-Gauss", "ACE", "SE-AF", "Poisson-Gauss", "Helmholtz"),
]
ROWS = list(catalog.PROBLEMS.values())


def test_table_has_the_papers_sets_and_variants() -> None:
    names = set(catalog.names())
    assert {*PRETRAINING, *DOWNSTREAM} <= names
    assert {name for name in names if catalog.get(name).pretraining} == set(PRETRAINING)
    assert {"SE-AF.time", "Poisson-Gauss.time", "Helmholtz.time", "ACE.out", "NS-Tracer-PwC.out"} <= names
    assert not {"Wave-Gauss.out", "SE-AF.out", "Helmholtz.out"} & names


def test_pretraining_mixture_has_the_published_number_of_pairs() -> None:
    trajectories = sum(catalog.get(name).splits.train for name in PRETRAINING)
    assert trajectories == 4 * 9640 + 2 * 19640 == 77840
    assert trajectories * 66 == 5_137_440


@pytest.mark.parametrize("spec", ROWS, ids=lambda spec: spec.name)
def test_row_is_consistent(spec: ProblemSpec) -> None:
    assert [name for group in spec.groups for name in group] == [channel.name for channel in spec.outputs]
    variables = {variable.name: variable for variable in spec.variables}
    for channel in (*spec.inputs, *spec.outputs):
        assert channel.std > 0
        if channel.variable is None:
            assert synthesise(channel.formula, (4, 4)).shape == (4, 4)
            continue
        variable = variables[channel.variable]
        assert (channel.index is None) == ("channel" not in variable.dims)
        if channel.index is not None:
            assert channel.index < variable.shape[variable.dims.index("channel")]
    assert {variable.shape[0] for variable in spec.variables} == {spec.splits.total}
    assert spec.splits.train > spec.splits.test > spec.splits.val > 0
    if not spec.steady:
        assert spec.horizon < spec.frames
        assert {v.shape[v.dims.index("time")] for v in spec.variables if "time" in v.dims} == {spec.frames}
    assert (spec.mask_rule == "channels") == any(channel.masked for channel in spec.outputs)


def test_masked_and_constant_groups_are_not_scored() -> None:
    assert catalog.get("NS-Sines").scored_groups == (("u", "v"),)
    assert catalog.get("CE-RP").scored_groups == (("rho",), ("u", "v"), ("p",))
    assert catalog.get("Wave-Layer").scored_groups == (("u",),)
    assert catalog.get("FNS-KF").channel_slices == [0, 1, 3, 4, 5]


def test_reference_identifiers_are_exact_aliases() -> None:
    assert catalog.get("fluids.compressible.Riemann").name == "CE-RP"
    assert catalog.get("fluids.compressible.RiemannKelvinHelmholtz").name == "CE-RPUI"
    assert catalog.get("fluids.incompressible.PiecewiseConstants.tracer.out").name == "NS-Tracer-PwC.out"
    assert catalog.get("elliptic.poisson.Gaussians.time").name == "Poisson-Gauss.time"
    aliases = [alias for spec in ROWS for alias in spec.aliases]
    assert len(set(aliases)) == len(aliases)
    assert not set(aliases) & set(catalog.names())


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("NS-Sine", "NS-Sines"),
        ("ns-pwc", "NS-PwC"),
        ("fluids.incomressible.PiecewiseConstants.tracer", "fluids.incompressible.PiecewiseConstants.tracer"),
    ],
)
def test_unknown_name_lists_near_matches(wrong: str, meant: str) -> None:
    with pytest.raises(ValueError, match=f"unknown data set '{wrong}'; did you mean .*'{meant}'"):
        catalog.get(wrong)


def test_name_without_near_match_lists_all() -> None:
    with pytest.raises(ValueError, match=r"known: NS-Sines, .*Helmholtz\.time"):
        catalog.get("zzz")


def test_table_loads_without_heavy_packages() -> None:
    code = (
        "import sys; from thalweg.pde.data import catalog; catalog.get('ACE'); "
        "print(sorted({'torch', 'numpy', 'h5py', 'lightning', 'xarray'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> ProblemSpec:
    """A data set that is not in the table; what a test adds is taken out again."""
    monkeypatch.setattr(catalog, "PROBLEMS", dict(catalog.PROBLEMS))
    monkeypatch.setattr(catalog, "_BY_ALIAS", dict(catalog._BY_ALIAS))
    catalog._load_entry_points.cache_clear()
    return replace(catalog.get("ACE"), name="Own", aliases=("own.alias",))


def test_own_sets_are_found_by_name_and_alias_and_registered_twice_without_harm(own: ProblemSpec) -> None:
    assert catalog.register(own) is own
    catalog.register(replace(own))
    assert catalog.get("Own") is catalog.get("own.alias")


def test_a_taken_name_is_refused(own: ProblemSpec) -> None:
    with pytest.raises(ValueError, match=r"data set 'NS-PwC' is already in the table"):
        catalog.register(replace(own, name="NS-PwC"))
    with pytest.raises(ValueError, match=r"already in the table \(ACE: "):
        catalog.register(replace(own, aliases=catalog.get("ACE").aliases))


def test_installed_packages_bring_their_sets(own: ProblemSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    class Entry:
        def load(self) -> ProblemSpec:
            return own

    monkeypatch.setattr(
        metadata, "entry_points", lambda group: [Entry()] if group == "thalweg.problems" else []
    )
    assert catalog.get("own.alias") is own
