"""Online fine-tuning from images of a searched schedule with 5 evaluations, against the paper's 10 steps.

    thalweg search --config s3/search_shapes.yaml     # once, some minutes
    python benchmarks/nft_rollouts.py                 # what the images of both are worth, and their time
    python benchmarks/nft_rollouts.py --train 0 1     # trains from both with these seeds, and prints curves

Everything is on configs/nft/shapes.yaml with the changes below. Times are those of real epochs, which take
the solvers in turn within one run. A training run that is there already is not repeated.
"""

from __future__ import annotations

import argparse
import csv
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml

from thalweg.apps import build
from thalweg.apps.trainer_cli import find_config, quiet_known_warnings
from thalweg.diffusion.nft.config import PipelineConfig, RolloutConfig
from thalweg.diffusion.nft.data import open_prompts
from thalweg.diffusion.nft.policy import LoraPolicy
from thalweg.diffusion.nft.rollout import rollout
from thalweg.diffusion.nft.text_to_image import TextToImage

OUT = Path("runs/nft_rollouts")
LR = 8e-3
SEARCHED = "runs/search_shapes/scheduler"
FINE = RolloutConfig(solver="dpm2", steps=100)
"""What samples are compared with."""


def arms(searched: str) -> dict[str, dict[str, Any]]:
    """Changes of rollouts."""
    return {
        "dpm2, 10": {"solver": "dpm2", "steps": 10},
        "dpm2, 5": {"solver": "dpm2", "steps": 5},
        "searched, 5": {"solver": searched, "steps": 5},
    }


def configuration(changes: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """nft/shapes.yaml with another solver."""
    config: dict[str, Any] = yaml.safe_load(find_config("nft/shapes.yaml").read_text())
    arguments = config["model"]["init_args"]
    arguments["rollout"] |= changes
    arguments["optim"]["lr"] = LR
    arguments["seed"] = config["data"]["init_args"]["seed"] = 100 + seed
    config["seed_everything"] = seed
    return config


def quiet_trainer(folder: str, **more: Any) -> L.Trainer:
    """A trainer that writes and prints nothing."""
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
        **more,
    )


class InTurn(L.Callback):
    """Gives each epoch the next solver, and keeps its seconds."""

    def __init__(self, solvers: dict[str, RolloutConfig], warm_up: int) -> None:
        self.solvers, self.names = solvers, list(solvers)
        self.left_out = warm_up * len(solvers)
        self.seconds: dict[str, list[tuple[float, float, float]]] = {name: [] for name in solvers}

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Set the solver."""
        pl_module.rollout = self.solvers[self.names[trainer.current_epoch % len(self.names)]]

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Keep the seconds."""
        if trainer.current_epoch >= self.left_out:
            found = trainer.callback_metrics
            part = [float(found[f"train/seconds_{name}"]) for name in ("rollout", "train", "cpu")]
            self.seconds[self.names[trainer.current_epoch % len(self.names)]].append(tuple(part))


def times(solvers: dict[str, dict[str, Any]], epochs: int) -> None:
    """Seconds of the parts of epochs with each solver."""
    base, *_ = solvers
    config = configuration(solvers[base])
    module: Any = build.build_module(config)
    in_turn = InTurn({name: RolloutConfig(**vars(module.rollout) | new) for name, new in solvers.items()}, 2)
    with tempfile.TemporaryDirectory() as folder:
        count = (epochs + 2) * len(solvers)
        trainer = quiet_trainer(folder, max_epochs=count, limit_val_batches=0, callbacks=[in_turn])
        trainer.fit(module, datamodule=build.build_datamodule(config))
    medians = {
        name: [statistics.median(column) for column in zip(*rows, strict=True)]
        for name, rows in in_turn.seconds.items()
    }
    print(f"\n{'seconds of an epoch, medians of ' + str(epochs):<40}rollout   train   both   CPU")
    for name, (drawn, trained, cpu) in medians.items():
        first = medians[base]
        parts = (drawn / first[0], (drawn + trained) / (first[0] + first[1]), cpu / first[2])
        listed = " ".join(f"{part:.2f}" for part in parts)
        seconds = f"{drawn:>7.2f} {trained:>7.2f} {drawn + trained:>6.2f} {cpu:>5.2f}"
        print(f"{name:<40}{seconds}   of the first: rollout, both, CPU {listed}")


