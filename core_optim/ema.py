"""Averages of weights along training: exponential, with a warm-up of the decay, and of power functions.

Averages are kept in float32 or wider, whatever the weights are, and change many tensors at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from thalweg.core_optim.engine.sharding import local
from thalweg.core_optim.power_ema import beta, gamma_of, std_of
from thalweg.core_optim.shards import buckets

Named = dict[str, Tensor]


class EMA:
    """Exponential moving average of the trainable weights of a module.

    The n-th update is a <- d a + (1 - d) w with d = min(decay, (1 + n) / (10 + n)), n from 1, so that an
    average that has begun lately forgets where it began; without `warmup` d is `decay`, after a first update
    that copies.

    Args:
        module: Owner of the weights. Frozen ones are left out.
        decay: d of the formula.
        warmup: Let d grow as above.
        update_every: Calls of `update` per update.
        device: Where averages are kept; that of the weights by default.
        buffers: Average floating-point buffers too, and copy the others.
    """

    def __init__(
        self,
        module: nn.Module,
        decay: float = 0.999,
        *,
        warmup: bool = True,
        update_every: int = 1,
        device: torch.device | str | None = None,
        buffers: bool = False,
    ) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay of the average is {decay}, allowed: 0 <= decay < 1")
        if update_every < 1:
            raise ValueError(f"update_every is {update_every}, allowed: an integer >= 1")
        self.decay, self.warmup, self.update_every = decay, warmup, update_every
        self.device = None if device is None else torch.device(device)
        self.buffers = buffers
        self.step = 0
        """Calls of `update` so far."""
        self.average = {name: wide(w, self.device) for name, w in weights_of(module, buffers).items()}
        """Averages by name."""

    @property
    def updates(self) -> int:
        """Updates so far."""
        return self.step // self.update_every

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take in the weights of a step.

        Raises:
            ValueError: If the module has other weights than the one the average began with.
        """
        self.step += 1
        if self.step % self.update_every:
            return
        n = self.updates
        keep = self.decay if n > 1 else 0.0
        if self.warmup:
            keep = min(self.decay, (1 + n) / (10 + n))
        move(self.average, self._weights(module), 1.0 - keep)

    def _weights(self, module: nn.Module) -> Named:
        found = weights_of(module, self.buffers)
        check_names(found, self.average)
        return found

    @contextmanager
    def swap(self, module: nn.Module) -> Iterator[None]:
        """The module has the averages inside, and its weights, to the last bit, afterwards."""
        weights = self._weights(module)
        kept = {name: local(weight).clone() for name, weight in weights.items()}
        try:
            self.copy_to(module)
            yield
        finally:
            with torch.no_grad():
                for name, weight in weights.items():
                    local(weight).copy_(kept[name])

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Give a module the averages."""
        for name, weight in self._weights(module).items():
            local(weight).copy_(local(self.average[name]))

    def state_dict(self) -> dict[str, Any]:
        """Calls so far and averages."""
        return {"step": self.step, "average": dict(self.average)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state.

        Raises:
            ValueError: If it is of other weights.
        """
        replace(self.average, state_dict["average"])
        self.step = int(state_dict["step"])


