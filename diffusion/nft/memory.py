"""Memory of online fine-tuning, estimated before anything is downloaded.

Weights, optimizer states and what is stored are counted from shapes; what a forward and a backward pass hold
is counted by running them on the meta device (:mod:`thalweg.diffusion.nft.live`). Not in it: the context of
the GPU and its libraries, fragments of the allocator, scratch memory of kernels, and activations in networks
of rewards.

Shapes: B images of a batch, latents C x H x W.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from thalweg.core_optim.config import OptimConfig
from thalweg.core_optim.state import state_bytes
from thalweg.diffusion.draw import dtype_of
from thalweg.diffusion.nft.config import EvaluationConfig, PipelineConfig, PolicyConfig, RolloutConfig
from thalweg.diffusion.nft.live import (
    LOWER,
    GpuKernels,
    checkpointed,
    inference_bytes,
    training_bytes,
)
from thalweg.diffusion.nft.lora import LoraSpec
from thalweg.diffusion.nft.policy import FullPolicy, LoraPolicy, ask
from thalweg.diffusion.nft.published import Architecture, architecture, weight_bytes
from thalweg.diffusion.nft.rollout import decode
from thalweg.diffusion.nft.sharding import REPEATED

REWARD_PARAMETERS = {
    "pickscore": 986_109_441,  # CLIP-H/14
    "hpsv2": 986_109_441,  # CLIP-H/14
    "clipscore": 427_616_513,  # CLIP-L/14
    "aesthetic": 427_616_513,  # CLIP-L/14; its head has under a million
    "imagereward": 446_206_689,  # BLIP with ViT-L/16, and a head
    "geneval": 68_741_083 + 427_616_513,  # Mask2Former with Swin-S, and CLIP-L/14 for colours
}
"""Parameters of networks of rewards, all in float32; other rewards have none on the device."""
ENCODED = 16
"""Prompts that are encoded at once."""
WAITING = 32
"""Batches of images that may wait for their rewards."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A process that trains."""

    pipeline: PipelineConfig
    """What is fine-tuned."""
    optim: OptimConfig
    """How."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """What is trained."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """How images are drawn."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """How the policy is judged."""
    rewards: tuple[str, ...] = ()
    """Names of rewards whose networks are on the device."""
    batch: int
    """Images of a micro-batch."""
    images: int
    """Images of an epoch on this process."""
    evaluated: int | None = None
    """Images of an evaluation on this process, 0 for none; many if not given."""
    kept: int = 1
    """Latents that are stored of each image: more than the last with noisy rollouts."""
    reference: bool = True
    """Whether the loss looks at the reference."""
    processes: int = 1
    """Processes that train together."""
    sharded: bool = False
    """Whether they split the weights of the transformer, block by block."""
    autocast: torch.dtype | None = None
    """Precision of autocast."""
    gpu: bool = True
    """Whether the device is a GPU, so that text encoders are elsewhere while they are not used."""

    @property
    def drawn(self) -> int:
        """Images drawn at once."""
        return self.rollout.batch_size or self.batch


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Most memory at a time of the run."""

    name: str
    """Of the phase."""
    parts: Mapping[str, int]
    """Bytes by what they are for."""

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self.parts.values())


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Memory of one process by phase."""

    source: str
    """The pipeline."""
    trained: int
    """Parameters that are trained."""
    phases: tuple[Phase, ...]
    """In their order: encode, rollout, train, and evaluate if there is anything to."""

    @property
    def peak(self) -> int:
        """Bytes of the largest phase."""
        return max(phase.total for phase in self.phases)


def estimate(setup: Setup) -> Estimate:
    """Memory of a training run, by phase and by what it is for.

    Raises:
        ValueError: If the architecture of the pipeline is not known here, or settings do not fit it.
    """
    lora = setup.policy.lora if setup.policy.kind == "lora" else None
    work = _Work(pipeline=setup.pipeline, lora=lora, autocast=setup.autocast, gpu=setup.gpu)
    encoders, encoding = _encoding(work)
    always, trained = _resident(work, setup)
    if not setup.gpu and not setup.pipeline.encode_all:
        always["text encoders"] = encoders
    latents = work.found.latents(setup.rollout.height, setup.rollout.width)
    stored = {"latents of the epoch": 4 * prod(latents) * setup.images * setup.kept}
    rollout = _drawing(work, setup.rollout, setup.drawn, -(-setup.images // setup.drawn))
    waiting, peak = _training(work, setup.batch, latents)
    train = {"kept for the backward pass": waiting, "activations": peak - waiting}
    phases = [
        Phase(name="encode", parts={**always, "text encoders": encoders, "activations": encoding}),
        Phase(name="rollout", parts={**always, **stored, **rollout}),
        Phase(name="train", parts={**always, **stored, **train}),
    ]
    if setup.evaluated != 0:
        batch = setup.evaluation.batch_size
        batches = WAITING if setup.evaluated is None else -(-setup.evaluated // batch)
        judged = _drawing(work, setup.evaluation.rollout, batch, batches)
        phases.append(Phase(name="evaluate", parts={**always, **judged}))
    return Estimate(source=setup.pipeline.model, trained=trained, phases=tuple(phases))


@dataclass(frozen=True, kw_only=True)
class _Work:
    """Networks at work. Hashable, so that nothing is built or measured twice."""

    pipeline: PipelineConfig
    lora: LoraSpec | None
    autocast: torch.dtype | None
    gpu: bool

    @property
    def found(self) -> Architecture:
        """Architecture of the pipeline."""
        return _architecture(self.pipeline.model)

    def kernels(self) -> GpuKernels:
        """Norms stay in half precision on the CPU."""
        return GpuKernels(self.autocast) if self.gpu else GpuKernels(self.autocast, LOWER, ())

    def build(self, name: str, dtype: str) -> Any:
        """A part of the pipeline."""
        return self.found.parts[name].build(dtype_of(dtype))

    def condition(self, batch: int) -> dict[str, Tensor]:
        """Embeddings of prompts."""
        length, dtype = self.pipeline.max_sequence_length, dtype_of(self.pipeline.text_dtype)
        return self.found.condition(batch, length, dtype)


_architecture = lru_cache(maxsize=8)(architecture)


@lru_cache(maxsize=4)
def _transformer(work: _Work) -> tuple[Any, int]:
    """The network with its adapters, and the bytes without them."""
    network = work.build("transformer", work.pipeline.dtype)
    size = weight_bytes(network)
    with torch.device("meta"):
        if work.lora is None:
            FullPolicy(network, reference=False)
        else:
            LoraPolicy(network, work.lora)
    if work.pipeline.gradient_checkpointing:
        network.enable_gradient_checkpointing(checkpointed(work.kernels()))
    return network.train(), size


def _resident(work: _Work, setup: Setup) -> tuple[dict[str, int], int]:
    """What is there all the time, and the number of trained parameters."""
    network, frozen = _transformer(work)
    trained = nn.ParameterList(value for value in network.parameters() if value.requires_grad)
    size = weight_bytes(trained)
    buffers = sum(value.numel() * value.element_size() for value in network.buffers())
    shards = setup.processes if setup.sharded else 1

    def share(whole: int) -> int:
        return -(-whole // shards)

    own = share(frozen - buffers) + buffers
    parts = {"transformer": own}
    if work.lora is None:
        others = ["old", "ema", *(["reference"] if setup.reference else [])]
        parts[f"policies ({', '.join(others)})"] = len(others) * own
    else:
        parts["policies (current, old, ema)"] = share(3 * size)
    # gradients of whole weights are averaged in buckets of their own
    parts["gradients"] = share(size) * (2 if setup.processes > 1 and not setup.sharded else 1)
    parts["optimizer"] = share(state_bytes(network, setup.optim))
    parts["blocks put together"] = _gathered(network) if setup.sharded else 0
    parts["autoencoder"] = weight_bytes(work.build("vae", work.pipeline.vae_dtype))
    parts["rewards"] = sum(4 * REWARD_PARAMETERS.get(name, 0) for name in setup.rewards)
    return parts, sum(value.numel() for value in trained)


def _gathered(network: nn.Module) -> int:
    """Bytes of split weights that are whole for a while: what is in no block, a block, and the next one."""
    blocks = [block for name in REPEATED for block in getattr(network, name, ())]
    sizes = [weight_bytes(nn.ParameterList(block.parameters())) for block in blocks]
    return weight_bytes(nn.ParameterList(network.parameters())) - sum(sizes) + 2 * max(sizes, default=0)


def _drawing(work: _Work, how: RolloutConfig, batch: int, batches: int) -> dict[str, int]:
    """What a rollout holds: the larger of network and decoder, and images that wait for their rewards."""
    latents = work.found.latents(how.height, how.width)
    guided = batch * (2 if how.guidance != 1 else 1)
    image = 4 * 3 * prod(latents[1:]) * work.found.scale**2
    return {
        "activations": max(
            _inference(work, guided, latents), _decoding(work, batch, min(how.slice_size, batch), latents)
        ),
        "images that wait for rewards": image * batch * (min(batches, WAITING) - 1),
    }


@lru_cache(maxsize=64)
def _training(work: _Work, batch: int, latents: tuple[int, ...]) -> tuple[int, int]:
    """Bytes that wait for the backward pass, and the most of both passes; embeddings included."""
    network, _ = _transformer(work)
    given, condition, call = _question(work, network, batch, latents)
    waiting, peak = training_bytes(call, network, given, work.kernels())
    return waiting + condition, peak + condition


@lru_cache(maxsize=64)
def _inference(work: _Work, batch: int, latents: tuple[int, ...]) -> int:
    """The most of a forward pass, embeddings included."""
    network, _ = _transformer(work)
    given, condition, call = _question(work, network, batch, latents)
    return inference_bytes(call, [*_tensors(network), *given], work.kernels()) + condition


def _question(
    work: _Work, network: nn.Module, batch: int, latents: tuple[int, ...]
) -> tuple[list[Tensor], int, Callable[[], Tensor]]:
    """Inputs, the bytes of embeddings among them, and a call of a network with them."""
    condition = work.condition(batch)
    x, timestep = torch.empty(batch, *latents, device="meta"), torch.empty(batch, device="meta")
    size = sum(value.numel() * value.element_size() for value in condition.values())
    return [x, timestep, *condition.values()], size, partial(ask, network, x, timestep, condition)


@lru_cache(maxsize=64)
def _decoding(work: _Work, batch: int, slice_size: int, latents: tuple[int, ...]) -> int:
    """The most that decoding a batch holds."""
    vae = work.build("vae", work.pipeline.vae_dtype)
    x = torch.empty(batch, *latents, device="meta")
    call = partial(decode, vae, x, slice_size=slice_size)
    return inference_bytes(call, [*_tensors(vae), x], work.kernels())


@lru_cache(maxsize=64)
def _encoding(work: _Work) -> tuple[int, int]:
    """Weights of text encoders, and the most that one of them holds beside."""
    size, peak = 0, 0
    for name, part in work.found.encoders.items():
        network = work.build(name, work.pipeline.text_dtype)
        length = part.config.get("max_position_embeddings")
        if length is None:
            length = work.pipeline.max_sequence_length or work.found.length
        ids = torch.empty(ENCODED, length, dtype=torch.long, device="meta")
        call = partial(network, ids, output_hidden_states=True)
        size += weight_bytes(network)
        peak = max(peak, inference_bytes(call, [*_tensors(network), ids], work.kernels()))
    return size, peak


def _tensors(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]
