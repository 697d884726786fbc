"""SAM in fits of real modules, and what is refused with it."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins import MixedPrecision
from optimizer_runs import Chosen, chosen, copy_of, equal, fit, plain, plain_sgd
from poseidon_runs import QUIET, module, scot, write_data
from torch import Tensor

from thalweg.apps.optim_callbacks import SAMGuard
from thalweg.apps.trajectory_callbacks import SAFTerm
from thalweg.core_optim.config import OptimConfig, SAMConfig, ScheduleConfig
from thalweg.core_optim.sam import SAM
from thalweg.pde.poseidon.module import PoseidonModule

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), "NS-Sines")


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


class ByHand(PoseidonModule):
    """Puts SAM around its optimizer itself."""

    def configure_optimizers(self) -> Any:
        return SAM(None, super().configure_optimizers()["optimizer"], rho=0.1)


def test_sam_around_the_optimizer_of_an_app(folder: Path, tmp_path: Path) -> None:
    """The schedule acts on it, rho = 0 is the optimizer itself, and a fit in two parts is the whole one."""
    whole, first, second = (sharp(seed, rho=0.1) for seed in (1, 1, 2))
    zero, alone = sharp(rho=0.0), plain()
    fit(whole, folder, tmp_path / "whole", [SAMGuard()], max_epochs=2)
    fit(first, folder, tmp_path / "first", [SAMGuard()])
    last = tmp_path / "first" / "last.ckpt"
    run, _ = fit(second, folder, tmp_path / "second", [SAMGuard()], last, max_epochs=2)
    assert equal(copy_of(whole), copy_of(second))
    assert isinstance(run.optimizers[0], SAM)
    fit(zero, folder, tmp_path / "zero", [SAMGuard()], max_epochs=2)
    fit(alone, folder, tmp_path / "alone", max_epochs=2)
    assert equal(copy_of(zero), copy_of(alone))
    assert not equal(copy_of(zero), copy_of(whole))
    by_hand = ByHand(scot(seed=1), OptimConfig(lr=1e-2, schedule=ScheduleConfig(name="constant")))
    fit(by_hand, folder, tmp_path / "by_hand", [SAMGuard()], max_epochs=2)
    assert equal(copy_of(by_hand), copy_of(whole))
    falling = module(scot(), optim=OptimConfig(lr=1e-2, sam=SAMConfig()))
    run, _ = fit(falling, folder, tmp_path / "falling", [SAMGuard()])
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0)
    assert run.lr_scheduler_configs[0].scheduler.optimizer is run.optimizers[0]


def sharp(seed: int = 1, **options: Any) -> PoseidonModule:
    schedule = ScheduleConfig(name="constant")
    return module(scot(seed=seed), optim=OptimConfig(lr=1e-2, schedule=schedule, sam=SAMConfig(**options)))


@pytest.mark.parametrize("again", [False, True])
def test_the_second_evaluation_draws_the_same_if_asked_to(again: bool, folder: Path, tmp_path: Path) -> None:
    """Random numbers in the loss, drawn in each evaluation of a fit of three steps."""
    drawn: list[Tensor] = []
    model = sharp(rho=0.1, replay_random=again)
    model.network.register_forward_hook(lambda *_: drawn.append(torch.rand(3)))
    fit(model, folder, tmp_path, [SAMGuard()], limit_val_batches=0)
    assert len(drawn) == 6
    assert [torch.equal(drawn[i], drawn[i + 1]) for i in (0, 2, 4)] == [again] * 3
    assert not torch.equal(drawn[0], drawn[2])


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


def test_a_configuration_with_an_impossible_radius_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sam: rho is -0\.1, allowed: a number >= 0"):
        SAMConfig(rho=-0.1)
