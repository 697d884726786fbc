"""Callbacks of online fine-tuning: pictures of each evaluation, a guard against hacked rewards, progress.

Shapes: images 3 x H x W.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
from torch import Tensor

from thalweg.checkpoints.atomic import replacing
from thalweg.diffusion.nft.config import require
from thalweg.diffusion.rewards.base import as_bytes
from thalweg.diffusion.sheet import grid


class SampleGrid(L.Callback):
    """Write the first images of each evaluation as one picture.

    It is ``samples/epoch_0010.png`` in the folder of the run. Epoch 0 is the start, with
    ``num_sanity_val_steps: -1``. The same prompts with the same noise: what differs is the policy. A logger
    with ``log_image``, such as that of W&B, gets the picture as well.

    Args:
        columns: Images in a row.
    """

    def __init__(self, columns: int | None = None) -> None:
        require(columns is None or columns >= 1, "columns", columns, "1 and more")
        self.columns = columns

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Write the picture."""
        pictures = getattr(getattr(pl_module, "found", None), "pictures", [])
        if not pictures or not trainer.is_global_zero:
            return
        epoch = 0 if trainer.sanity_checking else trainer.current_epoch + 1
        sheet = grid(as_images([image for _, image in pictures]), self.columns)
        folder = Path(trainer.log_dir or trainer.default_root_dir) / "samples"
        with replacing(folder / f"epoch_{epoch:04d}.png") as path:
            sheet.save(path, format="PNG")
        for logger in trainer.loggers:
            log = getattr(logger, "log_image", None)
            if log is not None:
                log(key="samples", images=[sheet], step=epoch)


def as_images(images: Sequence[Tensor]) -> list[Any]:
    """Pictures of PIL."""
    from PIL import Image

    return [Image.fromarray(as_bytes(image[None])[0]) for image in images]


class RewardHackGuard(L.Callback):
    """Watch rewards that are not trained on, and warn or stop when they fall while the trained one rises.

    Its reference is the start of the run (with ``num_sanity_val_steps: -1``), or else the first evaluation.

    Args:
        watch: Drops that are tolerated by name of a reward or of a part of one, such as ``aesthetic`` or
            ``shapes/unknown``, in its own units. A negative number is a rise that is tolerated.
        patience: Evaluations in a row in which one has dropped further.
        action: Warn, or stop after the checkpoint of that epoch.

    Raises:
        ValueError: If nothing is watched, or a number or an action is none.
    """

    def __init__(
        self, watch: dict[str, float], patience: int = 2, action: Literal["warn", "stop"] = "warn"
    ) -> None:
        require(bool(watch), "watch", watch, "names of rewards with the drops that are tolerated")
        require(patience >= 1, "patience", patience, "1 and more")
        require(action in ("warn", "stop"), "action", action, "warn, stop")
        self.watch, self.patience, self.action = watch, patience, action
        self.reference: dict[str, float] = {}
        self.bad: dict[str, int] = {}

    def state_dict(self) -> dict[str, Any]:
        """Reference and counts."""
        return {"reference": self.reference, "bad": self.bad}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with them."""
        self.reference, self.bad = dict(state_dict["reference"]), dict(state_dict["bad"])

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Compare.

        Raises:
            ValueError: If evaluations know no such reward.
        """
        judged: dict[str, float] = pl_module.judged
        if unknown := [name for name in self.watch if name not in judged]:
            known = ", ".join(sorted(judged))
            raise ValueError(f"RewardHackGuard watches {unknown[0]!r}, allowed: {known}")
        if not self.reference:
            self.reference = dict(judged)
            return
        if trainer.sanity_checking:
            return  # a resumed run is compared with its first start
        better = judged["reward"] > self.reference["reward"]
        for name, tolerated in self.watch.items():
            drop = self.reference[name] - judged[name]
            beyond = drop > tolerated if tolerated >= 0 else drop < tolerated
            self.bad[name] = self.bad.get(name, 0) + 1 if better and beyond else 0
            if self.bad[name] >= self.patience:
                self._act(trainer, name, judged)

    def _act(self, trainer: L.Trainer, name: str, judged: dict[str, float]) -> None:
        stop = self.action == "stop"
        trainer.should_stop = trainer.should_stop or stop
        warnings.warn(
            f"the reward rose from {self.reference['reward']:.4g} to {judged['reward']:.4g}, but {name} went"
            f" from {self.reference[name]:.4g} to {judged[name]:.4g}: the reward may be hacked"
            + ("; training stops" if stop else ""),
            stacklevel=2,
        )


class EpochProgress(L.Callback):
    """One bar over the epochs, with what is under way within one; use with ``enable_progress_bar: false``."""

    def __init__(self) -> None:
        self.bar: Any = None

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Open the bar on the first process."""
        if not trainer.is_global_zero:
            return
        from tqdm import tqdm

        self.bar = tqdm(
            total=trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else None,
            initial=trainer.current_epoch,
            unit="epoch",
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 30.0,
        )
        pl_module.progress = self.tell

    def tell(self, what: str, done: int, total: int) -> None:
        """Say what is under way."""
        self.bar.set_description_str(f"{what} {done}/{total}", refresh=False)
        self.bar.update(0)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Move on."""
        if self.bar is not None:
            shown = {key: trainer.callback_metrics.get(key) for key in ("train/reward", "val/reward")}
            self.bar.set_postfix(
                {k: f"{float(v):.3f}" for k, v in shown.items() if v is not None}, refresh=False
            )
            self.bar.update(1)

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Close the bar."""
        self._close(pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Close the bar, so that the message stands below it."""
        self._close(pl_module)

    def _close(self, pl_module: Any) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        pl_module.progress = None
