"""The registry is light, complete and extensible."""

import importlib
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pytest

from thalweg.apps import registry
from thalweg.apps.trainer_cli import find_config


def resolve(path: str) -> object:
    module, _, name = path.replace(":", ".").rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("name", registry.apps())
def test_every_path_of_an_app_resolves(name: str) -> None:
    app = registry.get(name)
    assert resolve(app.module).__name__ == app.module.rpartition(".")[2]
    assert resolve(app.datamodule).__name__ == app.datamodule.rpartition(".")[2]
    assert find_config(app.config).is_file()


@pytest.mark.parametrize("name", registry.apps())
def test_default_config_runs_the_registered_classes(name: str) -> None:
    import yaml

    app = registry.get(name)
    config = yaml.safe_load(find_config(app.config).read_text())
    assert config["model"]["class_path"] == app.module
    assert config["data"]["class_path"] == app.datamodule


def named_as(group: str, entries: Iterable[str]) -> list[str]:
    return [name for name in entries if name.startswith(group)]


def test_data_sets_and_metrics_are_of_known_groups() -> None:
    names = [*registry.datasets(), *registry.metrics()]
    known = [name for group in ("pde/", "image/", "prompts/", "reward/") for name in named_as(group, names)]
    assert sorted(names) == sorted(known)


@pytest.mark.parametrize("name", named_as("pde/", registry.datasets()))
def test_every_data_set_describes_itself(name: str) -> None:
    ref = registry.datasets()[name]
    spec = resolve(ref.target)(**ref.kwargs)
    assert f"pde/{spec.name}" == name
    assert ref.summary


@pytest.mark.parametrize("name", named_as("image/", registry.datasets()))
def test_every_image_set_has_its_stated_size(name: str) -> None:
    ref = registry.datasets()[name]
    images = resolve(ref.target)(**ref.kwargs)
    assert len(images.labels) == int(ref.size.split(" x ")[0])
    assert images.image(0).shape == (1, ref.kwargs["size"], ref.kwargs["size"])


@pytest.mark.parametrize("name", ["image/fid", "image/kid"])
def test_every_image_metric_is_ideal_on_equal_sets(name: str) -> None:
    import torch

    ref = registry.metrics()[name]
    features_NF = torch.randn(1000, 4)
    value = resolve(ref.target)(features_NF, features_NF)
    number = value[0] if isinstance(value, tuple) else value
    # The kernel distance is unbiased: within a set it leaves out what every image has in common with itself.
    assert number == pytest.approx(ref.ideal, abs=1e-6 if name == "image/fid" else 0.05)


GENERATED = ("prompts/shapes", "prompts/geneval")


@pytest.mark.parametrize("name", named_as("prompts/", registry.datasets()))
def test_prompts_are_generated_or_read_from_a_file(name: str, tmp_path: Path) -> None:
    ref = registry.datasets()[name]
    if name in GENERATED:
        assert len(resolve(ref.target)(**{**ref.kwargs, "count": 50})) == 50
        return
    with pytest.raises(ValueError, match="does not exist"):
        resolve(ref.target)(**{**ref.kwargs, "path": tmp_path / Path(ref.kwargs["path"].split(",")[0]).name})
    assert ref.source


@pytest.mark.parametrize("name", named_as("reward/", registry.metrics()))
def test_every_reward_metric_is_a_reward_of_that_name(name: str) -> None:
    from thalweg.diffusion.rewards.registry import REWARDS

    assert REWARDS[name.removeprefix("reward/")] == registry.metrics()[name].target


@pytest.mark.parametrize("name", named_as("pde/", registry.metrics()))
def test_every_metric_is_ideal_on_identical_fields(name: str) -> None:
    import torch

    ref = registry.metrics()[name]
    metric = resolve(ref.target)(**ref.kwargs)
    fields_BCHW = torch.randn(3, 2, 16, 16, dtype=torch.float64)
    metric.update(fields_BCHW, fields_BCHW)
    value = metric.compute()
    values = list(value.values()) if isinstance(value, dict) else [value]
    assert values
    for number in values:
        assert float(torch.as_tensor(number).max()) == pytest.approx(ref.ideal, abs=1e-12)


def test_unknown_app_names_the_near_match() -> None:
    with pytest.raises(ValueError, match=r"unknown app 'posiedon'\. Did you mean poseidon"):
        registry.get("posiedon")


def test_a_name_is_registered_once() -> None:
    app = registry.get("poseidon")
    with pytest.raises(ValueError, match="already registered"):
        registry.register(app)


def test_third_parties_register_through_an_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_APPS", {})
    monkeypatch.setattr(registry, "_loaded", False)
    ours = registry.App(
        name="theirs",
        summary="s",
        module="m.M",
        datamodule="d.D",
        datasets=(),
        metrics=(),
        config="c",
        paper="p",
    )

    class Entry:
        def load(self) -> object:
            return lambda: registry.register(ours)

    monkeypatch.setattr(metadata, "entry_points", lambda group: [Entry()] if group == "thalweg.apps" else [])
    assert set(registry.apps()) >= {"poseidon", "theirs"}


def test_registry_imports_neither_torch_nor_lightning() -> None:
    code = (
        "import sys, time; t = time.process_time(); from thalweg.apps import registry; registry.apps();"
        "print(time.process_time() - t, 'torch' in sys.modules, 'lightning' in sys.modules)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert out[1:] == ["False", "False"]
    assert float(out[0]) < 0.3
