"""SAF and MESA in fits of real modules, and what is refused."""

import copy
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from optimizer_runs import copy_of, equal, fit, plain, plain_sgd, stored
from poseidon_runs import QUIET, data, fit_config, scot, write_data
from tiny_pipeline import tiny_unet

from thalweg.apps import cli
from thalweg.apps.loss_term import plus, tensor_of
from thalweg.apps.optim_callbacks import SAMGuard
from thalweg.apps.trajectory_callbacks import MESATerm, SAFTerm
from thalweg.checkpoints import lightning_ckpt
from thalweg.core_optim.config import OptimConfig, SAMConfig, ScheduleConfig
from thalweg.core_optim.trajectory import squared_to_past
from thalweg.diffusion.data import ImageDataModule
from thalweg.diffusion.module import DiffusionModule
from thalweg.pde.poseidon.module import PoseidonModule

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), "NS-Sines")


def everything(folder: Path) -> Any:
    return data(folder, "NS-Sines", num_trajectories=2, batch_size=6)


def test_saf_compares_each_pair_with_itself(folder: Path, tmp_path: Path) -> None:
    """With a learning rate of 0 outputs never change, so the term is 0 once there is a past."""
    options = {"max_epochs": 4, "limit_train_batches": 1.0, "datamodule": everything(folder)}
    saf = SAFTerm(weight=2.0, start_epoch=1, lag=1, dtype="float32")
    _, steps = fit(plain_sgd(), folder, tmp_path, [saf], **options)
    per_epoch = len(steps.terms) // 4
    assert steps.terms[: 2 * per_epoch] == [None] * (2 * per_epoch)
    assert max(steps.terms[2 * per_epoch :]) < 1e-10  # type: ignore[type-var]
    moving = plain()
    _, steps = fit(moving, folder, tmp_path / "moving", [SAFTerm(start_epoch=1, lag=1)], **options)
    assert min(steps.terms[2 * per_epoch :]) > 1e-6  # type: ignore[type-var]
    assert "training_step" not in moving.__dict__


def test_saf_in_two_parts_is_the_whole_fit(folder: Path, tmp_path: Path) -> None:
    whole, first, second = plain(), plain(), plain(2)

    def run(model: PoseidonModule, out: str, epochs: int, ckpt: Path | None = None) -> None:
        saf = SAFTerm(start_epoch=0, lag=1)
        options = {"limit_train_batches": 1.0, "datamodule": everything(folder)}
        fit(model, folder, tmp_path / out, [saf], ckpt, max_epochs=epochs, **options)

    run(whole, "whole", 4)
    run(first, "first", 2)
    run(second, "second", 4, tmp_path / "first" / "last.ckpt")
    assert equal(copy_of(whole), copy_of(second))
    without = plain()
    options = {"limit_train_batches": 1.0, "datamodule": everything(folder)}
    fit(without, folder, tmp_path / "without", max_epochs=4, **options)
    assert not equal(copy_of(whole), copy_of(without))


def test_mesa_is_the_distance_to_the_average(folder: Path, tmp_path: Path) -> None:
    """Computed again from the average in the checkpoint; in two parts the fit is the same."""
    whole, first, second = plain(), plain(), plain(2)
    settings: dict[str, Any] = {"start_epoch": 0, "decay": 0.9}
    mesa = MESATerm(**settings)
    _, steps = fit(whole, folder, tmp_path / "whole", [mesa], max_epochs=3)
    assert steps.terms[:3] == [None] * 3
    assert min(steps.terms[3:]) > 1e-8  # type: ignore[type-var]
    fit(first, folder, tmp_path / "first", [MESATerm(**settings)], max_epochs=1)
    last = tmp_path / "first" / "last.ckpt"
    fit(second, folder, tmp_path / "second", [MESATerm(**settings)], last, max_epochs=3)
    assert equal(copy_of(whole), copy_of(second))
    assert mesa.ema is not None
    average = scot()
    average.load_state_dict(copy_of(whole) | mesa.ema.average)
    x, t = torch.randn(2, 4, 16, 16), torch.ones(2)
    with torch.no_grad():
        outputs = [network(x, t).output for network in (whole.network.eval(), average.eval())]
        call = ((x, t), {}, outputs[0])
        whole.trainer.fit_loop.epoch_progress.current.processed = 5
        term = mesa.term(whole.trainer, whole, {}, call)
    assert term is not None
    torch.testing.assert_close(term, squared_to_past(*outputs))


