"""Candidates evaluated by actors of a Ray cluster, or of one that is started on this machine."""

from __future__ import annotations

import itertools
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar
from weakref import WeakSet

from thalweg.diffusion.s3.pool import FAILED, ObjectiveRef, Result, Task
from thalweg.diffusion.s3.worker import Outcome, Worker, read_score

log = logging.getLogger(__name__)

STILLBORN = 3
"""Actors in a row that die before they have made their objective, after which the search ends."""


class RayPool:
    """Evaluates in Ray actors, each with a model of its own.

    An actor has one candidate at a time. If it dies, or its machine does, the candidate goes to another. One
    that brings down two actors, or whose evaluation raises, scores as failed; ``errors`` tells why.

    Args:
        objective: How an actor makes its objective; its module must be found on all machines.
        workers: Number of actors. Those that the cluster has no room for wait, while the others work.
        devices: ``cpu`` or ``cuda`` for each actor, in turn. Ray chooses which GPU.
        address: Of a cluster, ``auto`` for the one that runs here, ``local`` for a new one that ends with the
            pool. By default what RAY_ADDRESS says, else ``local``.
        cpus: Cores that an actor reserves.
        gpus: GPUs that an actor on ``cuda`` reserves; 0.5 lets two share one.
        runtime_env: Ray's description of the actors' environment, such as ``{"env_vars": {...}}``.

    Raises:
        ValueError: For no workers or a device that Ray cannot choose.
    """

    _all: ClassVar[WeakSet[RayPool]] = WeakSet()
    """Pools of this process."""
    _sharing: ClassVar[set[int]] = set()
    """Those on a connection that one of them has begun."""

    def __init__(
        self,
        objective: ObjectiveRef,
        workers: int,
        devices: Sequence[str] = ("cpu",),
        *,
        address: str | None = None,
        cpus: float = 1.0,
        gpus: float = 1.0,
        runtime_env: Mapping[str, Any] | None = None,
    ) -> None:
        if workers < 1 or not devices:
            raise ValueError(f"a pool needs a worker and a device, got {workers} and {list(devices)}")
        if wrong := set(devices) - {"cpu", "cuda"}:
            raise ValueError(f"Ray chooses which GPU: devices are {sorted(wrong)}, allowed: cpu, cuda")
        self.objective = objective
        self.workers = workers
        self.address = address or os.environ.get("RAY_ADDRESS") or "local"
        self.cpus = cpus
        self.gpus = gpus
        self.runtime_env = dict(runtime_env or {})
        self.errors: dict[int, str] = {}
        self._devices = itertools.cycle(devices)
        self._idle: list[Any] = []
        # By future the actor and its candidate, None while it makes its objective.
        self._busy: dict[Any, tuple[Any, int | None]] = {}
        self._arrivals: dict[Any, Any] = {}  # by actor a future that is ready once the actor has a place
        self._stillborn = 0
        self.patience = 20.0  # seconds without a place for an actor before others are asked to leave theirs
        self._all.add(self)

    def scores(self, tasks: Sequence[Task], count: int | None = None) -> Iterator[Result]:
        """Scores on the first ``count`` samples as they come.

        Raises:
            ModuleNotFoundError: Without Ray.
            ValueError: If actors cannot make their objective.
            RuntimeError: If actors die while they do.
        """
        self._start()
        left = dict(tasks)
        waiting = list(left)
        crashes = dict.fromkeys(left, 0)
        try:
            while left:
                self._fill(len(left))
                while self._idle and waiting:
                    actor, number = self._idle.pop(), waiting.pop(0)
                    self._busy[actor.evaluate.remote(left[number].to_dict(), count)] = (actor, number)
                for number, found in self._next():
                    if found is None:
                        crashes[number] += 1
                        if crashes[number] < 2:
                            waiting.insert(0, number)
                            continue
                        found = {"error": "the worker died twice"}
                    del left[number]
                    yield number, self._judge(number, found)
        finally:
            self._drop_working()

    def _judge(self, number: int, outcome: Outcome) -> Any:
        score = read_score(outcome)
        if isinstance(score, str):
            self.errors[number] = score
            return FAILED
        return score

    def _start(self) -> None:
        ray = _ray()
        if ray.is_initialized():
            if self._sharing:
                self._sharing.add(id(self))
            return
        options: dict[str, Any] = {}
        if self.address == "local":
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            cores = max(os.cpu_count() or 1, math.ceil(self.workers * self.cpus))
            options = {"num_cpus": cores, "include_dashboard": False}
        ray.init(self.address, log_to_driver=False, runtime_env=self.runtime_env or None, **options)
        self._sharing.add(id(self))

    def _fill(self, wanted: int) -> None:
        """Make actors up to the number of workers, but no more than there are candidates."""
        for _ in range(min(self.workers, wanted) - len(self._idle) - len(self._busy)):
            device = next(self._devices)
            gpus = self.gpus if device == "cuda" else 0
            remote = _ray().remote(num_cpus=self.cpus, num_gpus=gpus)(Worker)
            actor = remote.remote(self.objective.function, dict(self.objective.options), device)
            self._arrivals[actor] = actor.here.remote()
            self._busy[actor.begin.remote()] = (actor, None)

    def _next(self) -> Iterator[tuple[int, Outcome | None]]:
        """Outcomes of the futures that are ready; None if the actor died."""
        ray = _ray()
        ready, _ = ray.wait(list(self._busy), num_returns=1, timeout=self.patience)
        if not ready:
            self._ask_for_room()
        for future in ready:
            actor, number = self._busy.pop(future)
            try:
                found = ray.get(future)
            except ray.exceptions.RayError as error:  # the actor's end; what a candidate raises is an outcome
                self._kill(actor)
                if number is not None:
                    yield number, None
                else:
                    self._mourn(error)
                continue
            self._idle.append(actor)
            if number is not None:
                yield number, found
            elif found is not None:
                raise ValueError(f"no worker can make {self.objective.function!r}: {found}")
            else:
                self._stillborn = 0

    def _ask_for_room(self) -> None:
        """If no actor has a place yet, let those that idle in other pools of this process leave theirs."""
        ray = _ray()
        arrivals = [self._arrivals[actor] for actor, _ in self._busy.values()]
        if ray.wait(arrivals, num_returns=1, timeout=0)[0]:
            return
        free = {name: ray.available_resources().get(name, 0) for name in ("CPU", "GPU")}
        log.warning("no worker has a place after %g s; the cluster has %s free", self.patience, free)
        for pool in self._all:
            while pool is not self and pool._idle:
                pool._kill(pool._idle.pop())

    def _kill(self, actor: Any) -> None:
        self._arrivals.pop(actor, None)
        _ray().kill(actor)

    def _mourn(self, error: Exception) -> None:
        self._stillborn += 1
        if self._stillborn == STILLBORN:
            raise RuntimeError(
                f"{STILLBORN} workers in a row died while making {self.objective.function!r}"
            ) from error

    def _drop_working(self) -> None:
        """Stop actors whose work nobody waits for any more; those that only begin may go on."""
        for future, (actor, number) in list(self._busy.items()):
            if number is not None:
                del self._busy[future]
                self._kill(actor)

    def close(self) -> None:
        """Stop the actors; the last pool on a connection or cluster that a pool has begun ends that too."""
        actors = [*self._idle, *(actor for actor, _ in self._busy.values())]
        self._idle, self._busy = [], {}
        if actors and _ray().is_initialized():
            for actor in actors:
                self._kill(actor)
        if id(self) in self._sharing:
            self._sharing.remove(id(self))
            if not self._sharing:
                _ray().shutdown()


def _ray() -> Any:
    try:
        import ray
        import ray.exceptions
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("a pool of Ray actors needs Ray: pip install 'thalweg[ray]'") from error
    return ray
