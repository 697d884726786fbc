"""``thalweg fit --app nft`` killed with SIGKILL within an epoch, and resumed, ends as if left alone."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

EPOCHS = 12
PATIENCE = 240.0
FLAGS = [
    "--data.init_args.groups=2", "--data.init_args.group_size=8", "--data.init_args.batch_size=4",
    "--data.init_args.num_prompts=12", "--data.init_args.num_val=6", f"--trainer.max_epochs={EPOCHS}",
    "--trainer.check_val_every_n_epoch=6",
]  # fmt: skip


def start(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "thalweg.apps", "fit", *arguments]
    with open(folder / "log", "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)


def fresh(folder: Path, out: str) -> list[str]:
    logger = "--trainer.logger.init_args"
    where = [f"{logger}.save_dir={folder}", f"{logger}.name={out}", f"{logger}.version=run"]
    return ["--app", "nft", *FLAGS, *where]


def content(folder: Path, out: str) -> dict[str, Any]:
    return torch.load(folder / out / "run/checkpoints/last.ckpt", weights_only=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_run_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    assert start(tmp_path, *fresh(tmp_path, "undisturbed")).wait(PATIENCE) == 0, (
        tmp_path / "log"
    ).read_text()
    process = start(tmp_path, *fresh(tmp_path, "killed"))
    last = tmp_path / "killed/run/checkpoints/last.ckpt"
    until = time.monotonic() + PATIENCE
    while not last.is_file():
        assert process.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < until
        time.sleep(0.01)
    time.sleep(0.3)
    process.kill()
    assert process.wait(PATIENCE) == -9
    assert 0 < content(tmp_path, "killed")["epoch"] + 1 < EPOCHS
    assert start(tmp_path, "--resume", str(tmp_path / "killed/run")).wait(PATIENCE) == 0
    one, other = (content(tmp_path, out) for out in ("undisturbed", "killed"))
    assert one["epoch"] == other["epoch"] == EPOCHS - 1
    assert one["state_dict"].keys() == other["state_dict"].keys()
    assert all(torch.equal(value, other["state_dict"][name]) for name, value in one["state_dict"].items())
    moments = [found["optimizer_states"][0]["state"] for found in (one, other)]
    assert all(torch.equal(moments[0][i]["exp_avg"], moments[1][i]["exp_avg"]) for i in moments[0])
    assert one["PromptDataModule"] == other["PromptDataModule"]
