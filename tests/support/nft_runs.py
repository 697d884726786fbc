"""Online fine-tuning of a transformer with random weights on rewards that need no network."""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from thalweg.core_optim.config import OptimConfig, ScheduleConfig
from thalweg.diffusion.nft.config import (
    AWMObjective,
    EvaluationConfig,
    GRPOObjective,
    NFTObjective,
    PipelineConfig,
    PolicyConfig,
    RolloutConfig,
)
from thalweg.diffusion.nft.data import PromptDataModule
from thalweg.diffusion.nft.decay import Decay
from thalweg.diffusion.nft.lora import LoraSpec
from thalweg.diffusion.nft.module import AWMModule, FlowGRPOModule, NFTModule
from thalweg.diffusion.nft.online import OnlineModule
from thalweg.diffusion.nft.timesteps import TrainTimes
from thalweg.diffusion.rewards.base import RewardResult, as_bytes

WORLD = 2
PROMPTS = ["a", "b", "ab", "ba", "aa", "bb", "aba"]
OBJECTIVES: dict[type[OnlineModule], Any] = {
    NFTModule: NFTObjective(kl_weight=0.01),
    AWMModule: AWMObjective(kl_weight=0.01, old_weight=0.1),
    FlowGRPOModule: GRPOObjective(window=(0, 2)),
}


@cache
def folder_of_pipeline(parent: Path) -> Path:
    from tiny_policy import pipeline

    (parent / "words").mkdir()
    pipeline(parent / "words").save_pretrained(parent / "pipeline")
    return parent / "pipeline"


def module(folder: Path, kind: type[OnlineModule] = NFTModule, **changes: Any) -> OnlineModule:
    pipeline = {"model": str(folder / "pipeline"), "max_sequence_length": 4, "cache": str(folder / "cache")}
    settings: dict[str, Any] = {
        "pipeline": PipelineConfig(**pipeline | changes.pop("pipeline", {})),
        "rewards": {"brightness": {"reward": "nft_runs:brightness"}},
        # a small eps would make steps of gradients that are zero but for rounding
        "optim": OptimConfig(lr=1e-3, weight_decay=1e-4, eps=1e-5, schedule=ScheduleConfig(name="constant")),
        "policy": PolicyConfig(lora=LoraSpec(r=4, alpha=8)),
        "rollout": RolloutConfig(steps=3),
        "times": TrainTimes(count=2),
        "evaluation": EvaluationConfig(rollout=RolloutConfig(solver="flow", steps=2), grid=2),
        "objective": OBJECTIVES[kind],
        **({} if kind is FlowGRPOModule else {"decay": Decay(rate=0.1, cap=0.5)}),
    }
    return kind(**settings | changes)


def prompts(folder: Path, **changes: Any) -> PromptDataModule:
    file = folder / "prompts.txt"
    file.write_text("\n".join(PROMPTS) + "\n")
    settings: dict[str, Any] = {
        "prompts": str(file), "val_prompts": str(file), "num_val": 5, "groups": 4, "group_size": 4,
        "batch_size": 8, "gradient_steps": 2, "eval_batch_size": 2, "seed": 3,
    }  # fmt: skip
    return PromptDataModule(**settings | changes)


def trainer(folder: Path, epochs: int = 2, **changes: Any) -> L.Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "max_epochs": epochs, "logger": False, "num_sanity_val_steps": 0,
        "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": str(folder),
        "enable_checkpointing": False,
    }  # fmt: skip
    return L.Trainer(**settings | changes)


def fit(folder: Path, kind: type[OnlineModule] = NFTModule, epochs: int = 2, **changes: Any) -> OnlineModule:
    """A module after some epochs, with its trainer; save is a file for a checkpoint after the last."""
    save, resume = changes.pop("save", None), changes.pop("resume", None)
    data = {k: changes.pop(k) for k in ("groups", "gradient_steps", "batch_size", "sampler") if k in changes}
    loop = {
        k: changes.pop(k)
        for k in ("callbacks", "plugins", "num_sanity_val_steps", "accelerator", "precision")
        if k in changes
    }
    found = module(folder, kind, **changes)
    fitting = trainer(folder, epochs, **loop)
    fitting.fit(found, datamodule=prompts(folder, **data), ckpt_path=resume, weights_only=True)
    if save:
        fitting.save_checkpoint(save)
    return found