def test_two_terms_in_one_fit_leave_the_module_as_it_was(folder: Path, tmp_path: Path) -> None:
    both = denoiser()
    terms = [SAFTerm(start_epoch=0, lag=1), MESATerm(start_epoch=0)]
    options = {"datamodule": digits(), "max_epochs": 2, "limit_val_batches": 0}
    run, _ = fit(both, folder, tmp_path, terms, **options)
    assert {"train/saf", "train/mesa"} <= run.callback_metrics.keys()
    assert not {"training_step", "draw", "log"} & both.__dict__.keys()


def denoiser(lr: float = 1e-2, sam: SAMConfig | None = None) -> DiffusionModule:
    network = tiny_unet(num_class_embeds=11).train()
    optim = OptimConfig(lr=lr, sam=sam, schedule=ScheduleConfig(name="constant"))
    return DiffusionModule(network, {"kind": "flow"}, optim, prediction="flow", label_dropout=0.3)


def digits(**options: Any) -> ImageDataModule:
    given: dict[str, Any] = {"image_size": 8, "channels": 1, "batch_size": 16, "num_val": 1733}
    return ImageDataModule("digits", **(given | options))


def test_saf_on_a_denoiser_repeats_times_noises_and_dropped_labels(folder: Path, tmp_path: Path) -> None:
    """With a learning rate of 0 the term is 0 in the epochs that compare, and absent in the others."""
    still = denoiser(lr=0.0)
    options = {"datamodule": digits(), "max_epochs": 6, "limit_train_batches": 1.0, "limit_val_batches": 0}
    saf = SAFTerm(start_epoch=0, lag=1, dtype="float32")
    _, steps = fit(still, folder, tmp_path, [saf], **options)
    per_epoch = len(steps.terms) // 6
    assert per_epoch == 4
    rows = [steps.terms[i : i + per_epoch] for i in range(0, len(steps.terms), per_epoch)]
    assert rows[0] == [None] * per_epoch
    assert all(max(row) < 1e-10 for row in rows[1::2])  # type: ignore[type-var]
    assert "draw" not in still.__dict__
    losses = [sum(steps.losses[i : i + per_epoch]) for i in range(0, len(steps.losses), per_epoch)]
    for first, second in (losses[0:2], losses[2:4], losses[4:6]):
        assert second == pytest.approx(first, rel=1e-5)
    assert len({round(value, 3) for value in losses}) == 3


def test_mesa_on_a_denoiser(folder: Path, tmp_path: Path) -> None:
    options = {"datamodule": digits(flip=True), "max_epochs": 2, "limit_val_batches": 0}
    _, steps = fit(denoiser(), folder, tmp_path, [MESATerm(start_epoch=0, decay=0.9)], **options)
    assert all(term is not None and 0.0 < term < 1.0 for term in steps.terms[3:])
    assert all(math.isfinite(loss) for loss in steps.losses)


