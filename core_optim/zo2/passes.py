"""Evaluations of a loss that stop before each block, so that several can share one copy of the block.

A chain says where its blocks begin. Any other network is evaluated as it is: each evaluation runs in a thread
of its own, is held by a hook in front of every block, and only one of them runs at a time.
"""

from __future__ import annotations

import contextvars
import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from thalweg.core_optim.mezo import evaluate, no_autocast_cache
from thalweg.core_optim.zo2.contract import ChainLoss

Closures = Sequence[Callable[[], Any]]


class Pass(Protocol):
    """One evaluation of the loss."""

    def advance(self) -> int | None:
        """Run until the next block is called; its number, or None at the end."""
        ...

    def result(self) -> Any:
        """What it returns, at the end: a loss, except for what ``ZO2.run`` is given."""
        ...

    def close(self) -> None:
        """Give up, wherever the evaluation stands."""
        ...


class ChainPass:
    """Evaluation of chains, one per micro-batch.

    Args:
        losses: Chains with their batches.
        numbers: Numbers of the blocks, by identity.
    """

    def __init__(self, losses: Sequence[ChainLoss], numbers: Mapping[int, int]) -> None:
        self.values: list[Tensor] = []
        self.running = self._run(losses, numbers)

    def _run(self, losses: Sequence[ChainLoss], numbers: Mapping[int, int]) -> Iterator[int]:
        for loss in losses:
            state = loss.chain.head_in(loss.batch)
            for block in loss.chain.blocks:
                if id(block) in numbers:
                    yield numbers[id(block)]
                state = block(state)
            self.values.append(loss.chain.tail(state, loss.batch))

    def advance(self) -> int | None:
        """See :class:`Pass`."""
        with torch.no_grad(), no_autocast_cache():
            return next(self.running, None)

    def result(self) -> Tensor:
        """See :class:`Pass`."""
        return evaluate([value.detach for value in self.values])

    def close(self) -> None:
        """See :class:`Pass`."""


class _Cancelled(BaseException):
    """Unwinds an evaluation that is not wanted any more."""


class HeldPass:
    """Evaluation of anything in a thread that is held before each block.

    Args:
        function: What to evaluate, without gradients.
    """

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function = function
        self.may_run, self.has_stopped = threading.Semaphore(0), threading.Semaphore(0)
        self.block: int | None = None
        self.value: Any = None
        self.error: BaseException | None = None
        self.is_cancelled = False
        self.thread: threading.Thread | None = None

    def advance(self) -> int | None:
        """See :class:`Pass`."""
        if self.thread is None:
            enter = _thread_state()
            context = contextvars.copy_context()
            self.thread = threading.Thread(target=context.run, args=(self._run, enter), daemon=True)
            self.thread.start()
        else:
            self.may_run.release()
        self.has_stopped.acquire()
        if self.error is not None:
            raise self.error
        return self.block

    def result(self) -> Any:
        """See :class:`Pass`."""
        return self.value

    def close(self) -> None:
        """See :class:`Pass`."""
        if self.thread is None:
            return
        self.is_cancelled = True
        self.may_run.release()
        self.thread.join()

    def hold(self, number: int) -> None:
        """Called in the thread when it reaches a block."""
        self.block = number
        self.has_stopped.release()
        self.may_run.acquire()
        if self.is_cancelled:
            raise _Cancelled

    def _run(self, enter: Callable[[ExitStack], None]) -> None:
        try:
            with torch.no_grad(), no_autocast_cache(), ExitStack() as stack:
                enter(stack)
                self.value = self.function()
        except _Cancelled:
            pass
        except BaseException as error:
            self.error = error
        self.block = None
        self.has_stopped.release()


class Gate:
    """Hooks in front of blocks that hold whichever pass is running.

    Args:
        blocks: The blocks, in the order of their numbers.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self.blocks = blocks
        self.running: HeldPass | None = None
        self.handles: list[RemovableHandle] = []

    def __enter__(self) -> Gate:
        for number, block in enumerate(self.blocks):
            hook = self._hook(number)
            self.handles.append(block.register_forward_pre_hook(hook, prepend=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def _hook(self, number: int) -> Callable[[nn.Module, Any], None]:
        def hold(module: nn.Module, arguments: Any) -> None:
            if self.running is not None:
                self.running.hold(number)

        return hold

    def advance(self, one: Pass) -> int | None:
        """Run a pass until its next block."""
        self.running = one if isinstance(one, HeldPass) else None
        try:
            return one.advance()
        finally:
            self.running = None


def make_pass(closures: Closures, numbers: Mapping[int, int]) -> Pass:
    """An evaluation of the sum of some closures' losses."""
    chains = [closure for closure in closures if isinstance(closure, ChainLoss)]
    if len(chains) == len(closures):
        return ChainPass(chains, numbers)
    return HeldPass(functools.partial(evaluate, closures))


def _thread_state() -> Callable[[ExitStack], None]:
    """What torch keeps per thread, taken from this one and to be entered in another."""
    kinds = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    casts = [(kind, torch.get_autocast_dtype(kind)) for kind in kinds if torch.is_autocast_enabled(kind)]
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None

    def enter(stack: ExitStack) -> None:
        if stream is not None:
            torch.cuda.set_device(stream.device)
            stack.enter_context(torch.cuda.stream(stream))
        for kind, dtype in casts:
            stack.enter_context(torch.autocast(kind, dtype, cache_enabled=False))

    return enter
