"""Tiny training runs of Poseidon: a few kilobytes of data, 20 thousand parameters, a quiet trainer."""

import dataclasses
from pathlib import Path
from typing import Any

import lightning as L
import torch

from thalweg.core_optim.config import OptimConfig
from thalweg.pde.data.datamodule import PDEDataModule
from thalweg.pde.data.synthetic import write_synthetic
from thalweg.pde.poseidon import ScOT, ScOTConfig
from thalweg.pde.poseidon.module import PoseidonModule

QUIET = (
    "ignore:.*does not have many workers.*",
    "ignore:.*LeafSpec.*",
    "ignore:.*WeightAveraging callback with a model that overrides.*",
    "ignore:The dirpath has changed.*",
    "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning",
    "ignore:.*Checkpoint directory .* exists and is not empty.*",
)
"""Filters for hints of Lightning that say nothing about a test."""
SCOT = {
    "class_path": "thalweg.pde.poseidon.model.ScOT",
    "init_args": {
        "config": {
            "image_size": 16, "num_channels": 2, "num_out_channels": 2, "embed_dim": 8, "depths": [1, 1],
            "num_heads": [1, 2], "skip_connections": [1, 0], "window_size": 4, "use_conditioning": True,
        }
    },
}  # fmt: skip
"""A small scOT as configurations describe it."""


def write_data(folder: Path, *names: str, samples: int = 8, frames: int = 5) -> Path:
    for name in names:
        write_synthetic(name, folder, samples=samples, resolution=16, frames=frames)
    return folder


def data(folder: Path, *names: str, **options: Any) -> PDEDataModule:
    steps = {"batch_size": 4, "max_num_time_steps": 2, "time_step_size": 2}
    return PDEDataModule(list(names), str(folder), **{**steps, **options})


def scot(seed: int = 0, **changes: Any) -> ScOT:
    """A two-level scOT on 16 x 16 points with strong weights: fresh ones hardly depend on time."""
    fields = {
        "image_size": 16,
        "patch_size": 2,
        "num_channels": 4,
        "num_out_channels": 4,
        "embed_dim": 8,
        "depths": (1, 1),
        "num_heads": (1, 2),
        "skip_connections": (1, 0),
        "window_size": 4,
        "use_conditioning": True,
        "channel_slice_list_normalized_loss": (0, 1, 3, 4),
        "drop_path_rate": 0.0,
    }
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        network = ScOT(ScOTConfig(**{**fields, **changes}))
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def module(network: torch.nn.Module | None = None, **options: Any) -> PoseidonModule:
    optim = options.pop("optim", OptimConfig(lr=1e-3))
    return PoseidonModule(scot() if network is None else network, optim, **options)


def trainer(folder: Path, **options: Any) -> L.Trainer:
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": folder,
    }
    return L.Trainer(**{**quiet, **options})


def fit_config(data: Path, runs: Path) -> dict[str, Any]:
    """A run of a few seconds with averaged weights."""
    fields = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(scot().config).items()
    }
    return {
        "seed_everything": 1,
        "model": {
            "class_path": "thalweg.pde.poseidon.module.PoseidonModule",
            "init_args": {
                "network": {
                    "class_path": "thalweg.pde.poseidon.ScOT",
                    "init_args": {"config": fields},
                },
                "optim": {"lr": 1e-2},
            },
        },
        "data": {
            "class_path": "thalweg.pde.data.datamodule.PDEDataModule",
            "init_args": {
                "datasets": ["CE-RP"],
                "data_dir": str(data),
                "num_trajectories": 4,
                "batch_size": 4,
                "max_num_time_steps": 4,
            },
        },
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": 6,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": {
                "class_path": "thalweg.apps.loggers.CSVLogger",
                "init_args": {"save_dir": str(runs), "name": "run", "version": "one"},
            },
            "callbacks": [
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {"save_last": True},
                },
                {"class_path": "thalweg.apps.callbacks.EMA", "init_args": {"decay": 0.5}},
            ],
        },
    }
