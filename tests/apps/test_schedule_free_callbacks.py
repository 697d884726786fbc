"""Schedule-free optimizers in fits of real modules."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from optimizer_runs import Weights, chosen, copy_of, equal, fit, plain, stored
from poseidon_runs import QUIET, write_data
from torch.optim import Optimizer

from thalweg.apps.callbacks import EMA
from thalweg.apps.optim_callbacks import SAMGuard, ScheduleFreeMode
from thalweg.checkpoints import lightning_ckpt
from thalweg.core_optim import ScheduleFreeAdamW

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), "NS-Sines")


def test_without_such_optimizers_the_callbacks_do_nothing(folder: Path, tmp_path: Path) -> None:
    one, other = plain(), plain()
    fit(one, folder, tmp_path / "with", [SAMGuard(), ScheduleFreeMode()], accumulate_grad_batches=3)
    fit(other, folder, tmp_path / "without", accumulate_grad_batches=3)
    assert equal(copy_of(one), copy_of(other))
    assert "current_model_state" not in lightning_ckpt.read_content(tmp_path / "with" / "last.ckpt")


def free(params: Any) -> Optimizer:
    return ScheduleFreeAdamW(params, lr=1e-2)


def test_schedule_free_weights_are_exchanged_and_a_fit_in_two_parts_is_the_whole_one(
    folder: Path, tmp_path: Path
) -> None:
    whole, first, second = chosen(free), chosen(free), chosen(free, seed=2)
    _, steps = fit(whole, folder, tmp_path / "whole", [ScheduleFreeMode()], max_epochs=2)
    fit(first, folder, tmp_path / "first", [ScheduleFreeMode()], limit_val_batches=0)
    last = tmp_path / "first" / "last.ckpt"
    fit(second, folder, tmp_path / "second", [ScheduleFreeMode()], last, max_epochs=2)
    x, y = (stored(tmp_path / "whole" / "last.ckpt", weights) for weights in ("ema", "raw"))
    assert equal(copy_of(whole), x)
    assert equal(steps.validated[-1], x)
    assert not equal(x, y)
    for weights, expected in (("ema", x), ("raw", y)):
        assert equal(stored(tmp_path / "second" / "last.ckpt", weights), expected)


def test_schedule_free_weights_are_the_average_of_the_iterates(folder: Path, tmp_path: Path) -> None:
    """x = (y - (1 - b1) z) / b1, from what the checkpoint holds."""
    fit(chosen(free), folder, tmp_path, [ScheduleFreeMode()])
    content = lightning_ckpt.read_content(tmp_path / "last.ckpt")
    states = content["optimizer_states"][0]["state"]
    names = [name for name, _ in chosen().network.named_parameters()]
    for i, name in enumerate(names):
        y, x = (content[key][f"network.{name}"] for key in ("current_model_state", "state_dict"))
        torch.testing.assert_close(x, (y - 0.1 * states[i]["z"]) / 0.9, rtol=1e-5, atol=1e-6)


def test_an_interrupted_validation_does_not_mix_them_up(folder: Path, tmp_path: Path) -> None:
    class Fails(L.Callback):
        def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "amid.ckpt")
                raise OSError("the disk fell off")

    trained: list[Weights] = []

    class Records(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            trained.append(copy_of(pl_module))

    model = chosen(free)
    with pytest.raises(OSError, match="fell off"):
        fit(model, folder, tmp_path, [ScheduleFreeMode(), Records(), Fails()], max_epochs=2)
    x, y = (stored(tmp_path / "amid.ckpt", weights) for weights in ("ema", "raw"))
    assert equal(y, trained[-1])
    assert equal(x, copy_of(model))
    assert not equal(x, y)
    states = lightning_ckpt.read_content(tmp_path / "amid.ckpt")["optimizer_states"]
    assert states[0]["param_groups"][0].get("mode", "train") == "train"


def test_schedule_free_weights_are_not_averaged_again(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="averages weights already: remove the callback EMA"):
        fit(chosen(free), folder, tmp_path, [ScheduleFreeMode(), EMA()])
