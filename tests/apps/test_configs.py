"""Every shipped YAML parses through the real command line, and prints back to itself."""

from pathlib import Path

import pytest
import yaml

from thalweg.apps import cli, registry, trainer_cli

ROOT = trainer_cli.shipped_configs()
OVERLAYS = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "trainer").glob("*.yaml"))
SEARCHES = sorted(p.relative_to(ROOT).as_posix() for p in ROOT.rglob("search_*.yaml"))
CONFIGS = sorted(
    name
    for p in ROOT.rglob("*.yaml")
    if p.parent.name != "trainer" and (name := p.relative_to(ROOT).as_posix()) not in SEARCHES
)


def printed(argv: list[str], capsys: pytest.CaptureFixture[str]) -> dict:
    """What ``--print_config`` says."""
    with pytest.raises(SystemExit) as caught:
        cli.main([*argv, "--print_config"])
    assert caught.value.code in (0, None), caught.value.code
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("name", CONFIGS)
def test_config_parses(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = printed(["fit", "--config", name], capsys)
    written = yaml.safe_load((ROOT / name).read_text())
    assert config["model"]["class_path"] == written["model"]["class_path"]
    for key, value in written.get("trainer", {}).items():
        if not isinstance(value, dict | list):
            assert config["trainer"][key] == value


@pytest.mark.parametrize("name", SEARCHES)
def test_search_config_parses(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = printed(["search", "--config", name], capsys)
    written = yaml.safe_load((ROOT / name).read_text())
    assert {key: config[key] for key in written} == written


@pytest.mark.parametrize("name", OVERLAYS)
def test_overlay_parses_over_an_app(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = printed(["fit", "--app", "poseidon", "--config", name], capsys)
    overlay = yaml.safe_load((ROOT / name).read_text())["trainer"]
    for key, value in overlay.items():
        if not isinstance(value, dict | list):
            assert config["trainer"][key] == value


def test_the_promised_overlays_are_there() -> None:
    assert {Path(name).stem for name in OVERLAYS} == {"cpu", "gpu1", "ddp", "fsdp2", "slurm", "debug"}


@pytest.mark.parametrize("name", registry.apps())
def test_print_config_parses_back_to_itself(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = printed(["fit", "--app", name], capsys)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(first))
    assert printed(["fit", "--config", str(path)], capsys) == first
