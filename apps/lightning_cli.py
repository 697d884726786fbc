"""LightningCLI as we start it. Imported only by a trainer command: it costs seconds."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from lightning.pytorch.callbacks import BasePredictionWriter, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
from lightning.pytorch.plugins.io import TorchCheckpointIO

from thalweg.apps.callbacks import OptimizerTable, SafeStop
from thalweg.apps.checkpoint_io import SafeCheckpointIO
from thalweg.apps.optim_callbacks import SAMGuard, ScheduleFreeMode
from thalweg.apps.trainer_cli import COMMANDS, trainer_defaults
from thalweg.apps.zeroth_order import ZerothOrder

NEWS = ("💡", "Loading `train_dataloader`", "TPU available", "Detected KeyboardInterrupt")
"""Starts of Lightning's messages that tell the user nothing about the run."""


class EmbedConfig(SaveConfigCallback):
    """Save ``config.yaml`` beside the logs, and model and data sections of it inside every checkpoint."""

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Store the resolved configuration under ``app_config``."""
        config = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        checkpoint["app_config"] = {key: config[key] for key in ("model", "data")}


class ThalwegCLI(LightningCLI):
    """LightningCLI over any module and data module given by ``class_path``."""

    def _parse_ckpt_path(self) -> None:
        """Leave the checkpoint to the trainer.

        Lightning reads it here as well, to let hyper-parameters stored in it overrule config files and flags.
        """

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """The configured trainer; its checkpoint files are written atomically."""
        trainer = super().instantiate_trainer(**kwargs)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = SafeCheckpointIO()
        if trainer.fast_dev_run:
            # Lightning's ModelCheckpoint would write last.ckpt at the end even of such a run
            trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, ModelCheckpoint)]
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        """Run the command; Lightning turns Ctrl-C into exit status 1, as if the command had failed.

        Raises:
            KeyboardInterrupt: After Ctrl-C; its text says how to go on.
        """
        try:
            super()._run_subcommand(subcommand)
            if self.trainer.is_global_zero and (text := outcome(subcommand, self.trainer)):
                print(text)
        except SystemExit as stop:
            if not isinstance(stop.__context__, KeyboardInterrupt):
                raise
            raise KeyboardInterrupt(how_to_resume(subcommand, self.trainer)) from None


class PlannedCLI(ThalwegCLI):
    """The same command line, up to the point where something would be built."""

    def _set_seed(self) -> None:
        """Nothing is drawn."""

    def _add_instantiators(self) -> None:
        """Nothing is made."""

    def instantiate_classes(self) -> None:
        """Print the plan of the run that was configured."""
        from thalweg.apps.dry_run import show

        parser, config = self._parser(self.subcommand), self.config[self.subcommand]
        show(yaml.safe_load(parser.dump(config)))

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing is run."""


def quiet_news() -> None:
    """Keep Lightning from recommending products and from telling the obvious."""

    def is_news(record: logging.LogRecord) -> bool:
        return not record.getMessage().strip().startswith(NEWS)

    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(is_news)


def outcome(command: str, trainer: L.Trainer) -> str:
    """Where the results of a command are; empty if it has said so itself."""
    if command == "fit" and trainer.log_dir is not None:
        return f"written to {trainer.log_dir}"
    writers = [callback for callback in trainer.callbacks if isinstance(callback, BasePredictionWriter)]
    if command == "predict" and not writers:
        return "nothing was written: add --trainer.callbacks+=thalweg.pde.writer.PredictionWriter"
    return ""


def how_to_resume(command: str, trainer: L.Trainer) -> str:
    """What to type after an interrupted command."""
    folder = trainer.log_dir
    if command != "fit" or folder is None or not list(Path(folder).rglob("*.ckpt")):
        return "nothing is left to resume"
    return f"continue with: thalweg fit --resume {folder}"


def own_callbacks() -> list[L.Callback]:
    """Callbacks of every run; those for other kinds of optimizers do nothing where there is none."""
    return [SafeStop(), OptimizerTable(), ZerothOrder(), SAMGuard(), ScheduleFreeMode()]


def launch(dry_run: bool = False) -> None:
    """Parse ``sys.argv`` and run the trainer command in it, or only say what it would need."""
    quiet_news()
    quiet = {"exit_on_error": False}
    kind = PlannedCLI if dry_run else ThalwegCLI
    kind(
        L.LightningModule,
        L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_callback=EmbedConfig,
        save_config_kwargs={"overwrite": True},
        trainer_defaults={**trainer_defaults(), "callbacks": own_callbacks()},
        parser_kwargs={**quiet, **{name: quiet for name in COMMANDS}},
    )
