"""Training of image denoisers: the LightningModule.

Shapes: B batch, C channels, H = W pixels.
"""

from __future__ import annotations

from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from thalweg.checkpoints.lightning_ckpt import FACTS_KEY
from thalweg.core_optim.build import Optimization, build
from thalweg.core_optim.config import GroupRule, OptimConfig
from thalweg.diffusion import loss
from thalweg.diffusion.networks import check_captions, check_fit, keep_labels, no_content, predict
from thalweg.diffusion.order import generator
from thalweg.diffusion.parameterization import from_pair
from thalweg.diffusion.schedules import NoiseSchedule

Batch = dict[str, Tensor]
RULES = (GroupRule(name="no_weight_decay", pattern="bias|norm|embed", weight_decay=0.0, optional=True),)
TRAIN, VALIDATE = 0, 1


class DiffusionModule(L.LightningModule):
    """Train and validate a network that answers noise, data, v or flow; works with ``ImageDataModule``.

    Networks of captions work with ``CaptionDataModule`` and have tokens in the place of labels.

    Everything random in a step depends on (`seed`, step) alone, so a resumed run equals an uninterrupted one
    if the network has no dropout of its own. Validation uses the same times and noises in every epoch.

    Args:
        network: diffusers.UNet2DModel, diffusers.DiTTransformer2DModel, or
            thalweg.diffusion.captioned.CaptionedTransformer.
        schedule: Noise schedule as ``NoiseSchedule.from_dict`` reads it, e.g. ``{kind: flow, shift: 1.0}``.
        optim: Optimizer and learning-rate schedule.
        prediction: What the network answers.
        weighting: Weight of the squared errors; min-snr is that of Hang et al. 2023.
        gamma: Limit of min-snr.
        times: Distribution of the training times between the ends of the schedule.
        label_dropout: Share of labels replaced by the one for none, and of captions by the empty one, for
            classifier-free guidance.
        seed: Seed of times, noises and dropped labels.
        compile: Compile the network with torch.compile; names in checkpoints stay the same.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: dict[str, Any],
        optim: OptimConfig,
        prediction: loss.Kind = "noise",
        weighting: loss.Weighting = "none",
        gamma: float = 5.0,
        times: Literal["uniform", "logit-normal"] = "uniform",
        label_dropout: float = 0.1,
        seed: int = 0,
        compile: bool = False,
    ) -> None:
        super().__init__()
        if not 0.0 <= label_dropout <= 1.0:
            raise ValueError(f"label_dropout is {label_dropout}, allowed: 0 to 1")
        if gamma <= 0.0:
            raise ValueError(f"gamma is {gamma}, allowed: a number > 0")
        loss.check_kind(prediction)
        self.network = network
        self.schedule = NoiseSchedule.from_dict(schedule)
        self.optim = optim
        self.prediction = prediction
        self.weighting = weighting
        self.gamma = gamma
        self.times = times
        self.label_dropout = label_dropout
        self.seed = seed
        self.compiles = compile
        self.no_content = no_content(network)
        self.val_loss = MeanMetric()
        keep_labels(network)

    def setup(self, stage: str) -> None:
        """Check that network and images fit; compile, if asked to."""
        data = getattr(self.trainer, "datamodule", None)
        if data is not None and hasattr(data, "class_names"):
            classes = len(data.class_names)
            check_fit(self.network, size=data.image_size, channels=data.channels, classes=classes)
        if data is not None and hasattr(data, "vocabulary"):
            words, length = len(data.vocabulary), data.vocabulary.length
            check_captions(
                self.network, size=data.image_size, channels=data.channels, words=words, length=length
            )
        self.val_loss = MeanMetric()
        if self.compiles:
            self.network.compile()

    def configure_optimizers(self) -> Optimization:
        """Optimizer whose biases, norms and embeddings do not decay, with its schedule over the whole run."""
        return build(self.network, self.optim, self.trainer.estimated_stepping_batches, RULES)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what an exported pipeline needs beside the network: names of classes, or words and codec."""
        data = getattr(self.trainer, "datamodule", None)
        names = getattr(data, "class_names", [])
        checkpoint[FACTS_KEY] = {"class_names": list(names), **getattr(data, "facts", {})}

    def forward(self, x_BCHW: Tensor, label_B: Tensor, classes_B: Tensor | None = None) -> Tensor:
        """The network's answer for noisy images at the time labels of the schedule."""
        return predict(self.network, x_BCHW, label_B, classes_B)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss at random times and noises."""
        part = batch_idx % self.trainer.accumulate_grad_batches
        stream = generator(self.seed, TRAIN, self.trainer.global_step, part, self.global_rank)
        value = self.losses(batch, stream, label_dropout=self.label_dropout).mean()
        if not torch.isfinite(value):
            raise ValueError(
                f"the loss is {value.item()} at step {self.trainer.global_step}: lower the learning rate or"
                " clip gradients"
            )
        self.log("train/loss", value, prog_bar=True, batch_size=len(batch["labels"]))
        return value

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Loss at times and noises that are the same in every epoch."""
        stream = generator(self.seed, VALIDATE, batch_idx, self.global_rank)
        self.val_loss.update(self.losses(batch, stream, label_dropout=0.0))

    def on_validation_epoch_end(self) -> None:
        """Log the mean over all validation images."""
        self.log("val/loss", self.val_loss.compute(), prog_bar=True)
        self.val_loss.reset()

    def losses(self, batch: Batch, stream: torch.Generator, *, label_dropout: float) -> Tensor:
        """Weighted mean squared error of each image (B,), with times and noises from a CPU generator."""
        x0 = batch["images"]
        times, noise, dropped = self.draw(batch, stream, label_dropout=label_dropout)
        alpha, sigma, label = self.levels(times)
        noisy = loss.corrupt(x0, noise, alpha, sigma)
        wanted = from_pair(x0, noise, alpha, sigma, self.prediction)
        errors = (self(noisy, label, dropped) - wanted).square().mean(dim=(1, 2, 3))
        scale = loss.weights(alpha, sigma, self.prediction, self.weighting, self.gamma)
        return errors * scale.flatten()

    def draw(
        self, batch: Batch, stream: torch.Generator, *, label_dropout: float
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Times in [0, 1] (B,), noises (B, C, H, W) and labels with some dropped, all that is random."""
        x0, classes = batch["images"], batch["labels"]
        times = loss.spread_times(len(x0), self.times, stream)
        noise = torch.randn(x0.shape, generator=stream).to(x0)
        dropped = None
        if self.no_content is not None:
            dropped = loss.drop_labels(classes, self.no_content, label_dropout, stream)
        return times, noise, dropped

    def levels(self, times: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Alpha and sigma (B, 1, 1, 1) and time labels (B,) at times in [0, 1], from least to most noise."""
        low, high = sorted((self.schedule.t_start, self.schedule.t_end))
        t = low + (high - low) * times.numpy()
        found = (self.schedule.alpha(t), self.schedule.sigma(t), self.schedule.label(t))
        alpha, sigma, label = (torch.as_tensor(f, dtype=torch.float32, device=self.device) for f in found)
        return alpha[:, None, None, None], sigma[:, None, None, None], label
