"""Two processes share every epoch, and go on with the right halves after an interruption."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from thalweg.pde.data.synthetic import write_synthetic

pytestmark = pytest.mark.dist

# Writes what this process saw as JSON; arguments: folder, number of steps, checkpoint to resume from or "".
SCRIPT = """
import json, sys, warnings
import lightning as L, torch
from lightning.pytorch.callbacks import ModelCheckpoint
from thalweg.pde.data.datamodule import PDEDataModule

class Recorder(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.ones(())), []
    def training_step(self, batch, batch_idx):
        self.seen.append([round(v, 4) for v in batch["labels"].sum((1, 2, 3)).tolist()])
        return (self.weight * batch["pixel_values"]).mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

folder, steps, ckpt = sys.argv[1], int(sys.argv[2]), sys.argv[3] or None
saver = ModelCheckpoint(dirpath=folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)
trainer = L.Trainer(max_steps=steps, accelerator="cpu", devices=2, strategy="ddp", logger=False,
    callbacks=[saver], enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0)
model = Recorder()
data = PDEDataModule(["CE-RP"], folder, batch_size=9, num_trajectories=2)
trainer.fit(model, data, ckpt_path=ckpt, weights_only=True)
print("SEEN" + json.dumps(model.seen))
"""


def run(folder: Path, steps: int, ckpt: str = "") -> list[list[list[float]]]:
    """Labels' sums that each process saw, step by step."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = []
    for rank in range(2):
        place = {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, "-c", SCRIPT, str(folder), str(steps), ckpt]
        environment = {**os.environ, **place}
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    return [json.loads(output.rpartition("SEEN")[2]) for output in outputs]


def test_processes_share_epochs_and_resume(tmp_path: Path) -> None:
    # 2 trajectories of 36 pairs: 4 steps of 2 x 9 an epoch.
    write_synthetic("CE-RP", tmp_path, samples=6, resolution=8)
    straight = run(tmp_path, 6)
    epoch = [value for seen in straight for step in seen[:4] for value in step]
    # 8 snapshots of 2 trajectories, each the label of 1 to 8 pairs.
    counts = sorted(epoch.count(value) for value in set(epoch))
    assert counts == sorted(2 * [1, 2, 3, 4, 5, 6, 7, 8])
    assert straight[0][:4] != straight[1][:4]
    resumed = run(tmp_path, 6, str(tmp_path / "step=3.ckpt"))
    assert resumed == [seen[3:] for seen in straight]
