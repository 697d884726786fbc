"""Sharpness-aware minimisation around any optimizer: SAM (Foret et al. 2021) and ASAM (Kwon et al. 2021).

A step evaluates the loss twice. With g the gradient at p and one norm over all parameters,

    SAM    e = rho g / (|g| + 1e-12)
    ASAM   e = rho p^2 g / (||p| g| + 1e-12)

and the base optimizer gets the gradient at p + e, with the weights back at p. Equations and order of
operations are those of davda54/sam; here p comes back from a copy, so that it is the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from thalweg.core_optim.engine.sharding import local
from thalweg.core_optim.shards import buckets, gradient_of, norm_of

Closure = Callable[[], Any]
Around = Callable[[], AbstractContextManager[Any]]
TINY = 1e-12
OWN = ("rho", "adaptive")


class SAM(Optimizer):
    """A base optimizer that is given gradients from the worst place near the weights.

    ``param_groups`` and ``state`` are the base's own objects, so schedulers, Lightning and checkpoints of
    torch act on the base; ``state_dict`` is that of the base, with ``rho`` and ``adaptive`` in its groups,
    and a checkpoint of the base alone can be loaded too. Groups may have their own ``rho`` and ``adaptive``;
    the norm is over all groups. `step` needs a closure that computes the loss and its gradient.

    Args:
        params: Parameters, named parameters, or groups; None if `base` is an optimizer.
        base: Name of an optimizer of this package or of torch, a class, or an optimizer that exists.
        base_kwargs: Arguments of the base, if it is made here.
        rho: Distance to the worst place; common are 0.05, and ten times that with `adaptive`.
        adaptive: ASAM: distances relative to the size of each weight.
        model: Its batch norms keep their running statistics in the second evaluation.
        replay_random: The second evaluation draws the same random numbers (dropout) as the first.
        around_second: Makers of contexts to be entered around the second evaluation.

    Raises:
        ValueError: For a rho below 0 or an unknown base.
    """

    needs_closure = True
    """Read by the loops that call optimizers: without a closure there is no step."""

    def __init__(
        self,
        params: Iterable[Any] | None,
        base: str | type[Optimizer] | Optimizer = "SGD",
        base_kwargs: Mapping[str, Any] | None = None,
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        model: nn.Module | None = None,
        replay_random: bool = False,
        around_second: Sequence[Around] = (),
    ) -> None:
        own = {"rho": rho, "adaptive": adaptive}
        given: list[dict[str, Any]]
        if isinstance(base, Optimizer):
            if params is not None or base_kwargs:
                raise ValueError("SAM: the base exists already, so params must be None and base_kwargs empty")
            self.base, given = base, [{} for _ in base.param_groups]
        else:
            groups, given = _split(params)
            self.base = _make(base, groups, dict(base_kwargs or {}))
        for group, values in zip(self.base.param_groups, given):
            group.update({name: group.get(name, value) for name, value in {**own, **values}.items()})
            _check(group)
        self.model = model
        self.replay_random = replay_random
        self.around_second = list(around_second)
        self.loss: Any = None
        """Loss at the weights themselves, of the last step."""
        super().__init__(self.base.param_groups, {**self.base.defaults, **own})
        self._share()

    def _share(self) -> None:
        self.param_groups, self.state = self.base.param_groups, self.base.state

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the model and the contexts, which are not the optimizer's."""
        kept = ("base", "replay_random", "loss")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({"model": None, "around_second": [], **state})
        self._share()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base."""
        if "param_groups" not in self.__dict__ or self.param_groups is not self.base.param_groups:
            super().add_param_group(param_group)  # torch's own bookkeeping while the wrapper is made
            return
        own = {name: param_group.pop(name, self.defaults[name]) for name in OWN}
        _check({"params": [], **own})
        self.base.add_param_group(param_group)
        self.param_groups[-1].update(own)

    def state_dict(self) -> dict[str, Any]:
        """State of the base; SAM keeps nothing between steps."""
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state of SAM or of its base."""
        before = [{name: group[name] for name in OWN} for group in self.param_groups]
        self.base.load_state_dict(state_dict)
        self._share()
        for group, own in zip(self.param_groups, before):
            for name in OWN:
                group.setdefault(name, own[name])

    @torch.no_grad()
    def step(self, closure: Closure | Sequence[Closure] | None = None) -> Any:
        """One step of the base with the gradient at the worst place.

        Args:
            closure: Computes the loss, its gradient by ``backward()``, and returns the loss. Of a list of
                closures, one per micro-batch, losses and gradients add up: each divides its loss by their
                number and leaves the gradients of the others alone.

        Returns:
            The loss at the weights themselves; None for a step at rate 0 without a closure, which makes the
            state and no more.

        Raises:
            ValueError: Without a closure, or with one that does nothing.
        """
        if closure is None and all(float(group["lr"]) == 0.0 for group in self.param_groups):
            # torch.distributed.checkpoint makes the state of a new optimizer by such a step
            self.base.step()
            return None
        closures = _as_list(closure)
        draws = _Draws(self.param_groups) if self.replay_random else None
        self.loss = self._evaluate(closures)
        with ExitStack() as stack:
            stack.enter_context(self._perturbed())
            if self.model is not None:
                stack.enter_context(frozen_statistics(self.model))
            if draws is not None:
                stack.enter_context(draws.again())
            for make in self.around_second:
                stack.enter_context(make())
            self._evaluate(closures)
        self.base.step()
        return self.loss

    def _evaluate(self, closures: Sequence[Closure]) -> Any:
        """Sum of losses; gradients of all closures add up."""
        self.zero_grad()
        total = None
        with torch.enable_grad():
            for closure in closures:
                loss = closure()
                loss = loss.detach() if isinstance(loss, Tensor) else loss
                total = loss if total is None else total + loss
        if total is None and all(p.grad is None for group in self.param_groups for p in group["params"]):
            raise ValueError(
                "SAM: the closure gave neither a loss nor a gradient; Lightning hands over such a one where a"
                " module calls optimizer.step() alone"
            )
        return total

    @contextmanager
    def _perturbed(self) -> Iterator[None]:
        """Weights at p + e; back at p afterwards, even if the evaluation fails."""
        weights, moves = _moves(self.param_groups)
        kept = [weight.clone() for weight in weights]
        try:
            for chosen in buckets(weights):
                torch._foreach_add_([weights[i] for i in chosen], [moves[i] for i in chosen])
            moves.clear()
            yield
        finally:
            for chosen in buckets(weights):
                torch._foreach_copy_([weights[i] for i in chosen], [kept[i] for i in chosen])


