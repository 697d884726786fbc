"""The policies of DiffusionNFT in one network: current, old, ema, and the reference.

``current`` is trained, ``old`` samples, ``ema`` is an average for evaluation, ``reference`` is what training
started from. With LoRA they are adapters of one transformer of diffusers, the reference being all adapters
off; in full fine-tuning each has weights of its own.

    with policy.using("old") as network:
        ...

Whatever happens in the block, ``current`` is selected after it, and its parameters are the only ones that
ever require gradients. A backward pass belongs outside of such blocks: checkpointed layers run again in it.

Shapes: B samples, ... latents.
"""

from __future__ import annotations

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from thalweg.diffusion.nft.decay import ema_decay, polyak_
from thalweg.diffusion.nft.lora import LoraSpec, check_lora, lora_shapes

Who = Literal["current", "old", "ema", "reference"]
WHO: tuple[str, ...] = get_args(Who)
STORED: tuple[Who, ...] = ("current", "old", "ema")
"""Policies that move, and are in checkpoints."""
Condition = Mapping[str, Tensor]
"""Arguments of the network beside state and timestep, such as embeddings of prompts; a row per sample."""


class Velocities(NamedTuple):
    """Answers of three policies at the same states, (B, ...)."""

    current: Tensor
    """With a gradient."""
    old: Tensor
    """Without."""
    reference: Tensor | None
    """Without; None where it was not asked for."""


