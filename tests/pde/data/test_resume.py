"""Training that is interrupted and resumed sees the same batches as training that is not."""

from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from thalweg.pde.data.datamodule import PDEDataModule
from thalweg.pde.data.synthetic import write_synthetic

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    # The resumed runs write no checkpoints of their own.
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks"),
]


class Recorder(L.LightningModule):
    """One weight, trained on the mean of the inputs; keeps what it saw."""

    asks_for_length = False

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.seen: list[tuple[float, ...]] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.seen.append((self.current_epoch, *batch["time"].tolist(), batch["labels"].sum().item()))
        return ((self.weight * batch["pixel_values"] - batch["labels"]) ** 2).mean()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.asks_for_length:
            assert self.trainer.estimated_stepping_batches == 12
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def fit(
    folder: Path,
    max_steps: int,
    ckpt: Path | None = None,
    checkpoint: ModelCheckpoint | None = None,
    limit: float = 1.0,
    epochs: int = -1,
    **options: object,
) -> Recorder:
    data = PDEDataModule(["CE-RP"], str(folder), batch_size=32, num_trajectories=3, **options)
    model = Recorder()
    trainer = L.Trainer(
        max_steps=max_steps,
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[] if checkpoint is None else [checkpoint],
        enable_checkpointing=checkpoint is not None,
        num_sanity_val_steps=0,
        limit_val_batches=1,
        limit_train_batches=limit,
    )
    trainer.fit(model, data, ckpt_path=ckpt, weights_only=True)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_synthetic("CE-RP", folder, samples=6, resolution=8)
    return folder


def checkpoints(folder: Path, **when: object) -> ModelCheckpoint:
    return ModelCheckpoint(dirpath=folder, filename="{step}", save_top_k=-1, **when)


# 3 trajectories of 36 pairs in batches of 32: four batches an epoch, the last one short.
@pytest.mark.parametrize("stop", [1, 3, 4, 5, 8, 10])
def test_resumed_run_equals_uninterrupted_run(stop: int, folder: Path, tmp_path: Path) -> None:
    straight = fit(folder, 11)
    fit(folder, stop, checkpoint=checkpoints(tmp_path, every_n_train_steps=1))
    resumed = fit(folder, 11, tmp_path / f"step={stop}.ckpt")
    assert resumed.seen == straight.seen[stop:]
    assert torch.equal(resumed.weight, straight.weight)
    assert len({row[0] for row in straight.seen}) == 3


@pytest.mark.parametrize("stop", [1, 4, 5, 10])
def test_resume_when_a_schedule_asked_for_the_length_of_the_run(
    stop: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning makes the loader then before it reads the checkpoint."""
    monkeypatch.setattr(Recorder, "asks_for_length", True)
    straight = fit(folder, -1, epochs=3)
    fit(folder, -1, epochs=3, checkpoint=checkpoints(tmp_path, every_n_train_steps=1))
    assert fit(folder, -1, tmp_path / f"step={stop}.ckpt", epochs=3).seen == straight.seen[stop:]


def test_resume_from_the_end_of_an_epoch(folder: Path, tmp_path: Path) -> None:
    straight = fit(folder, 11)
    fit(folder, 8, checkpoint=checkpoints(tmp_path, save_on_train_epoch_end=True, every_n_epochs=1))
    for stop in (4, 8):
        assert fit(folder, 11, tmp_path / f"step={stop}.ckpt").seen == straight.seen[stop:]


def test_resume_after_validation_at_the_end_of_an_epoch(folder: Path, tmp_path: Path) -> None:
    straight = fit(folder, 11)
    fit(folder, 8, checkpoint=checkpoints(tmp_path, save_on_train_epoch_end=False, every_n_epochs=1))
    for stop in (4, 8):
        assert fit(folder, 11, tmp_path / f"step={stop}.ckpt").seen == straight.seen[stop:]


@pytest.mark.parametrize("stop", [2, 3, 4, 6])
def test_resume_with_shortened_epochs(stop: int, folder: Path, tmp_path: Path) -> None:
    straight = fit(folder, 8, limit=3)
    fit(folder, stop, checkpoint=checkpoints(tmp_path, every_n_train_steps=1), limit=3)
    resumed = fit(folder, 8, tmp_path / f"step={stop}.ckpt", limit=3)
    assert [row[1:] for row in resumed.seen] == [row[1:] for row in straight.seen[stop:]]


@pytest.mark.parametrize("stops", [(4, 6), (4, 8), (3, 8), (5, 6)], ids=str)
def test_resume_twice(stops: tuple[int, int], folder: Path, tmp_path: Path) -> None:
    straight = fit(folder, 11)
    ckpt, seen = None, []
    for stop in stops:
        saver = checkpoints(tmp_path, save_on_train_epoch_end=True, every_n_train_steps=1)
        seen += fit(folder, stop, ckpt, checkpoint=saver).seen
        ckpt = tmp_path / f"step={stop}.ckpt"
    seen += fit(folder, 11, ckpt).seen
    # Lightning may number epochs otherwise after a resume; the batches are what counts.
    assert [row[1:] for row in seen] == [row[1:] for row in straight.seen]


def test_resume_with_workers_that_fetch_ahead(folder: Path, tmp_path: Path) -> None:
    straight = fit(folder, 7)
    fit(folder, 6, checkpoint=checkpoints(tmp_path, every_n_train_steps=1), num_workers=2)
    for stop in (2, 5):
        assert fit(folder, 7, tmp_path / f"step={stop}.ckpt", num_workers=2).seen == straight.seen[stop:]


def test_resume_in_mid_epoch_with_other_data_is_refused(folder: Path, tmp_path: Path) -> None:
    fit(folder, 2, checkpoint=checkpoints(tmp_path, every_n_train_steps=2))
    with pytest.raises(ValueError, match="middle of an epoch of other data \\(seed was 0, is 7\\)"):
        fit(folder, 4, tmp_path / "step=2.ckpt", seed=7)


def test_epochs_reshuffle(folder: Path) -> None:
    seen = fit(folder, 8).seen
    first, second = ([row[1:-1] for row in rows] for rows in (seen[:4], seen[4:]))
    assert first != second
    assert sorted(t for row in first for t in row) == sorted(t for row in second for t in row)