def _moves(groups: Sequence[dict[str, Any]]) -> tuple[list[Tensor], list[Tensor]]:
    """This process's parts of the weights that have gradients, and of the steps e to the worst place."""
    found = [(p, group) for group in groups for p in group["params"] if p.grad is not None]
    weights = [local(p) for p, _ in found]
    moves = [gradient_of(p) for p, _ in found]
    adaptive = [i for i, (_, group) in enumerate(found) if group["adaptive"]]
    for i in adaptive:  # the norm is that of |p| g
        moves[i] = weights[i].abs() * moves[i]
    norm = norm_of(moves, [p for p, _ in found])
    for i in adaptive:
        moves[i] = moves[i] * weights[i].abs()
    return weights, _scaled(moves, [_signed(group) for _, group in found], norm)


def _scaled(moves: Sequence[Tensor], rhos: Sequence[float], norm: Tensor) -> list[Tensor]:
    """Each tensor times rho / (norm + 1e-12), many at a time."""
    scaled = list(moves)
    for chosen in buckets(moves):
        first = moves[chosen[0]]
        unit = (1.0 / (norm + TINY)).to(first.device)
        for rho in dict.fromkeys(rhos[i] for i in chosen):
            of_rho = [i for i in chosen if rhos[i] == rho]
            parts = torch._foreach_mul([moves[i] for i in of_rho], rho * unit)
            for i, part in zip(of_rho, parts):
                scaled[i] = part
    return scaled


def _signed(group: dict[str, Any]) -> float:
    """Where a group maximises, the worst place lies down the slope."""
    return -group["rho"] if group.get("maximize") else float(group["rho"])


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Batch norms normalise by the batch, as in training, and leave their running statistics as they are."""
    norms: list[Any] = [
        m for m in module.modules() if getattr(m, "track_running_stats", False) and m.training
    ]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


class _Draws:
    """States of torch's random generators, to draw the same numbers again."""

    def __init__(self, groups: Sequence[dict[str, Any]]) -> None:
        devices = {p.device for group in groups for p in group["params"] if p.device.type == "cuda"}
        self.devices = sorted(devices, key=str)
        self.cpu = torch.get_rng_state()
        self.cuda = [torch.cuda.get_rng_state(device) for device in self.devices]

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draw from the states on; afterwards go on from where the generators were."""
        with torch.random.fork_rng(devices=self.devices):
            torch.set_rng_state(self.cpu)
            for device, state in zip(self.devices, self.cuda):
                torch.cuda.set_rng_state(state, device)
            yield


def _as_list(closure: Closure | Sequence[Closure] | None) -> Sequence[Closure]:
    if closure is None or (isinstance(closure, Sequence) and not closure):
        raise ValueError(
            "SAM.step needs a closure that computes the loss and its gradient: it evaluates twice per step. A"
            " loop that calls step() alone, as gradient scalers of fp16 do, cannot train with SAM"
        )
    return closure if isinstance(closure, Sequence) else [closure]


def _check(group: dict[str, Any]) -> None:
    if not group["rho"] >= 0.0:
        name = group.get("name", f"with {len(group['params'])} parameters")
        raise ValueError(f"SAM: rho of group {name} is {group['rho']!r}, allowed: a number >= 0")


def _split(params: Iterable[Any] | None) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Groups for the base, and what each says to SAM."""
    entries = list(params or ())
    if not entries:
        raise ValueError("SAM: params is empty; give parameters, groups, or a base that exists already")
    groups = [dict(e) for e in entries] if isinstance(entries[0], dict) else [{"params": entries}]
    return groups, [{name: group.pop(name) for name in OWN if name in group} for group in groups]


def _make(base: Any, groups: list[dict[str, Any]], options: dict[str, Any]) -> Optimizer:
    if isinstance(base, str):
        base = _find(base)
    made: Optimizer = base(groups, **options)
    return made


def _find(name: str) -> Any:
    """The class of a name: one of this package by either of its names, else one of torch."""
    from thalweg.core_optim.registry import CLASSES, names, optimizer_class

    if CLASSES.get(name, name) in names():
        return optimizer_class(CLASSES.get(name, name))
    found = getattr(torch.optim, name, None)
    if isinstance(found, type) and issubclass(found, Optimizer) and found is not Optimizer:
        return found
    known = ", ".join(names())
    raise ValueError(f"SAM: base is {name!r}, allowed: {known}, and the classes of torch.optim")
