"""ZO2: steps of MeZO in one pass over blocks that stay in host memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from thalweg.core_optim.mezo import KEY, Closure, Entry, MeZO, as_list
from thalweg.core_optim.zeroth import Descent, shifted
from thalweg.core_optim.zo2.backends import Backend, CudaBackend, HostBackend
from thalweg.core_optim.zo2.find import find_blocks
from thalweg.core_optim.zo2.flat import FlatBlock
from thalweg.core_optim.zo2.passes import HeldPass
from thalweg.core_optim.zo2.streamed import Shift, Streamed

HOST_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class ZO2(MeZO):
    """MeZO for networks that do not fit on the device, block by block (arXiv 2503.12668).

    In a step each block comes to the device once, takes the update of the step before, computes its part of
    all evaluations, and goes back. The update of a step is therefore pending until the next one; it keeps the
    learning rate and decay that it was made with. Projected gradients equal those of :class:`MeZO` bitwise at
    each step, and weights do after :meth:`flush`.

    Use: make it like any optimizer, then :meth:`attach` the network. ``step`` takes the closures of MeZO and
    needs no change of the network: evaluations run as they are, held before each block. Between steps the
    blocks' parameters are views of host memory. Use the network in :meth:`run`, which streams as well, or
    in :meth:`gathered`, which does not; :meth:`detach` ends it all. **Call flush before weights are read** in
    any other way: for averages, exports, and at the end. A state dict never flushes: it holds the pending
    update, and a run restored from it together with the weights as they were goes on bitwise.

    On the device are, besides resident parameters and what the network computes, two blocks as the host keeps
    them, one block of shifted weights, and resident parameters once per evaluation.

    The host may keep fewer bits than the network computes in (``host_dtype``). The rounded weights are then
    the weights; they are rounded at random, a function of (seed, step, parameter), since nearest rounding
    loses updates below half a unit in the last place. Block-scaled int8 is not offered: each change of a
    block's largest weight would round all others anew, by far more than an update of this method.

    Buffers and parameters that are tied between blocks stay on the device. Frozen blocks come to the device
    and are not brought back.

    Args:
        params: Parameters or groups.
        lr: Learning rate.
        eps: Length of the shift per unit of z.
        weight_decay: Decoupled decay.
        kwargs: See :class:`MeZO`, without ``replay_rng`` and ``snapshot_device``.
    """

    def __init__(
        self, params: Any, lr: float = 1e-6, eps: float = 1e-3, weight_decay: float = 0.0, **kwargs: Any
    ) -> None:
        for name in ("replay_rng", "snapshot_device"):
            if name in kwargs:
                raise ValueError(f"{name} is an option of MeZO; ZO2 always replays and keeps no copies")
        self.pending: Descent | None = None
        self.streamed: Streamed | None = None
        super().__init__(params, lr, eps, weight_decay, **kwargs)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, checked; see :meth:`MeZO.add_param_group`.

        Raises:
            ValueError: If a network is attached, whose blocks are laid out already.
        """
        if self.streamed is not None:
            raise ValueError("ZO2 has a network already: detach it before adding a group")
        super().add_param_group(param_group)

    def attach(
        self,
        network: nn.Module,
        blocks: Sequence[nn.Module] | None = None,
        *,
        resident: Iterable[nn.Module] = (),
        device: torch.device | str | None = None,
        host_dtype: torch.dtype | None = None,
        backend: Backend | None = None,
    ) -> None:
        """Move the blocks of a network to the host and the rest of it to the device.

        Args:
            network: What the closures evaluate.
            blocks: Modules to stream, each called as a module; found by ``find_blocks`` if not given.
            resident: Parts of blocks that are used outside of them as well.
            device: Where to compute; that of the first parameter if not given.
            host_dtype: What the host keeps; the parameters' own type if not given.
            backend: What moves blocks; ``HostBackend`` on a CPU and ``CudaBackend`` elsewhere if not given.

        Raises:
            ValueError: If there is a network already, blocks lie in each other, the network is compiled, or
                host_dtype is no floating point type.
        """
        if self.streamed is not None:
            raise ValueError("ZO2 has a network already: detach it first")
        if host_dtype is not None and host_dtype not in HOST_DTYPES:
            raise ValueError(f"host_dtype is {host_dtype}, allowed: {', '.join(map(str, HOST_DTYPES))}")
        modules = list(find_blocks(network) if blocks is None else blocks)
        _refuse_compiled(network)
        entries = {id(entry.parameter): entry for entry in self.entries()}
        place = torch.device(device) if device is not None else next(network.parameters()).device
        staying = {id(parameter) for part in resident for parameter in part.parameters()}
        owned, shared = _owners(network, modules, staying)
        flat = _park(network, modules, owned, entries, host_dtype, pinned=place.type == "cuda")
        for parameter in shared:
            parameter.data = parameter.data.to(place)
        for part in network.modules():
            for name, buffer in part._buffers.items():
                part._buffers[name] = None if buffer is None else buffer.to(place)
        streamed = {id(parameter) for parameters in owned for parameter in parameters}
        residents = [entry for key, entry in entries.items() if key not in streamed]
        mover = backend or (HostBackend() if place.type == "cpu" else CudaBackend(place))
        self.streamed = Streamed(modules, flat, residents, mover, place, self._shifted)

    @torch.no_grad()
    def step(self, closure: Closure | Sequence[Closure] | None = None) -> Tensor:  # type: ignore[override]
        """One step; see :meth:`MeZO.step`. If it fails, it has only brought the weights up to date."""
        closures = as_list(closure, type(self).__name__)
        signs = (1.0, -1.0)
        shifts = [Shift(k, sign * self.eps) for k in range(self.num_directions) for sign in signs]
        try:
            losses = self._network().losses(closures, shifts, self._advance_pending())
        finally:
            self.pending = None
        self.pending = self._descend(losses)
        self.steps_done += 1
        return torch.stack(losses).mean().float()

    @torch.no_grad()
    def flush(self) -> None:
        """Apply the pending update, if there is one."""
        if self.pending is not None:
            advance = self._advance_pending()
            assert advance is not None
            self._network().apply(advance)
            self.pending = None

    @torch.no_grad()
    def run(self, function: Callable[[], Any]) -> Any:
        """What a function returns that uses the network, e.g. a validation; flushes, and streams."""
        self.flush()
        return self._network().evaluate([HeldPass(function)], [Shift(0, 0.0)])[0]

    @contextmanager
    def gathered(self, device: torch.device | str | None = None) -> Iterator[None]:
        """The whole network on one device in its own number types, up to date; changes in it are lost."""
        self.flush()
        network = self._network()
        for block in network.blocks:
            block.release(torch.device(device) if device is not None else network.device)
        try:
            yield
        finally:
            for block in network.blocks:
                block.park()

    def detach(self) -> None:
        """Flush, and give the network's parameters memory of their own on the device again."""
        self.flush()
        network = self._network()
        for block in network.blocks:
            block.release(network.device)
        self.streamed = None

    def _network(self) -> Streamed:
        if self.streamed is None:
            raise ValueError("ZO2 has no network: call attach(network) before the first step")
        return self.streamed

    def _shifted(self, weights: Tensor, index: int, shift: Shift) -> Tensor:
        direction = self.directions.draw(self.steps_done, index, weights, shift.sample)
        return shifted(weights, direction, shift.scale)

    def _advance_pending(self) -> Callable[[Tensor, int, int], bool] | None:
        if (descent := self.pending) is None:
            return None
        return lambda weights, index, group: self._advance(weights, descent, index, group)

    def state_dict(self) -> dict[str, Any]:
        """Groups, step, seed and the pending update."""
        found = super().state_dict()
        found[KEY]["pending"] = None if self.pending is None else dataclasses.asdict(self.pending)
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue a run, its pending update included."""
        super().load_state_dict(state_dict)
        pending = state_dict[KEY].get("pending")
        if pending is not None:
            pending = Descent(
                int(pending["step"]), tuple(pending["gradients"]), tuple(map(tuple, pending["rates"]))
            )
        self.pending = pending

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "pending": self.pending, "streamed": None}


def _with_entry(parameter: nn.Parameter, entries: dict[int, Entry]) -> tuple[nn.Parameter, int | None, int]:
    entry = entries.get(id(parameter))
    return (parameter, None, 0) if entry is None else (parameter, entry.index, entry.group)


def _park(
    network: nn.Module,
    modules: Sequence[nn.Module],
    owned: Sequence[Sequence[nn.Parameter]],
    entries: dict[int, Entry],
    host_dtype: torch.dtype | None,
    *,
    pinned: bool,
) -> list[FlatBlock]:
    """Lay the blocks out in host memory, one by one: each frees its old memory before the next takes more."""
    names = {id(module): name for name, module in network.named_modules()}
    found = []
    for number, (module, parameters) in enumerate(zip(modules, owned, strict=True)):
        entered = [_with_entry(parameter, entries) for parameter in parameters]
        found.append(FlatBlock(names.get(id(module), f"block {number}"), entered, host_dtype, pinned=pinned))
        found[-1].fill()
        found[-1].park()
    return found


def _owners(
    network: nn.Module, blocks: Sequence[nn.Module], resident: set[int]
) -> tuple[list[list[nn.Parameter]], list[nn.Parameter]]:
    """Parameters that belong to each block alone, and those that stay on the device.

    Raises:
        ValueError: If a block is part of another one, or not part of the network.
    """
    numbers = {id(block): number for number, block in enumerate(blocks)}
    owners: dict[nn.Parameter, set[int | None]] = {}
    seen: set[int] = set()

    def walk(module: nn.Module, owner: int | None) -> None:
        number = numbers.get(id(module))
        if number is not None:
            if owner is not None and owner != number:
                raise ValueError(f"block {number} is part of block {owner}: pass only one of them")
            owner = number
            seen.add(number)
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(parameter, set()).add(owner)
        for child in module.children():
            walk(child, owner)

    walk(network, None)
    if len(seen) < len(blocks):
        missing = sorted(set(range(len(blocks))) - seen)
        raise ValueError(f"blocks {missing} are not part of {type(network).__name__}")
    owned: list[list[nn.Parameter]] = [[] for _ in blocks]
    shared = []
    for parameter, found in owners.items():
        number = next(iter(found)) if len(found) == 1 else None
        if number is None or id(parameter) in resident:
            shared.append(parameter)
        else:
            owned[number].append(parameter)
    return owned, shared


def _refuse_compiled(network: nn.Module) -> None:
    for name, part in network.named_modules():
        if part._compiled_call_impl is not None or type(part).__name__ == "OptimizedModule":
            raise ValueError(
                f"{name or 'the network'} is compiled: graphs cannot stop before a block; turn compile off"
            )