def worth(solvers: dict[str, dict[str, Any]], count: int = 192) -> None:
    """Scores of the pretrained model's images, and their distance from those of a fine solver."""
    print(f"{'pretrained model':<40}strict  partial   distance to 100 steps, {count} images")
    config = configuration({})
    scene = TextToImage(PipelineConfig(**config["model"]["init_args"]["pipeline"]))
    policy = LoraPolicy(scene.network)
    prompts = [prompt.text for prompt in open_prompts("shapes", count, 7, train=True)]
    scene.encode(prompts, torch.device("cpu"))

    def latents(how: RolloutConfig) -> torch.Tensor:
        condition = scene.condition(prompts, torch.device("cpu"))
        numbers, shape = range(count), scene.latents(how)
        sampler = scene.sampler(how)
        given = {"shape": shape, "seed": 7, "epoch": 0, "who": "reference"}
        return rollout(policy, sampler, condition, numbers, **given).latents.flatten(1)

    fine = latents(FINE)
    for name, changes in solvers.items():
        with tempfile.TemporaryDirectory() as folder:
            config = configuration({})
            config["model"]["init_args"]["evaluation"]["rollout"] = changes
            trainer = quiet_trainer(folder)
            module, data = build.build_module(config), build.build_datamodule(config)
            (found,) = trainer.validate(module, datamodule=data, verbose=False)
        distance = (latents(RolloutConfig(**changes)) - fine).norm(dim=1).median()
        print(f"{name:<40}{found['val/shapes/strict']:.3f}   {found['val/reward']:.3f}   {distance:.3f}")


def train(name: str, changes: dict[str, Any], seed: int, epochs: int) -> Path:
    """A run of thalweg fit, unless it is there."""
    folder = OUT / name.replace(", ", "_") / f"seed{seed}"
    if (folder / "done").is_file() and int((folder / "done").read_text()) >= epochs:
        return folder
    config = configuration(changes, seed)
    config["trainer"] |= {"max_epochs": epochs}
    logs = {"save_dir": str(OUT), "name": folder.parent.name, "version": folder.name}
    config["trainer"]["logger"]["init_args"] |= logs
    file = OUT / "configs" / f"{folder.parent.name}_{seed}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(config))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-m", "thalweg.apps", "fit", "--config", str(file)]
    with file.with_suffix(".log").open("w") as log:
        subprocess.run(command, check=True, env=environment, stdout=log, stderr=subprocess.STDOUT)
    (folder / "done").write_text(str(epochs))
    return folder


def curve(folder: Path) -> list[tuple[float, float]]:
    """Strict and partial scores before training and at each evaluation."""
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    points = [
        (float(row[f"{when}/shapes/strict"]), float(row[f"{when}/reward"]))
        for when in ("start", "val")
        for row in rows
        if row.get(f"{when}/shapes/strict")
    ]
    return points


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--searched", default=SEARCHED, help="folder of the SearchedScheduler")
    parser.add_argument("--timed", type=int, default=8, help="epochs of each solver that are timed")
    parser.add_argument("--train", type=int, nargs="*", help="seeds of training runs, in place of the times")
    parser.add_argument("--epochs", type=int, default=30, help="of a training run")
    options = parser.parse_args()
    solvers = arms(options.searched)
    if options.train is None:
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        with warnings.catch_warnings():
            quiet_known_warnings()
            worth(solvers)
            times({name: solvers[name] for name in ("dpm2, 10", "searched, 5")}, options.timed)
        return
    for seed in options.train:
        for name in ("dpm2, 10", "searched, 5"):
            points = curve(train(name, solvers[name], seed, options.epochs))
            listed = "  ".join(f"{strict:.3f}/{partial:.3f}" for strict, partial in points)
            print(f"{name:<16} seed {seed}  strict/partial  {listed}", flush=True)


if __name__ == "__main__":
    main()
