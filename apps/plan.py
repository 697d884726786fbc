"""What a training run would need, from its resolved configuration: ``thalweg fit ... --dry-run``."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thalweg.apps import build

if TYPE_CHECKING:
    import torch

    from thalweg.diffusion.nft.geometry import Geometry
    from thalweg.diffusion.nft.memory import Estimate

Config = Mapping[str, Any]
WEIGHTS = ("folder", "weights", "processor", "tokenizer", "clip")
"""Options of rewards that name files or folders."""


@dataclass(frozen=True, kw_only=True)
class Devices:
    """Where a run is to happen."""

    gpu: bool
    """On GPUs, or on the CPU."""
    processes: int
    """One for each device."""
    autocast: torch.dtype | None
    """Precision of mixed precision."""
    sharded: bool
    """Whether the strategy splits weights."""


@dataclass(frozen=True, kw_only=True)
class NetworkPlan:
    """Memory of a network that is trained whole, on one device, without activations."""

    devices: Devices
    """Where."""
    parameters: int
    """All of them."""
    trained: int
    """Those that are trained."""
    parts: Mapping[str, int]
    """Bytes by what they are for."""


@dataclass(frozen=True, kw_only=True)
class OnlinePlan:
    """An epoch of online fine-tuning, and its memory."""

    devices: Devices
    """Where."""
    shape: Geometry
    """Groups and batches of an epoch."""
    nfe: int
    """Network evaluations of an image in a rollout."""
    guided: bool
    """Whether each of them is two."""
    times: int
    """Times at which an image is trained on."""
    passes: int
    """Forward passes of each: the trained policy, the old one, the reference."""
    estimate: Estimate
    """Memory of a process."""
    missing: Sequence[str]
    """Files that the run will need."""

    @property
    def rollout(self) -> int:
        """Network evaluations of all rollouts of an epoch."""
        return self.shape.images * self.nfe * (1 + self.guided)

    @property
    def losses(self) -> int:
        """Images times times: backward passes of single images in an epoch."""
        return self.shape.images * self.times


Plan = NetworkPlan | OnlinePlan


def plan(config: Config) -> Plan:
    """Plan of a run.

    Args:
        config: With the sections model, data and trainer, as ``fit`` resolves it.

    Raises:
        ValueError: If the run could not start, or its network is not known.
    """
    kind = build.import_class(config["model"]["class_path"])
    online = sys.modules.get("thalweg.diffusion.nft.online")  # there if its subclass is
    if online is not None and issubclass(kind, online.OnlineModule):
        return _online(config)
    return _network(config)


def devices(trainer: Config) -> Devices:
    """Devices that a trainer's section asks for; ``auto`` counts those of this machine."""
    import torch

    accelerator, asked = str(trainer.get("accelerator") or "auto"), trainer.get("devices") or "auto"
    here = torch.cuda.device_count()
    gpu = accelerator in ("gpu", "cuda") or (accelerator == "auto" and here > 0)
    if isinstance(asked, list | tuple):
        count = len(asked)
    elif str(asked) in ("auto", "-1"):
        count = max(here, 1) if gpu else 1
    else:
        count = len([part for part in str(asked).split(",") if part]) if "," in str(asked) else int(asked)
    precision = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}
    strategy = trainer.get("strategy") or "auto"
    named = strategy.get("class_path", "") if isinstance(strategy, Mapping) else str(strategy)
    return Devices(
        gpu=gpu,
        processes=count * int(trainer.get("num_nodes") or 1),
        autocast=precision.get(str(trainer.get("precision"))),
        sharded="fsdp" in named.lower() or "ModelParallel" in named,
    )