class PowerEMA:
    """Averages of weights with power-function profiles (Karras et al. 2024, arXiv:2312.02696).

    At time t the weights w(tau) count with (gamma + 1) tau^gamma / t^(gamma + 1): the average stretches with
    training, and its profile has the standard deviation `std` in units of t. From snapshots of two profiles
    or more :func:`thalweg.core_optim.power_ema.reconstruct` makes the average of any other, afterwards.

    Args:
        module: Owner of the weights. Frozen ones and buffers are left out.
        stds: Profiles to track, each in (0, 0.2886].
        device: Where averages are kept; that of the weights by default.
    """

    def __init__(
        self,
        module: nn.Module,
        stds: Sequence[float] = (0.05, 0.1),
        *,
        device: torch.device | str | None = None,
    ) -> None:
        if not stds or len(set(stds)) < len(stds):
            raise ValueError(f"profiles of the average are {list(stds)}, needed: some, and no two alike")
        self.gammas = tuple(gamma_of(std) for std in stds)
        self.device = None if device is None else torch.device(device)
        self.time = 0.0
        """Time of the last update."""
        weights = weights_of(module, buffers=False)
        self.averages = [{n: wide(w, self.device) for n, w in weights.items()} for _ in self.gammas]
        """Averages by name, one set for each profile."""

    @property
    def stds(self) -> tuple[float, ...]:
        """Relative standard deviations of the profiles."""
        return tuple(std_of(gamma) for gamma in self.gammas)

    @torch.no_grad()
    def update(self, module: nn.Module, time: float | None = None) -> None:
        """Take in weights that are those of training since the last update.

        Args:
            module: Owner of the weights.
            time: Steps or samples so far; by default one more than at the last update.

        Raises:
            ValueError: If time does not go on, or the module has other weights.
        """
        time = self.time + 1.0 if time is None else float(time)
        if not time > self.time:
            raise ValueError(f"time of the average is {time}, allowed: any after {self.time}")
        weights = weights_of(module, buffers=False)
        check_names(weights, self.averages[0])
        for gamma, average in zip(self.gammas, self.averages):
            move(average, weights, 1.0 - beta(gamma, self.time, time))
        self.time = time

    def state_dict(self) -> dict[str, Any]:
        """Time, profiles and averages."""
        return {"time": self.time, "gammas": list(self.gammas), "averages": [dict(a) for a in self.averages]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state.

        Raises:
            ValueError: If it has other profiles, or is of other weights.
        """
        if list(state_dict["gammas"]) != list(self.gammas):
            stored = [round(std_of(gamma), 6) for gamma in state_dict["gammas"]]
            raise ValueError(
                f"the state tracks the profiles {stored}, not {[round(s, 6) for s in self.stds]}"
            )
        for average, values in zip(self.averages, state_dict["averages"]):
            replace(average, values)
        self.time = float(state_dict["time"])


def weights_of(module: nn.Module, buffers: bool) -> Named:
    """Trainable weights of a module by name, each once, and its persistent buffers if wanted."""
    found: Named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if buffers:
        stored = module.state_dict(keep_vars=True)
        found |= {name: b for name, b in module.named_buffers() if name in stored}
    return found


def wide(tensor: Tensor, device: torch.device | None) -> Tensor:
    """A copy in float32 or wider; integers stay what they are."""
    dtype = tensor.dtype
    if dtype.is_floating_point or dtype.is_complex:
        dtype = torch.promote_types(dtype, torch.float32)
    return tensor.detach().to(device=device or tensor.device, dtype=dtype, copy=True)


def move(average: Named, weights: Named, share: float) -> None:
    """Average <- (1 - share) average + share weights, in place; what is not floating is copied."""
    targets = [local(tensor) for tensor in average.values()]
    sources = [local(weights[name].detach()) for name in average]
    for chosen in buckets(targets):
        into, new = [targets[i] for i in chosen], [sources[i].to(targets[i]) for i in chosen]
        floating = into[0].is_floating_point() or into[0].is_complex()
        if share == 1.0 or not floating:
            torch._foreach_copy_(into, new)
        else:
            torch._foreach_lerp_(into, new, share)


def replace(average: Named, stored: Named) -> None:
    """Overwrite averages by stored ones."""
    check_names(stored, average)
    with torch.no_grad():
        for name, tensor in average.items():
            tensor.copy_(stored[name])


def check_names(found: Named, expected: Named) -> None:
    """Raise ValueError unless two sets of weights have the same names."""
    if odd := sorted(found.keys() ^ expected.keys()):
        where = "is not averaged" if odd[0] in found else "is missing"
        raise ValueError(f"weight {odd[0]!r} {where}: the average began with other weights")
