"""MeZO: training from forward passes alone.

Malladi et al. 2023, "Fine-Tuning Language Models with Just Forward Passes" (arXiv 2305.17333).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from thalweg.core_optim.zeroth import (
    Descent,
    Directions,
    GaussianDirections,
    RandomState,
    real,
    settle,
    shifted,
    updated,
)

Closure = Callable[[], Any]
KEY = "zeroth_order"
"""Where state dicts keep the step and the seed."""


@dataclass(frozen=True)
class Entry:
    """A trainable parameter and its place in the optimizer."""

    index: int
    group: int
    parameter: Tensor


class MeZO(Optimizer):
    """Memory-efficient zeroth-order SGD: two evaluations of the loss per direction, and no gradients.

        g = (L(p + eps z) - L(p - eps z)) / (2 eps)         z ~ N(0, I)
        p <- p - lr (g z + weight_decay p)

    ``step`` takes a closure that returns the loss of one fixed batch and calls no ``backward``, or a list of
    them, one per micro-batch, whose losses are added. Both evaluations see the same state of torch's global
    generators, hence the same dropout; afterwards it is that after one evaluation. Layers that update
    buffers, such as batch norm, do so in each evaluation: put them into evaluation mode, as the authors do.

    Unlike the published code, which adds +1, -2 and +1 times eps z in place and thereby walks randomly in
    16-bit precision, both sides are computed in float32 from kept weights, and so is the update. A step with
    ``lr = 0``, and a step whose closure raises, leave every bit as it was. The copy costs one times the
    trainable parameters during a step; ``ZO2`` needs only one block of the network beside them.

    z is drawn anew from (seed, step, parameter index), so the only state is the step and the seed. Frozen
    parameters are skipped, tied ones count once, complex ones are pairs of real numbers. With
    torch.distributed the losses of all ranks are averaged, two numbers per direction; ranks need equal seeds.
    Sharded parameters (DTensor) are refused: each rank would draw the direction of a part as if it were all.

    Args:
        params: Parameters or groups; groups may have their own lr and weight_decay, e.g. no decay of biases.
        lr: Learning rate.
        eps: Length of the shift per unit of z, in units of the weights.
        weight_decay: Decoupled decay, of the weights before the update.
        seed: Seed of the directions.
        num_directions: Directions per step, whose gradients are averaged; each costs two evaluations.
        stochastic_rounding: Round weights of 16 bits to a neighbour at random, so that updates below half a
            unit in the last place count on average. Other weights are not affected.
        replay_rng: Give all evaluations the same state of the global generators.
        snapshot_device: Where the weights are kept during a step; their own device if not given.
        reduce_losses: Average losses over torch.distributed ranks, if there are any.
        process_group: The ranks; all if not given.
        directions: Another source of z.

    Raises:
        ValueError: For a value that is not allowed, or a parameter that cannot be handled.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-6,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        *,
        seed: int = 0,
        num_directions: int = 1,
        stochastic_rounding: bool = True,
        replay_rng: bool = True,
        snapshot_device: torch.device | str | None = None,
        reduce_losses: bool = True,
        process_group: Any = None,
        directions: Directions | None = None,
    ) -> None:
        _require(eps > 0.0 and math.isfinite(eps), "eps", eps, "a number > 0")
        _require(num_directions >= 1, "num_directions", num_directions, "an integer >= 1")
        self.eps = eps
        self.seed = int(seed)
        self.num_directions = num_directions
        self.stochastic_rounding = stochastic_rounding
        self.replay_rng = replay_rng
        self.snapshot_device = None if snapshot_device is None else torch.device(snapshot_device)
        self.reduce_losses = reduce_losses
        self.process_group = process_group
        self.own_directions = directions
        self.steps_done = 0
        self.loss_plus: tuple[float, ...] = ()
        self.loss_minus: tuple[float, ...] = ()
        self.projected_gradients: tuple[float, ...] = ()
        self.ranks_agree = False
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        _refuse_shared_memory(self.entries())

    @property
    def projected_gradient(self) -> float:
        """Mean projected gradient of the last step; NaN before the first."""
        found = self.projected_gradients
        return sum(found) / len(found) if found else math.nan

    @property
    def directions(self) -> Directions:
        """Source of z."""
        return self.own_directions or GaussianDirections(self.seed)

    def entries(self) -> Iterator[Entry]:
        """Trainable parameters; frozen ones count in the index, so that freezing one changes no other."""
        index = 0
        for number, group in enumerate(self.param_groups):
            for parameter in group["params"]:
                if parameter.requires_grad:
                    yield Entry(index, number, parameter)
                index += 1

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, checked.

        Raises:
            ValueError: For a value that is not allowed, or a parameter that cannot be handled.
        """
        super().add_param_group(param_group)
        group, number = self.param_groups[-1], len(self.param_groups) - 1
        for name in ("lr", "weight_decay"):
            value = float(group[name])
            _require(value >= 0.0, f"{name} of group {number}", value, "a number >= 0")
        for position, parameter in enumerate(group["params"]):
            label = f"parameter {position} of group {number}, of shape {tuple(parameter.shape)},"
            if hasattr(parameter, "device_mesh"):
                raise ValueError(
                    f"{label} is sharded (DTensor), which zeroth-order steps do not support: use DDP"
                )
            if not (parameter.is_floating_point() or parameter.is_complex()):
                raise ValueError(f"{label} is {parameter.dtype}, allowed: floating point or complex")

    @torch.no_grad()
    def step(self, closure: Closure | Sequence[Closure] | None = None) -> Tensor:  # type: ignore[override]
        """One step; returns the mean of the losses on both sides, which is the loss up to O(eps^2).

        Args:
            closure: Returns the loss of a batch, the same at each call; or one of these per micro-batch.

        Raises:
            ValueError: Without a closure, if a loss is not finite, or if ranks have different seeds.
        """
        closures = as_list(closure, type(self).__name__)
        entries = list(self.entries())
        kept = [self._keep(entry.parameter) for entry in entries]
        random = RandomState(entry.parameter for entry in entries)
        start, losses = random.get(), []
        try:
            for sample in range(self.num_directions):
                for sign in (1.0, -1.0):
                    self._shift(entries, kept, sample, sign * self.eps)
                    if self.replay_rng:
                        random.set(start)
                    losses.append(evaluate(closures))
            descent = self._descend(losses)
        except BaseException:
            self._restore(entries, kept)
            raise
        self._update(entries, kept, descent)
        self.steps_done += 1
        return torch.stack(losses).mean().float()

    def _keep(self, parameter: Tensor) -> Tensor:
        weights = real(parameter)
        return (
            weights.clone() if self.snapshot_device is None else weights.to(self.snapshot_device, copy=True)
        )

    def _shift(self, entries: list[Entry], kept: list[Tensor], sample: int, scale: float) -> None:
        """Set weights to kept + scale * z."""
        for entry, weights in zip(entries, kept, strict=True):
            target = real(entry.parameter)
            direction = self.directions.draw(self.steps_done, entry.index, target, sample)
            target.copy_(shifted(weights.to(target.device), direction, scale))

    def _restore(self, entries: list[Entry], kept: list[Tensor]) -> None:
        for entry, weights in zip(entries, kept, strict=True):
            real(entry.parameter).copy_(weights)

    def _update(self, entries: list[Entry], kept: list[Tensor], descent: Descent) -> None:
        for entry, weights in zip(entries, kept, strict=True):
            target = real(entry.parameter)
            target.copy_(weights)
            self._advance(target, descent, entry.index, entry.group)

    def _advance(self, weights: Tensor, descent: Descent, index: int, group: int) -> bool:
        """Apply an update to real weights in place; whether there was something to do."""
        value = updated(weights, descent, index, group, self.directions)
        if value is not None:
            settle(weights, value, self.seed, descent.step, index, stochastic=self.stochastic_rounding)
        return value is not None

    def _descend(self, losses: list[Tensor]) -> Descent:
        """The update that losses at plus, minus, plus, ... ask for; one synchronisation of the device.

        Raises:
            ValueError: If a loss is not finite, or if ranks have different seeds.
        """
        values = self._reduce(torch.stack(losses)).tolist()
        if not all(math.isfinite(value) for value in values):
            raise ValueError(
                f"the loss at the shifted weights is {values} at step {self.steps_done}: lower eps or lr"
            )
        self.loss_plus, self.loss_minus = tuple(values[0::2]), tuple(values[1::2])
        pairs = zip(self.loss_plus, self.loss_minus, strict=True)
        self.projected_gradients = tuple((plus - minus) / (2.0 * self.eps) for plus, minus in pairs)
        rates = tuple((float(group["lr"]), float(group["weight_decay"])) for group in self.param_groups)
        return Descent(self.steps_done, self.projected_gradients, rates)

    def _reduce(self, losses: Tensor) -> Tensor:
        """Mean over ranks."""
        if not (self.reduce_losses and dist.is_available() and dist.is_initialized()):
            return losses
        if not self.ranks_agree:
            mine = torch.tensor(
                [self.seed, -self.seed, self.steps_done, -self.steps_done], device=losses.device
            )
            largest = mine.clone()
            dist.all_reduce(largest, dist.ReduceOp.MAX, self.process_group)
            if not torch.equal(mine, largest):
                raise ValueError(
                    f"seed {self.seed} or step {self.steps_done} differs between ranks: they would walk apart"
                )
            self.ranks_agree = True
        dist.all_reduce(losses, group=self.process_group)
        return losses / dist.get_world_size(self.process_group)

    def state_dict(self) -> dict[str, Any]:
        """Groups, step and seed."""
        return {**super().state_dict(), KEY: {"step": self.steps_done, "seed": self.seed}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue a run; the seed is that of the run.

        Raises:
            ValueError: If the state is that of another kind of optimizer.
        """
        if KEY not in state_dict:
            raise ValueError(f"this is no state of {type(self).__name__}: it has no {KEY!r}")
        super().load_state_dict(state_dict)
        self.steps_done = int(state_dict[KEY]["step"])
        self.seed = int(state_dict[KEY]["seed"])
        self.ranks_agree = False

    def __getstate__(self) -> dict[str, Any]:
        names = (
            "eps", "seed", "num_directions", "stochastic_rounding", "replay_rng", "snapshot_device",
            "reduce_losses", "process_group", "own_directions", "steps_done", "loss_plus", "loss_minus",
            "projected_gradients", "ranks_agree",
        )  # fmt: skip
        return {**super().__getstate__(), **{name: getattr(self, name) for name in names}}