def _network(config: Config) -> NetworkPlan:
    import torch

    from thalweg.core_optim.build import WITHOUT_GRADIENTS
    from thalweg.core_optim.config import OptimConfig
    from thalweg.core_optim.state import state_bytes

    with torch.device("meta"):
        network = build.build_network(config)
    trained = [value for value in network.parameters() if value.requires_grad]
    tensors = [*network.parameters(), *network.buffers()]
    weights = sum(value.numel() * value.element_size() for value in tensors)
    gradients = sum(value.numel() * value.element_size() for value in trained)
    where = devices(config["trainer"])
    optim = build.instantiate(config["model"]["init_args"].get("optim") or {}, OptimConfig, "optim")
    held = "gradients"
    if optim.name in WITHOUT_GRADIENTS:
        held, gradients = "weights kept during a step", gradients if optim.name == "mezo" else 0
    parts = {"weights": weights, held: gradients, "optimizer": state_bytes(network, optim)}
    if optim.sam is not None:
        parts["weights kept during a step"] = gradients
    if held == "gradients" and where.processes > 1 and not where.sharded:
        parts["buckets of gradients"] = gradients
    callbacks = config["trainer"].get("callbacks") or []
    if any(str(entry.get("class_path")).endswith(".EMA") for entry in callbacks):
        parts["average of weights"] = weights
    return NetworkPlan(
        devices=where,
        parameters=sum(value.numel() for value in network.parameters()),
        trained=sum(value.numel() for value in trained),
        parts=parts,
    )


def _online(config: Config) -> OnlinePlan:
    from thalweg.diffusion.nft.collect import noisy_steps
    from thalweg.diffusion.nft.data import PromptDataModule
    from thalweg.diffusion.nft.memory import Setup, estimate
    from thalweg.diffusion.nft.rollout import sampler_of

    module: Any = build.build_module(config)
    data = build.build_datamodule(config)
    if not isinstance(data, PromptDataModule):
        kind = f"{PromptDataModule.__module__}.PromptDataModule"
        raise ValueError(f"data is a {type(data).__name__}, needed: {kind}")
    specs = {**module.rewards, **module.held_out}
    rewards = _names(specs)
    where = devices(config["trainer"])
    shape = data.geometry(where.processes)
    sampler = sampler_of(module.rollout.source(), module.rollout.steps)
    noisy = module.noise is not None
    steps = len(sampler.schedule.nodes) - 1
    times = len(noisy_steps(module.noise, steps)) if noisy else module.times.of(len(sampler.levels))
    setup = Setup(
        pipeline=module.pipeline,
        optim=module.optim,
        policy=module.policy_config,
        rollout=module.rollout,
        evaluation=module.evaluation,
        rewards=rewards if module.reward_device != "cpu" else (),
        batch=shape.batch,
        images=max(shape.batches_of(rank) for rank in range(where.processes)) * shape.batch,
        evaluated=_evaluated(data, where.processes),
        kept=steps + 2 if noisy else 1,
        reference=module.needs_reference,
        processes=where.processes,
        sharded=where.sharded,
        autocast=where.autocast,
        gpu=where.gpu,
    )
    return OnlinePlan(
        devices=where,
        shape=shape,
        nfe=sampler.nfe,
        guided=module.rollout.guidance != 1,
        times=times,
        passes=1 + (not noisy) + module.needs_reference,
        estimate=estimate(setup),
        missing=_missing(module, data, specs),
    )


def _names(specs: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """Names of rewards that have networks here.

    Raises:
        RewardError: If there is no such reward, or an option is not its own.
    """
    from thalweg.diffusion.rewards.registry import reward_factory

    names = []
    for name, spec in specs.items():
        options = {key: value for key, value in spec.items() if key not in ("weight", "reward")}
        reward = spec.get("reward", name)
        reward_factory(reward, options)
        if options.get("detector") not in ("remote", "shapes"):
            names.append(reward)
    return tuple(names)


def _evaluated(data: Any, processes: int) -> int | None:
    """Prompts of an evaluation on a process, as far as the configuration tells."""
    if data.val_prompts is None:
        return 0
    return data.num_val and -(-data.num_val // processes)


def _missing(module: Any, data: Any, specs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Files and folders that are named, and not there."""
    named = [data.prompts, data.val_prompts, module.policy_config.start_from]
    named += [spec.get(key) for spec in specs.values() for key in WEIGHTS]
    paths = [value for value in named if value and value not in ("geneval", "shapes")]
    return [path for path in dict.fromkeys(paths) if not Path(path).exists()]
