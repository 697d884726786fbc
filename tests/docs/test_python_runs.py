"""The Python blocks of every page run, one after the other, on small data."""

from pathlib import Path

import pytest
import torch
import yaml
from diffusers import UNet2DModel
from pages import PAGES, ROOT, blocks

from thalweg.apps.trainer_cli import find_config
from thalweg.diffusion.export import save_pipeline
from thalweg.diffusion.schedules import VPDiscrete
from thalweg.diffusion.solvers.grids import nodes
from thalweg.diffusion.solvers.named import named
from thalweg.diffusion.solvers.scheduler import SearchedScheduler
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
    write_digits(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(catalog, "PROBLEMS", dict(catalog.PROBLEMS))
    monkeypatch.setattr(catalog, "_BY_ALIAS", dict(catalog._BY_ALIAS))
    return tmp_path


def write_digits(folder: Path) -> None:
    """A pipeline of digits with random weights, and a scheduler for it."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    sizes = {"block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 4, "num_class_embeds": 11}
    unet = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, **blocks, **sizes)
    noise = VPDiscrete(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", n=1000)
    save_pipeline(folder / "digits", unet, noise, "v", [str(k) for k in range(10)])
    schedules = [named("dpmpp", nodes(noise, n, "uniform_lambda"), order=2) for n in (5, 8)]
    options = {"prediction_type": "v_prediction", "noise_schedule": noise.to_dict()}
    scheduler = SearchedScheduler.from_schedules(schedules, **options)
    scheduler.save_pretrained(folder / "runs" / "search" / "scheduler")


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_python_runs(page: Path, folder: Path) -> None:
    names: dict[str, object] = {"__name__": "page"}
    for block in blocks(page):
        if block.kind == "python":
            exec(compile(block.text, f"{page.name}: {block.text[:40]!r}", "exec"), names)
