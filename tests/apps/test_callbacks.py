"""Averages and raw weights stay apart in every checkpoint; a stopped fit continues as if it had not been."""

import os
import signal
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from poseidon_runs import QUIET, data, module, scot, trainer, write_data
from torch import Tensor

from thalweg.apps.callbacks import EMA, SafeStop
from thalweg.apps.checkpoint_io import SafeCheckpointIO
from thalweg.apps.loggers import CSVLogger
from thalweg.checkpoints import lightning_ckpt
from thalweg.core_optim.config import OptimConfig, ScheduleConfig
from thalweg.pde.poseidon.module import PoseidonModule

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]
DECAY = 0.75
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), "NS-Sines")


class Record(L.Callback):
    """Raw weights after every step."""

    def __init__(self) -> None:
        self.steps: list[Weights] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, PoseidonModule)
        self.steps.append(copy_of(pl_module))


class At(L.Callback):
    """Do something once, in a hook, when so many steps are done."""

    def __init__(self, step: int, hook: str, action: Any) -> None:
        self.step, self.action, self.done = step, action, False
        setattr(self, hook, self.act)

    def act(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and not self.done:
            self.done = True
            self.action()


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def fail() -> None:
    raise OSError("the disk fell off")


def copy_of(model: PoseidonModule) -> Weights:
    return {name: value.detach().clone() for name, value in model.network.state_dict().items()}


def stored(path: Path, weights: Any) -> Weights:
    return lightning_ckpt.read(path, weights).network_state()


def equal(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def fit(
    folder: Path, out: Path, epochs: int, *callbacks: L.Callback, ckpt: Path | None = None, **options: Any
) -> tuple[L.Trainer, PoseidonModule]:
    """Epochs of three steps and one validation batch each, weights averaged."""
    saver = ModelCheckpoint(out, save_last=True, **options.pop("saver", {}))
    run = trainer(
        out,
        max_epochs=epochs,
        limit_train_batches=3,
        callbacks=[EMA(decay=DECAY), *callbacks, saver],
        enable_checkpointing=True,
        **{"limit_val_batches": 1, **options},
    )
    # Other fresh weights on resume, which must not matter.
    network = scot(seed=1 if ckpt is None else 2)
    model = module(network, optim=OptimConfig(lr=1e-2, schedule=ScheduleConfig(name="constant")))
    run.strategy.checkpoint_io = SafeCheckpointIO()
    run.fit(model, datamodule=data(folder, "NS-Sines"), ckpt_path=ckpt)
    return run, model


def average(steps: list[Weights]) -> Weights:
    mean = steps[0]
    for weights in steps[1:]:
        mean = {name: DECAY * mean[name] + (1 - DECAY) * weights[name] for name in mean}
    return mean


@pytest.mark.parametrize("validation", [0, 1])
def test_a_fit_in_two_parts_is_bitwise_the_whole_one(validation: int, folder: Path, tmp_path: Path) -> None:
    options = {"limit_val_batches": validation}
    fit(folder, tmp_path / "whole", 4, **options)
    fit(folder, tmp_path / "first", 2, **options)
    fit(folder, tmp_path / "second", 4, ckpt=tmp_path / "first" / "last.ckpt", **options)
    for weights in ("raw", "ema"):
        whole, parts = (stored(tmp_path / name / "last.ckpt", weights) for name in ("whole", "second"))
        assert equal(whole, parts)


def test_the_last_checkpoint_holds_raw_weights_and_averages(folder: Path, tmp_path: Path) -> None:
    record = Record()
    run, model = fit(folder, tmp_path, 2, record)
    last = tmp_path / "last.ckpt"
    assert equal(stored(last, "raw"), record.steps[-1])
    expected = average(record.steps)
    for name, value in stored(last, "ema").items():
        torch.testing.assert_close(value, expected[name])
    assert not equal(stored(last, "raw"), stored(last, "ema"))
    # After the fit the module holds the averages, and a checkpoint of it is still a right one.
    assert equal(copy_of(model), stored(last, "ema"))
    run.save_checkpoint(tmp_path / "later.ckpt")
    for weights in ("raw", "ema"):
        assert equal(stored(tmp_path / "later.ckpt", weights), stored(last, weights))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")
def test_validation_uses_the_averages(folder: Path, tmp_path: Path) -> None:
    run, _ = fit(folder, tmp_path, 2)
    during = run.callback_metrics["val/loss"]
    model = module(scot(seed=3))
    options = {"limit_val_batches": 1, "callbacks": [EMA(decay=DECAY)]}
    again = trainer(tmp_path, **options)
    again.validate(model, data(folder, "NS-Sines"), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert again.callback_metrics["val/loss"] == during
    assert equal(copy_of(model), stored(tmp_path / "last.ckpt", "ema"))


def test_a_failure_amid_a_validation_does_not_mix_them_up(folder: Path, tmp_path: Path) -> None:
    record = Record()
    failure = At(6, "on_validation_batch_end", fail)
    with pytest.raises(OSError, match="fell off"):
        fit(folder, tmp_path, 4, record, failure, saver={"save_on_exception": True})
    assert equal(stored(tmp_path / "last.ckpt", "raw"), record.steps[5])


# In mid-epoch, at an epoch's last step, and during a validation; without one the epoch's end comes at once.
@pytest.mark.parametrize("validation", [0, 1])
@pytest.mark.parametrize(
    ("step", "hook", "stops_at"),
    [
        (2, "on_before_zero_grad", 3),
        (4, "on_train_batch_start", 5),
        (6, "on_train_batch_end", 6),
        (6, "on_train_epoch_end", 6),
        (6, "on_validation_batch_start", 6),
    ],
)
def test_ctrl_c_loses_nothing(
    step: int, hook: str, stops_at: int, validation: int, folder: Path, tmp_path: Path
) -> None:
    if validation == 0 and "validation" in hook:
        pytest.skip("no validation to interrupt")
    options = {"limit_val_batches": validation}
    fit(folder, tmp_path / "whole", 4, **options)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit):
        fit(folder, tmp_path / "first", 4, At(step, hook, interrupt), SafeStop(), **options)
    assert signal.getsignal(signal.SIGTERM) is before
    last = tmp_path / "first" / "last.ckpt"
    assert lightning_ckpt.read(last).global_step == stops_at
    fit(folder, tmp_path / "second", 4, ckpt=last, **options)
    for weights in ("raw", "ema"):
        whole, parts = (stored(tmp_path / name / "last.ckpt", weights) for name in ("whole", "second"))
        assert equal(whole, parts)


def test_the_second_ctrl_c_stops_at_once(folder: Path, tmp_path: Path) -> None:
    def twice() -> None:
        interrupt()
        interrupt()

    record = Record()
    with pytest.raises(SystemExit):
        fit(folder, tmp_path, 4, At(1, "on_train_batch_start", twice), SafeStop(), record)
    assert len(record.steps) == 1
    assert not (tmp_path / "last.ckpt").exists()


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(folder: Path, tmp_path: Path) -> None:
    fit(folder, tmp_path, 1)
    last = tmp_path / "last.ckpt"
    before = last.read_bytes()

    class Full(dict):  # type: ignore[type-arg]
        def __reduce__(self) -> Any:
            fail()

    with pytest.raises(OSError, match="fell off"):
        SafeCheckpointIO().save_checkpoint({"state": Full()}, last)
    assert last.read_bytes() == before
    assert sorted(path.name for path in tmp_path.glob("*") if path.is_file()) == sorted(
        path.name for path in tmp_path.glob("*.ckpt")
    )


def test_metrics_of_a_continued_run_are_kept(tmp_path: Path) -> None:
    for value in (1.0, 2.0, 3.0):
        logger = CSVLogger(str(tmp_path), version="v")
        logger.log_metrics({"a": value}, step=1)
        logger.save()
    files = {path.name: path.read_text().split() for path in (tmp_path / "run" / "v").iterdir()}
    assert files == {
        "metrics_1.csv": ["a,step", "1.0,1"],
        "metrics_2.csv": ["a,step", "2.0,1"],
        "metrics.csv": ["a,step", "3.0,1"],
    }


def test_averages_need_a_decay_below_one() -> None:
    with pytest.raises(ValueError, match=r"decay of the moving average is 1\.0, allowed: 0 <= decay < 1"):
        EMA(decay=1.0)