class Brightness:
    """Mean of an image's bytes, which hide rounding; prompts with an a want it dark."""

    name = "brightness"

    def __call__(self, images: Tensor, prompts: Any, metadata: Any) -> RewardResult:
        sign = torch.tensor([-1.0 if "a" in prompt else 1.0 for prompt in prompts])
        means = torch.from_numpy(as_bytes(images)).double().mean((1, 2, 3)) / 255
        return RewardResult(scores=sign * means, parts={"mean": means})


def brightness(device: str = "cpu") -> Brightness:
    return Brightness()


class Broken(Brightness):
    """Gives the same bad thing for all images."""

    def __init__(self, value: float | Exception) -> None:
        self.value = value

    def __call__(self, images: Tensor, prompts: Any, metadata: Any) -> RewardResult:
        if isinstance(self.value, Exception):
            raise self.value
        return RewardResult(scores=torch.full((len(images),), self.value))


def nan(device: str = "cpu") -> Broken:
    return Broken(float("nan"))


def constant(device: str = "cpu") -> Broken:
    return Broken(0.5)


def failing(device: str = "cpu") -> Broken:
    return Broken(ConnectionError("no server at port 9"))


def spread_over_processes(work: Callable[..., object], folder: Path, *given: Any) -> list:
    """What a function gives on each of two processes."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_launch, (work, port, str(folder), given), nprocs=WORLD)
    return [torch.load(folder / f"{work.__name__}_{rank}.pt", weights_only=True) for rank in range(WORLD)]


def _launch(rank: int, work: Callable[..., object], port: int, folder: str, given: tuple) -> None:
    os.environ |= {
        "LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    torch.save(work(Path(folder), *given), Path(folder) / f"{work.__name__}_{rank}.pt")
    torch.distributed.destroy_process_group()


def fit_replicas(folder: Path, kind: str, changes: dict[str, Any]) -> dict:
    from lightning.pytorch.strategies import DDPStrategy

    return _fit_distributed(folder, DDPStrategy(), kind, changes)


def fit_shards(folder: Path, kind: str, changes: dict[str, Any]) -> dict:
    from lightning.pytorch.strategies import ModelParallelStrategy

    strategy = ModelParallelStrategy(
        data_parallel_size=WORLD, tensor_parallel_size=1, save_distributed_checkpoint=False
    )
    return _fit_distributed(folder, strategy, kind, changes)


def resume_shards(folder: Path) -> dict:
    """Weights after two epochs in one go, and after one, a checkpoint and another one."""
    from lightning.pytorch.strategies import ModelParallelStrategy

    def run(epochs: int, resume: Path | None = None, save: Path | None = None) -> dict[str, Tensor]:
        strategy = ModelParallelStrategy(
            data_parallel_size=WORLD, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
        loop = trainer(folder, epochs, strategy=strategy, devices=WORLD, use_distributed_sampler=False)
        found = module(folder)
        loop.fit(found, datamodule=prompts(folder, batch_size=4), ckpt_path=resume, weights_only=True)
        if save:
            loop.save_checkpoint(save)
        return whole(found)

    straight = run(2)
    half = folder / "half.ckpt"
    run(1, save=half)
    return {"straight": straight, "resumed": run(2, resume=half)}


def _fit_distributed(folder: Path, strategy: Any, kind: str, changes: dict[str, Any]) -> dict:
    loop = trainer(folder, 2, strategy=strategy, devices=WORLD, use_distributed_sampler=False)
    found = module(folder, {k.__name__: k for k in OBJECTIVES}[kind])
    reductions = []
    original = torch.distributed.all_reduce
    torch.distributed.all_reduce = lambda *a, **k: (reductions.append(1), original(*a, **k))[1]
    loop.fit(found, datamodule=prompts(folder, **changes))
    metrics = {name: float(value) for name, value in loop.callback_metrics.items()}
    return {"weights": whole(found), "metrics": metrics}


def whole(found: OnlineModule) -> dict[str, Tensor]:
    """Weights of all policies, put together where they are split."""
    parts = {}
    for who in ("current", "old", "ema"):
        for name, value in found.policy.named(who).items():
            value = value.full_tensor() if hasattr(value, "full_tensor") else value
            parts[f"{who}.{name}"] = value.detach().clone()
    return parts
