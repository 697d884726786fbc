"""Training of denoisers: what the loss is, what validation repeats, and that a resume changes nothing."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from thalweg.apps.callbacks import EMA
from thalweg.core_optim.config import OptimConfig, ScheduleConfig
from thalweg.diffusion.data import ImageDataModule
from thalweg.diffusion.module import DiffusionModule
from thalweg.diffusion.order import generator
from thalweg.diffusion.parameterization import from_data
from thalweg.diffusion.schedules import NoiseSchedule

FLOW = {"kind": "flow"}
DISCRETE = {"kind": "vp_discrete", "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


def unet(**options: Any) -> UNet2DModel:
    torch.manual_seed(0)
    given: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (8, 8),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4,
        "num_class_embeds": 11,
    }
    return UNet2DModel(**(given | options))


def dit(**options: Any) -> DiTTransformer2DModel:
    torch.manual_seed(0)
    given: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 2,  # image and variance
        "num_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_embeds_ada_norm": 10,
    }
    return DiTTransformer2DModel(**(given | options))


class Fixed(nn.Module):
    """Answers zero, or what is right if all images are the same one."""

    def __init__(self, schedule: dict[str, Any], prediction: str, image: Tensor | None = None) -> None:
        super().__init__()
        self.config = {"num_class_embeds": 11, "sample_size": 8, "in_channels": 1}
        self.schedule, self.prediction, self.image = NoiseSchedule.from_dict(schedule), prediction, image
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, label: Tensor, class_labels: Tensor) -> UNet2DOutput:
        self.seen.append(class_labels)
        if self.image is None:
            return UNet2DOutput(sample=torch.zeros_like(x))
        t = label.double() / 1000 if self.schedule.kind == "flow" else (label.double() + 1) / 1000
        levels = (self.schedule.alpha(t.numpy()), self.schedule.sigma(t.numpy()))
        alpha, sigma = (torch.as_tensor(level)[:, None, None, None] for level in levels)
        answer = from_data(self.image.double(), x.double(), alpha, sigma, self.prediction)
        return UNet2DOutput(sample=answer.float().expand_as(x))


def batch(count: int = 16) -> dict[str, Tensor]:
    images = torch.rand(1, 8, 8, generator=generator(9)) * 2 - 1
    return {"images": images.expand(count, 1, 8, 8).clone(), "labels": torch.arange(count) % 10}


def module(network: nn.Module, **options: Any) -> DiffusionModule:
    optim = OptimConfig(lr=1e-2, schedule=ScheduleConfig(name="cosine"))
    return DiffusionModule(network, options.pop("schedule", FLOW), optim, **options)


@pytest.mark.parametrize(
    ("schedule", "prediction"),
    [(FLOW, "flow"), (FLOW, "data"), (DISCRETE, "noise"), (DISCRETE, "v"), (DISCRETE, "data")],
)
def test_a_perfect_denoiser_has_no_loss(schedule: dict[str, Any], prediction: Any) -> None:
    data = batch()
    network = Fixed(schedule, prediction, data["images"][0])
    trained = module(network, schedule=schedule, prediction=prediction)
    # float32 noisy images, divided by the smallest sigma, 0.01 (discrete) or 0.001 (flow)
    assert trained.losses(data, generator(0), label_dropout=0.0).max() < 1e-6
    network.image = None
    assert trained.losses(data, generator(0), label_dropout=0.0).min() > 1e-2


def test_the_loss_of_answering_zero_is_the_mean_square_of_the_target() -> None:
    data = batch()
    wrong_about_data = module(Fixed(FLOW, "data"), prediction="data")
    losses = wrong_about_data.losses(data, generator(0), label_dropout=0.0)
    torch.testing.assert_close(losses, data["images"].square().mean(dim=(1, 2, 3)))
    data["images"] = torch.zeros(400, 1, 8, 8)
    data["labels"] = torch.zeros(400, dtype=torch.long)
    wrong_about_flow = module(Fixed(FLOW, "flow"), prediction="flow")
    mean = wrong_about_flow.losses(data, generator(0), label_dropout=0.0).mean().item()
    assert mean == pytest.approx(1.0, abs=4 * (2 / (400 * 64)) ** 0.5)  # noise of unit variance


def test_labels_are_dropped_in_training_only() -> None:
    network = Fixed(FLOW, "flow")
    trained = module(network, prediction="flow", label_dropout=1.0)
    trained.validation_step(batch(), 0)
    assert torch.equal(network.seen[-1], batch()["labels"])
    trained.losses(batch(), generator(0), label_dropout=trained.label_dropout)
    assert (network.seen[-1] == 10).all()


def test_a_dit_drops_no_labels_on_its_own() -> None:
    trained = module(dit(), prediction="flow")
    trained.train()
    labels = torch.arange(64) % 10
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.normal_(std=0.1)
        first, second = (trained(torch.ones(64, 1, 8, 8), torch.ones(64), labels) for _ in range(2))
    assert first.shape == (64, 1, 8, 8)
    assert torch.equal(first, second)


def test_time_labels_are_those_of_the_scheduler() -> None:
    alpha, sigma, label = module(unet(), schedule=DISCRETE).levels(torch.tensor([0.0, 0.5, 1.0]).double())
    assert label.tolist() == pytest.approx([0.0, 499.5, 999.0])
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha))


def data_module(**options: Any) -> ImageDataModule:
    given: dict[str, Any] = {"image_size": 8, "channels": 1, "batch_size": 16, "num_val": 1697, "flip": True}
    return ImageDataModule("digits", **(given | options))


def fit(folder: Path, network: nn.Module, resume: Path | None = None, **options: Any) -> DiffusionModule:
    """Ten steps of at most six batches an epoch, with a checkpoint every two steps."""
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    trainer = L.Trainer(
        max_steps=10,
        accelerator="cpu",
        logger=False,
        callbacks=[saver, EMA(decay=0.9)],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )
    trained = module(network, prediction="flow", weighting="min-snr")
    trainer.fit(trained, data_module(), ckpt_path=resume, weights_only=True)
    return trained


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize(("make", "step"), [(unet, 4), (unet, 6), (dit, 8)])
def test_a_resumed_run_equals_an_uninterrupted_one(make: Any, step: int, tmp_path: Path) -> None:
    straight = fit(tmp_path / "straight", make())
    saved = tmp_path / "straight" / f"step={step}.ckpt"
    resumed = fit(tmp_path / "resumed", make(), resume=saved)
    ends = [
        torch.load(tmp_path / name / "step=10.ckpt", weights_only=True) for name in ("straight", "resumed")
    ]
    for key in ("state_dict", "current_model_state"):
        assert ends[0][key].keys() == ends[1][key].keys()
        for name, value in ends[0][key].items():
            assert torch.equal(value, ends[1][key][name]), (key, name)
    for first, second in zip(straight.parameters(), resumed.parameters()):
        assert torch.equal(first, second)


def test_accumulated_batches_have_their_own_noises(tmp_path: Path) -> None:
    class Watched(DiffusionModule):
        states: list[int]

        def losses(self, batch: dict[str, Tensor], stream: torch.Generator, **options: Any) -> Tensor:
            self.states.append(stream.initial_seed())
            return super().losses(batch, stream, **options)

    trained = Watched(unet(), FLOW, OptimConfig(lr=1e-3), prediction="flow")
    trained.states = []
    trainer = L.Trainer(
        max_steps=3, accumulate_grad_batches=2, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(trained, data_module())
    assert len(trained.states) == len(set(trained.states)) == 6


def test_validation_repeats_itself() -> None:
    trained = module(unet(), prediction="flow")
    values = []
    for seed in range(2):
        torch.manual_seed(seed)
        with torch.no_grad():
            trained.validation_step(batch(), 0)
        values.append(trained.val_loss.compute().item())
        trained.val_loss.reset()
    assert values[0] == values[1]


def test_training_lowers_the_validation_loss(tmp_path: Path) -> None:
    trainer = L.Trainer(
        max_epochs=12, accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False,
    )  # fmt: skip
    trained = module(unet(), prediction="flow")
    data = data_module(num_val=200, batch_size=64)
    before = trainer.validate(trained, data, verbose=False)[0]["val/loss"]
    trainer.fit(trained, data)
    assert trainer.validate(trained, data, verbose=False)[0]["val/loss"] < 0.5 * before


def test_networks_that_do_not_fit_are_refused() -> None:
    def start(network: nn.Module) -> None:
        trainer = L.Trainer(
            max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module(network), data_module())

    with pytest.raises(ValueError, match="sample_size is 16, but the images have 8"):
        start(unet(sample_size=16))
    with pytest.raises(ValueError, match=r"num_class_embeds .UNet2DModel. must be 11"):
        start(unet(num_class_embeds=10))
    with pytest.raises(ValueError, match=r"network is a Linear, allowed: diffusers.UNet2DModel"):
        module(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"label_dropout is 1.5, allowed: 0 to 1"):
        module(unet(), label_dropout=1.5)
    with pytest.raises(ValueError, match=r"prediction is 'score', allowed: noise, data, v, flow"):
        module(unet(), prediction="score")
