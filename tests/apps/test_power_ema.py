"""Snapshots of power-function averages in a fit, and averages of other lengths from them."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from poseidon_runs import QUIET, data, module, scot, trainer, write_data
from torch import Tensor

from thalweg.apps import cli
from thalweg.apps.ema_profiles import averaged, find, newest
from thalweg.apps.power_ema import PowerEMA
from thalweg.checkpoints import lightning_ckpt
from thalweg.checkpoints.tensors import load
from thalweg.core_optim.config import OptimConfig, ScheduleConfig
from thalweg.core_optim.power_ema import beta, gamma_of

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]
WANTED = 0.12


class Direct(L.Callback):
    """An average of the wanted profile, tracked."""

    def __init__(self) -> None:
        self.average: dict[str, Tensor] = {}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        t = trainer.global_step
        keep = beta(gamma_of(WANTED), t - 1, t)
        for name, weight in pl_module.named_parameters():
            new = weight.detach().double()
            self.average[name] = keep * self.average[name] + (1 - keep) * new if t > 1 else new


def fit(folder: Path, out: Path, epochs: int, *callbacks: L.Callback, ckpt: Path | None = None) -> None:
    """Epochs of five steps."""
    saver = ModelCheckpoint(out, save_last=True)
    options = {"limit_train_batches": 5, "limit_val_batches": 0, "enable_checkpointing": True}
    run = trainer(out, max_epochs=epochs, callbacks=[*callbacks, saver], **options)
    optim = OptimConfig(lr=1e-2, schedule=ScheduleConfig(name="constant"))
    model = module(scot(seed=1 if ckpt is None else 2), optim=optim)
    run.fit(model, datamodule=data(folder, "NS-Sines", batch_size=2), ckpt_path=ckpt)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), "NS-Sines")


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    out, direct = tmp_path_factory.mktemp("run"), Direct()
    fit(folder, out, 8, PowerEMA(every_n_steps=3), direct)
    return out, direct.average


def relative(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    squares = [((found[n].double() - wanted[n]).square().sum(), wanted[n].square().sum()) for n in wanted]
    return float((sum(a for a, _ in squares) / sum(b for _, b in squares)) ** 0.5)


def test_an_average_made_afterwards_is_the_tracked_one(run: tuple[Path, dict[str, Tensor]]) -> None:
    out, direct = run
    assert len(find(out)) == 2 * (13 + 1)  # steps 3, 6, ..., 39 and the last
    found, error = averaged(out, WANTED)
    last = lightning_ckpt.read(newest(out)).state_dict
    assert error < 0.05
    assert relative(found, direct) < 0.02 * relative(last, direct)


def test_the_command_writes_a_checkpoint_of_the_averages(
    run: tuple[Path, dict[str, Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, direct = run
    target = tmp_path / "wide.ckpt"
    cli.main(["ema", str(out), "--std", str(WANTED), "--out", str(target)])
    assert "the mixed profile is" in capsys.readouterr().out
    content = lightning_ckpt.read_content(target)
    assert "optimizer_states" not in content
    found, last = lightning_ckpt.read(target), lightning_ckpt.read(newest(out))
    assert found.global_step == 40
    assert relative(found.state_dict, direct) < 0.02 * relative(last.state_dict, direct)
    alone = tmp_path / "alone.safetensors"
    cli.main(["ema", str(out), "--std", str(WANTED), "--out", str(alone), "--step", "39"])
    assert relative(load(alone), direct) < 0.05
    assert not torch.equal(*(next(iter(load(p).values())) for p in (alone, find_file(out))))


def find_file(out: Path) -> Path:
    return next(out.rglob("step00000040-std0.05.safetensors"))


def test_a_fit_in_two_parts_has_the_same_averages(
    folder: Path, run: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    fit(folder, tmp_path / "first", 4, PowerEMA(every_n_steps=3))
    fit(folder, tmp_path / "second", 8, PowerEMA(every_n_steps=3), ckpt=tmp_path / "first" / "last.ckpt")
    whole, parts = (load(find_file(out)) for out in (run[0], tmp_path / "second"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_what_is_refused(run: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    out, _ = run
    with pytest.raises(ValueError, match="every_n_steps is 0, allowed: an integer >= 1"):
        PowerEMA(every_n_steps=0)
    with pytest.raises(ValueError, match=r"std of the profile is 0\.5"):
        PowerEMA(stds=(0.5,))
    with pytest.raises(SystemExit, match="no snapshots under"):
        cli.main(["ema", str(tmp_path)])
    with pytest.raises(SystemExit, match="no snapshot up to time 2, the first is at 3"):
        cli.main(["ema", str(out), "--step", "2"])
    other = tmp_path / "other.ckpt"
    torch.save({"state_dict": {"network.other": torch.ones(2)}}, other)
    with pytest.raises(SystemExit, match="is of another network than the snapshots"):
        cli.main(["ema", str(out), "--ckpt", str(other)])
