"""SAM, schedule-free optimizers, SAF and MESA in fits of real modules, and what is refused."""

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from poseidon_runs import QUIET, data, fit_config, module, scot, trainer, write_data
from torch import Tensor
from torch.optim import Optimizer

from thalweg.apps import cli
from thalweg.apps.callbacks import EMA
from thalweg.apps.loss_term import plus, tensor_of
from thalweg.apps.optim_callbacks import SAMGuard, ScheduleFreeMode, SharpnessAware
from thalweg.apps.trajectory_callbacks import MESATerm, SAFTerm
from thalweg.checkpoints import lightning_ckpt
from thalweg.core_optim import ScheduleFreeAdamW
from thalweg.core_optim.config import OptimConfig, SAMConfig, ScheduleConfig
from thalweg.core_optim.sam import SAM
from thalweg.core_optim.trajectory import squared_to_past
from thalweg.diffusion.data import ImageDataModule
from thalweg.diffusion.module import DiffusionModule
from thalweg.pde.poseidon.module import PoseidonModule

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), "NS-Sines")


class Chosen(PoseidonModule):
    """Another optimizer."""

    made: Any = staticmethod(lambda params: SAM(params, "AdamW", {"lr": 1e-2}, rho=0.1))

    def configure_optimizers(self) -> Any:
        return self.made(self.network.parameters())


