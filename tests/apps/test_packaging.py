"""What an installation brings: one top-level name, data files included, and layers that hold."""

import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_wheel_holds_only_thalweg(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("thalweg-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"thalweg"}
    folders = ("apps", "diffusion", "pde", "core_optim", "checkpoints", "configs")
    for folder in folders:
        assert f"thalweg/{folder}/py.typed" in names
        sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / folder).rglob("*.py")}
        assert {f"thalweg/{source}" for source in sources} <= set(names)
    assert "thalweg/configs/trainer/cpu.yaml" in names
    shipped = ROOT / "checkpoints" / "shipped"
    weights = {p.relative_to(ROOT).as_posix() for p in shipped.rglob("*") if p.is_file()}
    assert {f"thalweg/{file}" for file in weights} <= set(names)
    assert "thalweg/checkpoints/shipped/shapes/model_index.json" in names
    assert any(name.startswith("thalweg/checkpoints/cards/") and name.endswith(".md") for name in names)


def test_console_script_and_version() -> None:
    scripts = metadata.entry_points(group="console_scripts", name="thalweg")
    assert [script.value for script in scripts] == ["thalweg.apps.cli:main"]
    assert metadata.metadata("thalweg")["License-Expression"] == "Apache-2.0"


def test_python_m_apps_runs_from_a_checkout() -> None:
    out = subprocess.run(
        [sys.executable, "-m", "apps", "--version"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == f"thalweg {metadata.version('thalweg')}"


def test_layers_hold() -> None:
    lint = Path(sys.executable).parent / "lint-imports"
    result = subprocess.run([lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("package", ["thalweg.pde.problem", "thalweg.pde.data.catalog", "thalweg.core_optim"])
def test_light_modules_stay_light(package: str) -> None:
    code = (
        f"import sys, {package}; print(*[m for m in ('lightning', 'diffusers', 'torch') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == ""


def test_lightning_is_imported_only_at_the_edge() -> None:
    allowed = {"module.py", "callbacks.py", "writer.py"}
    for folder in ("pde", "diffusion", "core_optim", "checkpoints"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.name in allowed or path.name.startswith("data"):
                continue
            lines = [line.strip() for line in path.read_text().splitlines()]
            bad = [line for line in lines if line.startswith(("import lightning", "from lightning"))]
            assert not bad, f"{path.relative_to(ROOT)}: {bad}"
