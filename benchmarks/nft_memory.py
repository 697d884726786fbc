"""Estimates of memory against what epochs of online fine-tuning hold.

    python benchmarks/nft_memory.py

Runs two epochs of the configuration nft/shapes.yaml on the CPU in several settings. Prints, beside the
estimate of ``thalweg fit --dry-run``, the most bytes of tensors that the second epoch holds in its rollouts
and in its training, without weights, averages and optimizer states. Gradients are made anew, so they count in
training. No estimate counts the states of a solver, which are small beside activations of large networks.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from typing import Any

import lightning as L
import torch
import yaml

from thalweg.apps import build, plan
from thalweg.apps.trainer_cli import find_config, quiet_known_warnings
from thalweg.diffusion.nft.live import LiveBytes

MIB = 2**20
HELD = ("transformer", "policies", "optimizer", "autoencoder", "rewards", "text encoders")
"""Parts of an estimate that are there before an epoch begins."""
SETTINGS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "LoRA, gradient checkpointing": {"pipeline": {"gradient_checkpointing": True}},
    "LoRA, with the reference": {"objective": {"kl_weight": 1e-4}},
    "all weights": {"policy": {"kind": "full"}},
    "all weights, gradient checkpointing": {
        "policy": {"kind": "full"},
        "pipeline": {"gradient_checkpointing": True},
    },
}


class Watch(L.Callback):
    """Counts bytes of an epoch, in both of its halves."""

    def __init__(self) -> None:
        self.rollout = self.train = 0
        self._live: LiveBytes | None = None

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        """Begin with what is not there yet."""
        parts = (pl_module.networks, pl_module.scene.vae)
        there = [value for part in parts for value in (*part.parameters(), *part.buffers())]
        states = trainer.optimizers[0].state.values()
        there += [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
        self.rollout, self._live = 0, LiveBytes(there)
        pl_module.progress = self._told
        self._live.__enter__()

    def on_train_batch_end(self, *_: Any) -> None:
        """Stop counting."""
        assert self._live is not None
        self._live.__exit__(None, None, None)
        self.train = self._live.peak

    def _told(self, what: str, done: int, total: int) -> None:
        if what == "rewards":
            assert self._live is not None
            self.rollout, self._live.peak = self._live.peak, self._live.now


def configuration(changes: dict[str, Any], folder: str) -> dict[str, Any]:
    """nft/shapes.yaml with changes of the model."""
    config: dict[str, Any] = yaml.safe_load(find_config("nft/shapes.yaml").read_text())
    settings = config["model"]["init_args"]
    for name, values in changes.items():
        settings[name] = {**settings.get(name, {}), **values}
    settings["pipeline"]["cache"] = folder
    if changes.get("policy", {}).get("kind") == "full":
        settings["policy"].pop("lora")
        settings["optim"]["lr"] = 1e-5
    return config


def held(config: dict[str, Any], folder: str) -> Watch:
    """What the second epoch of a run holds."""
    watch = Watch()
    L.seed_everything(config["seed_everything"], verbose=False)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=2,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
        callbacks=[watch],
    )
    trainer.fit(build.build_module(config), datamodule=build.build_datamodule(config))
    return watch


def main() -> None:
    """Print the table."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print(f"{'MiB':<38}{'rollout':>10}{'estimate':>10}{'training':>10}{'estimate':>10}")
    for name, changes in SETTINGS.items():
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            quiet_known_warnings()
            config = configuration(changes, folder)
            planned: Any = plan.plan(config)
            found = held(config, folder)
        phases = {phase.name: phase for phase in planned.estimate.phases}
        own = {
            key: sum(size for part, size in phases[key].parts.items() if not part.startswith(there))
            for key, there in (("rollout", (*HELD, "gradients")), ("train", HELD))
        }
        cells = (found.rollout, own["rollout"], found.train, own["train"])
        print(f"{name:<38}" + "".join(f"{size / MIB:>10.1f}" for size in cells))


if __name__ == "__main__":
    main()
