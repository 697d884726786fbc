"""LightningCLI as we start it. Imported only by a trainer command: it costs seconds."""

from __future__ import annotations

from typing import Any

import lightning as L
import yaml
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback

from thalweg.apps.trainer_cli import COMMANDS, trainer_defaults


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


def launch() -> None:
    """Parse ``sys.argv`` and run the trainer command in it."""
    quiet = {"exit_on_error": False}
    ThalwegCLI(
        L.LightningModule,
        L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_callback=EmbedConfig,
        save_config_kwargs={"overwrite": True},
        trainer_defaults=trainer_defaults(),
        parser_kwargs={**quiet, **{name: quiet for name in COMMANDS}},
    )
