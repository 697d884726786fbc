"""Apps trained without gradients by Lightning: their own steps, schedules, checkpoints and resumes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from poseidon_runs import data, module, scot, trainer, write_data
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, TensorDataset

from thalweg.apps.callbacks import EMA
from thalweg.apps.zeroth_order import ZerothOrder, check, loss_of
from thalweg.core_optim.mezo import MeZO
from thalweg.core_optim.zo2 import ZO2, SlotBackend, TraceBackend
from thalweg.pde.poseidon.module import PoseidonModule

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]


class Small(L.LightningModule):
    """A network with dropout, logged loss and a falling rate."""

    def __init__(self, kind: Any = MeZO, dropout: float = 0.4, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Dropout(dropout)) for _ in range(3)]
        self.network = nn.Sequential(nn.Linear(4, 4), nn.ModuleList(layers), nn.Linear(4, 1))
        self.kind, self.options = kind, {"lr": 1e-2, **options}
        self.rates: list[float] = []
        self.logged: list[float] = []
        self.outputs: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        x = self.network[0](x)
        for layer in self.network[1]:
            x = layer(x)
        return self.network[2](x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:
        loss = (self(batch[0]) - batch[0].sum(dim=1, keepdim=True)).square().mean()
        assert loss.requires_grad != issubclass(self.kind, MeZO)
        self.log("train/loss", loss)
        self.outputs.append(loss.detach())
        return {"loss": loss}

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", self(batch[0]).square().mean())

    def on_train_batch_end(self, *_: Any) -> None:
        self.rates.append(self.optimizers().param_groups[0]["lr"])
        self.logged.append(float(self.trainer.callback_metrics["train/loss"]))

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = self.kind(self.parameters(), **self.options)
        schedule = LambdaLR(optimizer, lambda step: 1.0 - step / 12)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def loaders() -> DataLoader:
    return DataLoader(
        TensorDataset(torch.randn(12, 4, generator=torch.Generator().manual_seed(3))), batch_size=2
    )


def loop(folder: Path, steps: int = 12, callbacks: Any = (), **options: Any) -> L.Trainer:
    return L.Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": steps,
            "logger": False,
            "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(folder),
            "num_sanity_val_steps": 0,
            "callbacks": [ZerothOrder(), *callbacks],
            **options,
        }
    )


def fit(
    folder: Path, model: Small, steps: int = 12, ckpt_path: str | None = None, **options: Any
) -> L.Trainer:
    found = loop(folder, steps, **options)
    torch.manual_seed(7)
    found.fit(model, loaders(), loaders(), ckpt_path=ckpt_path)
    return found


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_fit_steps_schedules_logs_once_and_makes_no_gradients(tmp_path: Path) -> None:
    model = Small()
    run = fit(tmp_path, model)
    assert run.global_step == 12
    assert model.rates == pytest.approx([1e-2 * (1.0 - step / 12) for step in range(1, 13)])
    assert all(p.grad is None for p in model.parameters())
    assert len(model.outputs) == 24
    assert model.logged == pytest.approx([float(x) for x in model.outputs[::2]])
    assert "train/projected_gradient" in run.callback_metrics


def test_without_dropout_a_fit_equals_a_loop_by_hand_bitwise(tmp_path: Path) -> None:
    fitted, by_hand = Small(dropout=0.0), Small(dropout=0.0)
    fit(tmp_path, fitted)
    optimizer = MeZO(by_hand.parameters(), lr=1e-2)
    schedule = LambdaLR(optimizer, lambda step: 1.0 - step / 12)
    batches = [*loaders(), *loaders()]
    for (x,) in batches:
        optimizer.step(lambda x=x: (by_hand(x) - x.sum(dim=1, keepdim=True)).square().mean())
        schedule.step()
    assert equal(weights(fitted), weights(by_hand))


def test_zo2_in_a_fit_equals_mezo_bitwise_and_validates_alike(tmp_path: Path) -> None:
    plain, streamed = Small(), Small(ZO2)
    trace = TraceBackend(SlotBackend("cpu"))
    first = fit(tmp_path, plain, check_val_every_n_epoch=1)
    second = fit(tmp_path, streamed, callbacks=[], check_val_every_n_epoch=1)
    third = Small(ZO2)
    run = loop(tmp_path)
    run.callbacks = [ZerothOrder(backend=trace)]
    torch.manual_seed(7)
    run.fit(third, loaders(), loaders())
    assert equal(weights(plain), weights(streamed))
    assert equal(weights(plain), weights(third))
    assert trace.events
    assert first.callback_metrics["val/loss"] == second.callback_metrics["val/loss"]
    assert run.callback_metrics["val/loss"] == first.callback_metrics["val/loss"]


@pytest.mark.parametrize("kind", [MeZO, ZO2])
def test_resumed_run_equals_straight_run_bitwise(kind: type[MeZO], tmp_path: Path) -> None:
    """Checkpoints hold the weights after the last update, with nothing pending."""
    options = {"dropout": 0.0}
    straight = Small(kind, **options)
    fit(tmp_path / "a", straight)
    saver = ModelCheckpoint(tmp_path / "b", every_n_train_steps=6, save_top_k=-1)
    first = Small(kind, **options)
    fit(tmp_path / "b", first, 6, callbacks=[saver])
    saved = torch.load(saver.best_model_path, weights_only=True)
    assert saved["global_step"] == 6
    assert saved["optimizer_states"][0]["zeroth_order"].get("pending") is None
    assert equal([v for k, v in saved["state_dict"].items()], weights(first))
    second = Small(kind, **options)
    saver = ModelCheckpoint(tmp_path / "b", every_n_train_steps=6, save_top_k=-1)
    path = str(next((tmp_path / "b").glob("*step=6.ckpt")))
    found = fit(tmp_path / "b", second, 12, ckpt_path=path, callbacks=[saver])
    assert found.global_step == 12
    assert equal(weights(straight), weights(second))


def test_bf16_mixed_precision_sees_the_shift(tmp_path: Path) -> None:
    """Lightning enters autocast around the whole training step, hence around both evaluations."""
    model = Small(dropout=0.0, eps=1e-1)
    found = fit(tmp_path, model, 3, precision="bf16-mixed")
    assert found.callback_metrics["train/projected_gradient"] != 0.0


@pytest.mark.parametrize("kind", [MeZO, ZO2])
def test_poseidon_trains_without_gradients(
    kind: type[MeZO], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def configure(self: PoseidonModule) -> torch.optim.Optimizer:
        return kind(self.network.parameters(), lr=1e-6, eps=1e-3)

    monkeypatch.setattr(PoseidonModule, "configure_optimizers", configure)
    write_data(tmp_path, "NS-Sines")
    network = scot()
    run = trainer(tmp_path, max_steps=3, val_check_interval=3, callbacks=[ZerothOrder()])
    run.fit(module(network), datamodule=data(tmp_path, "NS-Sines"))
    assert run.global_step == 3
    assert torch.isfinite(run.callback_metrics["val/loss"])
    assert not equal(weights(network), weights(scot()))
    assert all(p.grad is None for p in network.parameters())


@pytest.mark.dist
def test_two_processes_under_lightning_stay_equal_bitwise(tmp_path: Path) -> None:
    from poseidon_processes import run
    from zeroth_processes import fit_mezo_ddp

    write_data(tmp_path, "NS-Sines")
    first, second = run(fit_mezo_ddp, tmp_path)
    assert first["steps"] == second["steps"] == 3
    assert first["gradient"] == second["gradient"] != 0.0
    start = scot(seed=0).state_dict()
    assert any(not torch.equal(start[key], value) for key, value in first["weights"].items())
    assert all(torch.equal(second["weights"][key], value) for key, value in first["weights"].items())


def test_a_second_fit_may_use_gradients_again(tmp_path: Path) -> None:
    model = Small(dropout=0.0)
    callback = ZerothOrder()
    run = loop(tmp_path)
    run.callbacks = [callback]
    run.fit(model, loaders(), loaders())
    assert not model.automatic_optimization
    model.kind, model.outputs = torch.optim.SGD, []
    again = loop(tmp_path, 2)
    again.callbacks = [callback]
    again.fit(model, loaders(), loaders())
    assert model.automatic_optimization
    assert again.global_step == len(model.outputs) == 2


def refused(**options: Any) -> tuple[Any, Any]:
    fake = {
        "precision": "32-true",
        "optimizers": [None],
        "accumulate_grad_batches": 1,
        "gradient_clip_val": None,
        "lr_scheduler_configs": [],
        "world_size": 1,
        "callbacks": [],
    }
    manual = options.pop("manual", False)
    return SimpleNamespace(**{**fake, **options}), SimpleNamespace(automatic_optimization=not manual)


def plateau() -> ReduceLROnPlateau:
    return ReduceLROnPlateau(torch.optim.SGD([nn.Parameter(torch.zeros(1))]))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            {"accumulate_grad_batches": 4},
            "accumulate_grad_batches is 4, allowed with MeZO: 1, since there are no",
        ),
        ({"gradient_clip_val": 5.0}, "gradient_clip_val is 5.0, allowed with MeZO: null"),
        ({"precision": "16-mixed"}, "the loss scaler of 16-mixed calls the optimizer without its closure"),
        ({"manual": True}, "SimpleNamespace runs its optimizers itself"),
        ({"optimizers": [None, None]}, "runs its optimizers itself"),
        (
            {"lr_scheduler_configs": [SimpleNamespace(scheduler=plateau())]},
            "ReduceLROnPlateau is not supported",
        ),
    ],
)
def test_what_cannot_be_right_is_refused_with_the_reason(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check(*refused(**options), MeZO([nn.Parameter(torch.zeros(1))]))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"world_size": 2}, "the run has 2 processes, allowed with ZO2: 1"),
        ({"callbacks": [EMA()]}, "weight averages would lag behind by the pending update"),
    ],
)
def test_zo2_refuses_more(options: dict[str, Any], reason: str) -> None:
    check(*refused(**options), MeZO([nn.Parameter(torch.zeros(1))]))
    with pytest.raises(ValueError, match=reason):
        check(*refused(**options), ZO2([nn.Parameter(torch.zeros(1))]))


def test_a_callback_with_options_replaces_the_one_of_every_run(tmp_path: Path) -> None:
    model = Small(ZO2, dropout=0.0)
    run = loop(tmp_path, 3, callbacks=[ZerothOrder(host_dtype="bfloat16")])
    found: list[torch.dtype] = []
    model.on_train_batch_end = lambda *_: found.append(model.network[1][0][0].weight.dtype)  # type: ignore[method-assign]
    run.fit(model, loaders(), loaders())
    assert found == [torch.bfloat16] * 3
    assert model.network[1][0][0].weight.dtype == torch.float32


def test_accumulation_is_refused_in_a_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="accumulate_grad_batches is 2"):
        fit(tmp_path, Small(), accumulate_grad_batches=2)


def test_a_step_without_a_loss_is_named() -> None:
    with pytest.raises(ValueError, match="training_step returned no loss"):
        loss_of(None)


def test_unknown_host_dtype_is_named() -> None:
    with pytest.raises(ValueError, match="host_dtype is 'int8', allowed: float32, bfloat16, float16"):
        ZerothOrder(host_dtype="int8")