class Unnamed(ImageDataModule):
    """Batches that do not say which samples they hold."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return {name: values for name, values in batch.items() if name != "index"}


def test_what_saf_and_mesa_refuse(folder: Path, tmp_path: Path) -> None:
    def refused(callback: L.Callback, reason: str, source: Any = None, model: Any = None) -> None:
        options = {"datamodule": source or digits(), "limit_val_batches": 0}
        with pytest.raises(ValueError, match=reason):
            fit(model or denoiser(), folder, tmp_path, [callback], **options)

    unnamed = Unnamed("digits", image_size=8, channels=1, batch_size=16, num_val=1733)
    refused(SAFTerm(start_epoch=0), "batches have no 'index' that says which samples", unnamed)
    refused(SAFTerm(), "flip mirrors images anew in every epoch", digits(flip=True))
    mixing = digits()
    mixing.mixup = 0.2  # type: ignore[attr-defined]
    refused(SAFTerm(), "mixup mixes samples anew in every epoch", mixing)
    refused(SAFTerm(start_epoch=0, max_gib=1e-6), r"take 3\.05e-05 GiB, max_gib is 1e-06: raise it")
    refused(MESATerm(part="model"), "DiffusionModule has no part 'model', only: network, val_loss")
    manual = denoiser()
    manual.automatic_optimization = False
    refused(MESATerm(), "DiffusionModule runs its own steps", model=manual)
    sharp = denoiser(sam=SAMConfig())
    sharp.automatic_optimization = False
    refused(SAMGuard(), "DiffusionModule runs its own steps, and SAM needs a closure", model=sharp)
    with pytest.raises(ValueError, match="kind of the trajectory loss is 'l1'"):
        SAFTerm(kind="l1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"weight of the term is -1, allowed: a number >= 0"):
        MESATerm(weight=-1)
    with pytest.raises(ValueError, match="samples and lag are 1 and 0"):
        SAFTerm(lag=0)


def test_what_networks_and_training_steps_return() -> None:
    x = torch.ones(2, 3)
    assert tensor_of((x, 1)) is tensor_of([x]) is tensor_of(x) is x
    assert float(plus({"loss": x.sum(), "other": 1}, x.sum())["loss"]) == 12.0
    assert plus(None, x.sum()) is None
    with pytest.raises(ValueError, match="a dict has no outputs to compare"):
        tensor_of({"a": x})


def test_a_configuration_names_them(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the command line, with SAM beside MESA; the callbacks that every run has do their part."""
    monkeypatch.chdir(tmp_path)
    config = fit_config(folder, tmp_path)
    config["data"]["init_args"] |= {"datasets": ["NS-Sines"], "max_num_time_steps": 2, "time_step_size": 2}
    config["trainer"] |= {"limit_train_batches": 2, "limit_val_batches": 1, "log_every_n_steps": 1}
    terms = "thalweg.apps.trajectory_callbacks."
    chosen = {
        "saf": (f"{terms}SAFTerm", {"start_epoch": 0, "lag": 1}),
        "mesa": (f"{terms}MESATerm", {"start_epoch": 0, "decay": 0.9}),
    }
    for name, (path, options) in chosen.items():
        run = copy.deepcopy(config)
        run["trainer"]["logger"]["init_args"]["version"] = name
        run["trainer"]["callbacks"].append({"class_path": path, "init_args": options})
        run["model"]["init_args"]["optim"]["sam"] = {"rho": 0.1} if name == "mesa" else None
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(run))
        cli.main(["fit", "--config", f"{name}.yaml"])
        table = (tmp_path / "run" / name / "metrics.csv").read_text()
        assert f"train/{name}" in table
    content = lightning_ckpt.read_content(tmp_path / "run" / "mesa" / "checkpoints" / "last.ckpt")
    assert content["optimizer_states"][0]["param_groups"][0]["rho"] == 0.1
    config["model"]["init_args"]["optim"] |= {"name": "schedulefree_adamw", "schedule": {"name": "constant"}}
    config["trainer"]["callbacks"].pop()
    (tmp_path / "free.yaml").write_text(yaml.safe_dump(config))
    cli.main(["fit", "--config", "free.yaml"])
    last = tmp_path / "run" / "one" / "checkpoints" / "last.ckpt"
    assert not equal(stored(last, "raw"), stored(last, "ema"))