class Policy(ABC):
    """Policies by name, whatever they are made of."""

    networks: nn.ModuleDict
    """All weights: to be moved between devices, and registered in a training module."""

    @abstractmethod
    def using(self, who: Who) -> Any:
        """Context in which the network that it gives is a policy."""

    @abstractmethod
    def named(self, who: Who) -> dict[str, nn.Parameter]:
        """Weights of a policy that differ from the reference, by names that all policies share."""

    @abstractmethod
    def check(self, state: Mapping[str, Tensor], source: object) -> None:
        """Refuse weights of one policy that do not fit.

        Raises:
            ValueError: If so; the message names a tensor.
        """

    def trainable(self) -> dict[str, nn.Parameter]:
        """What an optimizer is to be given: the weights of ``current``, by name."""
        return self.named("current")

    def velocity(self, who: Who, x_t: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """Velocity noise - x0 of a policy, with a gradient for ``current`` only.

        Args:
            who: The policy.
            x_t: States (B, ...), rounded to the precision of the network.
            timestep: What the network is told, (B,), 1000 t for SD3.
            condition: Its other arguments.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and who == "current"), self.using(who) as network:
            return ask(network, x_t, timestep, condition)

    def velocities(
        self,
        x_t: Tensor,
        timestep: Tensor,
        condition: Condition,
        *,
        reference: bool,
        old_is_current: bool = False,
    ) -> Velocities:
        """Velocities of all policies in a loss: one to three evaluations.

        Args:
            x_t: States (B, ...).
            timestep: What the network is told, (B,).
            condition: Its other arguments.
            reference: Whether the reference is needed: not if its weight is 0.
            old_is_current: What :meth:`old_is_current` says since the last optimizer step; then the answer of
                the one stands for the other.
        """
        given = (x_t, timestep, condition)
        v_ref = self.velocity("reference", *given) if reference else None
        v_old = None if old_is_current else self.velocity("old", *given)
        v = self.velocity("current", *given)
        return Velocities(v, v.detach() if v_old is None else v_old, v_ref)

    def old_is_current(self) -> bool:
        """Whether both have equal weights; a GPU is waited for, so ask once per optimizer step."""
        pairs = zip(self.named("old").values(), self.named("current").values(), strict=True)
        return all(torch.equal(old, now) for old, now in pairs)

    def follow(self, who: Who, decay: float) -> None:
        """Move a policy towards the current one: theta <- decay theta + (1 - decay) theta_current.

        For LoRA this is done to A and B separately, as the authors' program does; it is not the average of
        the updates B A.

        Raises:
            ValueError: For a decay outside [0, 1], or policies that do not move.
        """
        if who not in ("old", "ema"):
            raise ValueError(f"policy {who!r} follows no other, allowed: old, ema")
        polyak_(list(self.named(who).values()), list(self.named("current").values()), decay)

    def follow_ema(self, steps: int, cap: float = 0.9) -> None:
        """Move the average after an optimizer step, the number of which counts from 1."""
        self.follow("ema", ema_decay(steps, cap))

    def weights(self, who: Who) -> dict[str, Tensor]:
        """Copy of the weights of a policy on the CPU, for files; all processes ask for it together."""
        return {
            name: whole(value).to("cpu", copy=True, memory_format=torch.contiguous_format)
            for name, value in self.named(who).items()
        }

    def start_from(self, state: Mapping[str, Tensor], source: object) -> None:
        """Give all policies but the reference the same weights.

        Raises:
            ValueError: If they do not fit; nothing is changed then.
        """
        self.check(state, source)
        for who in STORED:
            self._copy(who, state)

    def state_dict(self) -> dict[str, Tensor]:
        """Weights of current, old and ema, ``WHO.NAME`` each; the reference is rebuilt from its own files."""
        return {f"{who}.{name}": value for who in STORED for name, value in self.weights(who).items()}

    def load_state_dict(self, state: Mapping[str, Tensor], source: object = "the checkpoint") -> None:
        """Continue with weights as :meth:`state_dict` gave them, each policy with its own.

        Raises:
            ValueError: If they do not fit; the message names a tensor, and nothing is changed.
        """
        for name in state:
            if name.split(".")[0] not in STORED:
                raise ValueError(f"{source} has {name!r}, allowed: names with {', '.join(STORED)} in front")
        parts = {
            who: {k.removeprefix(f"{who}."): v for k, v in state.items() if k.startswith(f"{who}.")}
            for who in STORED
        }
        for who, part in parts.items():
            self.check(part, f"{source} ({who})")
        for who, part in parts.items():
            self._copy(who, part)

    @torch.no_grad()
    def _copy(self, who: Who, state: Mapping[str, Tensor]) -> None:
        for name, value in self.named(who).items():
            value.copy_(split_like(state[name], value))


class LoraPolicy(Policy):
    """Adapters of one frozen transformer of diffusers; the reference is the transformer without them.

    Adapters are float32 whatever the transformer is, as small steps and averages would be lost in half
    precision. All policies start as the reference: A is random, equal for all, and B is zero.

    Args:
        network: A transformer of diffusers, without adapters. It is frozen, and gets three.
        spec: Rank, alpha and targets.
        seed: Of the start; processes with the same seed start equal.

    Raises:
        ValueError: If a target names no layer, or the network has adapters already.
    """

    def __init__(self, network: Any, spec: LoraSpec | None = None, *, seed: int = 0) -> None:
        self.spec = spec or LoraSpec()
        if getattr(network, "peft_config", None):
            raise ValueError(
                f"the network has the adapters {', '.join(network.peft_config)}, allowed: none;"
                " start from an adapter with start_from"
            )
        self._shapes = lora_shapes(network, self.spec)
        network.requires_grad_(False)
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            torch.manual_seed(seed)
            for who in STORED:
                network.add_adapter(self.spec.peft(), who)
        self.network = network
        self.networks = nn.ModuleDict({"current": network})
        self._named: dict[str, dict[str, nn.Parameter]] = {}
        self.rebind()
        for who, parameters in self._named.items():
            for parameter in parameters.values():
                parameter.data = parameter.data.float()
                parameter.requires_grad_(who == "current")
        self._layers = [layer for layer in network.modules() if hasattr(layer, "_active_adapter")]
        self._selected: Who = "ema"
        self._select("current")
        for who in ("old", "ema"):
            self.follow(who, 0.0)

    def rebind(self) -> None:
        """Look the tensors up again, after something put others in their place (sharding does)."""
        own = dict(self.network.named_parameters())
        names = [name.removesuffix(".weight") for name in self._shapes]
        self._named = {who: {f"{n}.weight": own[f"{n}.{who}.weight"] for n in names} for who in STORED}

    @contextmanager
    def using(self, who: Who) -> Iterator[nn.Module]:
        """Select a policy within a block; blocks can be nested."""
        before = self._selected
        self._select(who)
        try:
            yield self.network
        finally:
            self._select(before)

    def named(self, who: Who) -> dict[str, nn.Parameter]:
        """Tensors of an adapter; none for the reference."""
        return self._named.get(_known(who), {})

    def check(self, state: Mapping[str, Tensor], source: object) -> None:
        """Refuse an adapter of another rank, other targets or another network."""
        check_lora(state, self._shapes, source)

    def start_from_lora(self, spec: LoraSpec, state: Mapping[str, Tensor], source: object) -> None:
        """As :meth:`start_from`, with the settings of the adapter that was read.

        Raises:
            ValueError: If rank or alpha differ, or the tensors do not fit.
        """
        for name in ("r", "alpha"):
            theirs, ours = getattr(spec, name), getattr(self.spec, name)
            if theirs != ours:
                raise ValueError(
                    f"{source} has {name} {theirs}, but {name} is {ours} here; set it to {theirs}"
                )
        self.start_from(state, source)

    def _select(self, who: Who) -> None:
        if who == self._selected:
            return
        # set_adapter of PEFT would also freeze the others and train this one, and takes far longer.
        for layer in self._layers:
            layer._disable_adapters = _known(who) == "reference"
            if who != "reference":
                layer._active_adapter = [who]
        self._selected = who


class FullPolicy(Policy):
    """Weights of its own for each policy: all parameters of the network are trained.

    Args:
        network: The network, in float32; becomes ``current``.
        reference: Keep the start as the reference; needed if its weight in the loss is not 0.

    Raises:
        ValueError: If the network has weights in half precision, where averages would not move.
    """

    def __init__(self, network: nn.Module, *, reference: bool = True) -> None:
        for name, parameter in network.named_parameters():
            if parameter.dtype.itemsize < 4:
                raise ValueError(
                    f"weight {name!r} is {parameter.dtype}, allowed in full fine-tuning: float32 (with"
                    " autocast); LoRA takes frozen weights in half precision"
                )
        network.requires_grad_(True)
        names = [who for who in WHO if who != "current" and (reference or who != "reference")]
        copies = {who: copy.deepcopy(network).requires_grad_(False) for who in names}
        self.networks = nn.ModuleDict({"current": network, **copies})

    @contextmanager
    def using(self, who: Who) -> Iterator[nn.Module]:
        """The network of a policy.

        Raises:
            ValueError: If the reference was not kept.
        """
        yield self._of(who)

    def named(self, who: Who) -> dict[str, nn.Parameter]:
        """All parameters of a policy."""
        return dict(self._of(who).named_parameters())

    def check(self, state: Mapping[str, Tensor], source: object) -> None:
        """Refuse weights of another network."""
        shapes = {name: tuple(value.shape) for name, value in self.named("current").items()}
        for name, value in state.items():
            if tuple(value.shape) != shapes.get(name):
                needed = shapes.get(name, "none of that name")
                raise ValueError(f"{source} has {name!r} of shape {tuple(value.shape)}, needed: {needed}")
        if lost := [name for name in shapes if name not in state]:
            raise ValueError(f"{source} lacks {lost[0]!r} and {len(lost) - 1} more of {len(shapes)} tensors")

    def _of(self, who: Who) -> nn.Module:
        if _known(who) not in self.networks:
            raise ValueError("the reference was not kept; pass reference=True, or give it the weight 0")
        return self.networks[who]


def ask(network: Any, x: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
    """Answer of a transformer of diffusers to states in any precision."""
    dtype = network.dtype
    condition = {
        name: value.to(dtype) if value.is_floating_point() else value for name, value in condition.items()
    }
    answer: Tensor = network(x.to(dtype), timestep=timestep, return_dict=False, **condition)[0]
    return answer


def _known(who: str) -> str:
    if who not in WHO:
        raise ValueError(f"policy is {who!r}, allowed: {', '.join(WHO)}")
    return who


def whole(value: Tensor) -> Tensor:
    """A tensor that may be split over processes, put together."""
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach()


def split_like(value: Tensor, example: Tensor) -> Tensor:
    """A whole tensor, split over processes if the example is."""
    if not isinstance(example, DTensor):
        return value
    return distribute_tensor(value.to(example.device), example.device_mesh, example.placements)