class Steps(L.Callback):
    """What a fit does."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.evaluations = 0
        self.validated: list[Weights] = []
        self.terms: list[float | None] = []

    def on_after_backward(self, *_: Any) -> None:
        self.evaluations += 1

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(float(outputs["loss"]))
        found = [trainer.callback_metrics.get(f"train/{name}") for name in ("saf", "mesa")]
        self.terms += [float(value) for value in found if value is not None] or [None]

    def on_validation_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.validated.append(copy_of(pl_module))


def copy_of(model: L.LightningModule) -> Weights:
    return {name: value.detach().clone() for name, value in model.network.state_dict().items()}


def equal(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def chosen(make: Any = None, seed: int = 1) -> Chosen:
    model = Chosen(scot(seed=seed), OptimConfig(lr=1e-2))
    if make is not None:
        model.made = make
    return model


def plain(seed: int = 1) -> PoseidonModule:
    return module(scot(seed=seed), optim=OptimConfig(lr=1e-2, schedule=ScheduleConfig(name="constant")))


def fit(
    model: L.LightningModule,
    folder: Path,
    out: Path,
    callbacks: Sequence[L.Callback] = (),
    ckpt: Path | None = None,
    **options: Any,
) -> tuple[L.Trainer, Steps]:
    """Epochs of three steps and one validation batch each."""
    steps = Steps()
    given = {"max_epochs": 1, "limit_train_batches": 3, "limit_val_batches": 1, **options}
    datamodule = given.pop("datamodule", None) or data(folder, "NS-Sines")
    saver = ModelCheckpoint(out, save_last=True)
    run = trainer(out, callbacks=[*callbacks, steps, saver], enable_checkpointing=True, **given)
    run.fit(model, datamodule=datamodule, ckpt_path=ckpt)
    return run, steps


def test_sam_evaluates_twice_and_reports_the_loss_at_the_weights(folder: Path, tmp_path: Path) -> None:
    model = chosen(lambda params: SAM(params, "SGD", {"lr": 0.0}, rho=0.5))
    before = copy_of(model)
    run, steps = fit(model, folder, tmp_path, [SAMGuard()], gradient_clip_val=0.1)
    assert equal(copy_of(model), before)
    assert steps.evaluations == 2 * len(steps.losses) == 6
    unperturbed, _ = fit(plain_sgd(), folder, tmp_path / "plain", limit_train_batches=1)
    assert steps.losses[0] == float(unperturbed.callback_metrics["train/loss"])
    assert float(run.callback_metrics["train/loss"]) == steps.losses[-1]
    optimizer = run.optimizers[0]
    assert isinstance(optimizer, SAM)
    assert optimizer.model is model
    assert "log" not in model.__dict__


def plain_sgd() -> Chosen:
    return chosen(lambda params: torch.optim.SGD(params, lr=0.0))


def test_sam_around_the_optimizer_of_an_app(folder: Path, tmp_path: Path) -> None:
    """The schedule acts on it, rho = 0 is the optimizer itself, and a fit in two parts is the whole one."""
    whole, first, second, zero, alone = (plain(seed) for seed in (1, 1, 2, 1, 1))
    fit(whole, folder, tmp_path / "whole", [SharpnessAware(rho=0.1)], max_epochs=2)
    fit(first, folder, tmp_path / "first", [SharpnessAware(rho=0.1)])
    last = tmp_path / "first" / "last.ckpt"
    run, _ = fit(second, folder, tmp_path / "second", [SharpnessAware(rho=0.1)], last, max_epochs=2)
    assert equal(copy_of(whole), copy_of(second))
    assert isinstance(run.optimizers[0], SAM)
    fit(zero, folder, tmp_path / "zero", [SharpnessAware(rho=0.0)], max_epochs=2)
    fit(alone, folder, tmp_path / "alone", max_epochs=2)
    assert equal(copy_of(zero), copy_of(alone))
    assert not equal(copy_of(zero), copy_of(whole))
    wanted = OptimConfig(lr=1e-2, schedule=ScheduleConfig(name="constant"), sam=SAMConfig(rho=0.1))
    configured = module(scot(seed=1), optim=wanted)
    fit(configured, folder, tmp_path / "configured", [SAMGuard()], max_epochs=2)
    assert equal(copy_of(configured), copy_of(whole))
    falling = module(scot(), optim=OptimConfig(lr=1e-2))
    run, _ = fit(falling, folder, tmp_path / "falling", [SharpnessAware()])
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("options", "extra", "reason"),
    [
        ({"accumulate_grad_batches": 2}, [], "accumulate_grad_batches is 2, allowed with SAM: 1"),
        ({}, [GradientAccumulationScheduler({0: 1, 1: 3})], "accumulate_grad_batches is 3, allowed with SAM"),
        ({"plugins": "scaled"}, [], "precision is 16-mixed, allowed with SAM: 32-true, bf16-mixed"),
        (
            {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"},
            [],
            "gradient_clip_algorithm is value, allowed with SAM: norm",
        ),
        ({}, [SAFTerm()], "SAM evaluates each batch at several weights"),
        ({}, [SharpnessAware()], "the optimizer is SAM, allowed with SharpnessAware: one without closures"),
    ],
)
def test_what_cannot_be_right_with_sam(
    options: dict[str, Any], extra: list[L.Callback], reason: str, folder: Path, tmp_path: Path
) -> None:
    if options.get("plugins") == "scaled":
        options = {"plugins": MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))}
    with pytest.raises(ValueError, match=reason):
        fit(chosen(), folder, tmp_path, [SAMGuard(), *extra], max_epochs=2, **options)


def test_modules_that_step_themselves_have_to_give_closures(folder: Path, tmp_path: Path) -> None:
    class Manual(Chosen):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.automatic_optimization = False
            self.gives_closures = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            def closure() -> Tensor:
                losses = []
                for half in (slice(0, 2), slice(2, 4)):
                    part = {name: values[half] for name, values in batch.items()}
                    losses.append(super(Manual, self).training_step(part, batch_idx) / 2)
                    self.manual_backward(losses[-1])
                return torch.stack(losses).sum()

            optimizer: Any = self.optimizers()
            optimizer.step(closure if self.gives_closures else None)

    model = Manual(scot(), OptimConfig())
    with pytest.raises(ValueError, match="Manual runs its own steps, and SAM needs a closure"):
        fit(model, folder, tmp_path, [SAMGuard()])
    with pytest.raises(ValueError, match="the closure gave neither a loss nor a gradient"):
        fit(model, folder, tmp_path)
    model.gives_closures = True
    before = copy_of(model)
    run, _ = fit(model, folder, tmp_path, [SAMGuard()])
    assert run.global_step == 3
    assert not equal(copy_of(model), before)


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


def stored(path: Path, weights: Any) -> Weights:
    return lightning_ckpt.read(path, weights).network_state()


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


def denoiser(lr: float = 1e-2) -> DiffusionModule:
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4, num_class_embeds=11,
    )  # fmt: skip
    optim = OptimConfig(lr=lr, schedule=ScheduleConfig(name="constant"))
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
    refused(SharpnessAware(), "DiffusionModule runs its optimizers itself", model=copy.copy(manual))
    with pytest.raises(ValueError, match="kind of the trajectory loss is 'l1'"):
        SAFTerm(kind="l1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"weight of the term is -1, allowed: a number >= 0"):
        MESATerm(weight=-1)
    with pytest.raises(ValueError, match="samples and lag are 1 and 0"):
        SAFTerm(lag=0)
    with pytest.raises(ValueError, match=r"rho is -0\.1, allowed: a number >= 0"):
        SharpnessAware(rho=-0.1)


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
