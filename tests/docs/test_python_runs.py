"""The Python blocks of every page run, one after the other, on small data."""

from pathlib import Path

import pytest
import torch
import yaml
from pages import PAGES, ROOT, blocks

from thalweg.apps.trainer_cli import find_config
from thalweg.pde.data import catalog
from thalweg.pde.data.synthetic import write_synthetic
from thalweg.pde.poseidon import ScOT, ScOTConfig

WITH_PYTHON = [page for page in PAGES if any(block.kind == "python" for block in blocks(page))]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the pages have made by then: data, an exported network, and the checkpoint of a run."""
    for name in ("NS-Sines", "NS-PwC"):
        write_synthetic(name, tmp_path / "data", samples=10, resolution=64)
    config = yaml.safe_load(find_config("poseidon/tiny.yaml").read_text())
    network = ScOT(ScOTConfig(**config["model"]["init_args"]["network"]["init_args"]["config"]))
    network.save_pretrained(tmp_path / "my-scot")
    checkpoint = tmp_path / "runs" / "run" / "version_0" / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir(parents=True)
    content = {
        "state_dict": {f"network.{name}": value for name, value in network.state_dict().items()},
        "app_config": {"model": config["model"], "data": config["data"]},
        "epoch": 0,
        "global_step": 18,
        "pytorch-lightning_version": "2.6.0",
    }
    torch.save(content, checkpoint)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(catalog, "PROBLEMS", dict(catalog.PROBLEMS))
    monkeypatch.setattr(catalog, "_BY_ALIAS", dict(catalog._BY_ALIAS))
    return tmp_path


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_python_runs(page: Path, folder: Path) -> None:
    names: dict[str, object] = {"__name__": "page"}
    for block in blocks(page):
        if block.kind == "python":
            exec(compile(block.text, f"{page.name}: {block.text[:40]!r}", "exec"), names)