def as_list(closure: Closure | Sequence[Closure] | None, owner: str) -> list[Closure]:
    """Closures of the micro-batches.

    Raises:
        ValueError: If there is none.
    """
    if closure is None or (isinstance(closure, Sequence) and not closure):
        raise ValueError(f"{owner}.step needs a closure that returns the loss and calls no backward")
    return list(closure) if isinstance(closure, Sequence) else [closure]


def evaluate(closures: Sequence[Closure]) -> Tensor:
    """Sum of the losses in float64, without gradients.

    Autocast keeps the casts of weights until its outermost region ends, and several evaluations may lie in
    one region; they would all see the weights of the first. So nothing is kept.

    Raises:
        ValueError: If a closure returns something else than one number.
    """
    total: Tensor | None = None
    for closure in closures:
        with torch.no_grad(), no_autocast_cache():
            loss = torch.as_tensor(closure()).detach()
        if loss.numel() != 1:
            raise ValueError(f"the closure returned shape {tuple(loss.shape)}, allowed: the loss, one number")
        loss = loss.reshape(()).double()
        total = loss if total is None else total + loss
    assert total is not None
    return total


@contextmanager
def no_autocast_cache() -> Iterator[None]:
    """Keep autocast from remembering casts of weights."""
    before = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def _require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {value!r}, allowed: {allowed}")


def _refuse_shared_memory(entries: Iterator[Entry]) -> None:
    seen: dict[tuple[torch.device, int], int] = {}
    for entry in entries:
        parameter = entry.parameter
        if parameter.numel() == 0 or parameter.device.type == "meta":
            continue
        key = (parameter.device, parameter.data_ptr())
        if key in seen:
            raise ValueError(
                f"parameters {seen[key]} and {entry.index} share memory and would be shifted twice: make them"
                " one Parameter"
            )
        seen[key] = entry.index
