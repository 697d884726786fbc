"""One training of ``thalweg bench optim``: a problem, an optimizer, a learning rate, a decay, a seed."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from thalweg.apps.optim_problems import Problem, Split, Task
from thalweg.core_optim import registry
from thalweg.core_optim.config import ScheduleConfig
from thalweg.core_optim.engine.groups import COMMON
from thalweg.core_optim.schedules import bind

HIDDEN_ONLY = ("muon", "swan", "frugal")
"""Rules that by their papers leave embeddings and output layers to AdamW."""
AVERAGING = ("schedulefree_adamw",)
"""Rules that want a constant learning rate after the warm-up."""
GIVEN: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.9},
    "sgdp": {"momentum": 0.9, "nesterov": True},
    "scion": {"constrained": False},
}
"""Options that differ from the defaults, since nobody uses those: the protocol names them."""
WARMUP = 0.05
POINTS = 40
"""Points of a stored curve."""


@dataclass(frozen=True)
class Trial:
    """What determines a run."""

    problem: str
    optimizer: str
    quarters: int
    """The learning rate is the rule's default times 10^(quarters / 4)."""
    decay: float
    seed: int
    steps: int
    split: Split


@dataclass
class Outcome:
    """What came of it."""

    trial: Trial
    score: float | None
    """None if it diverged."""
    cpu_s: float = 0.0
    """Of the whole run."""
    step_cpu_s: float = 0.0
    """Of the optimizer's steps without the gradients."""
    state_bytes: int = 0
    parameter_bytes: int = 0
    curve: list[float] = field(default_factory=list)
    """Training losses at equal distances, those of a run that diverged up to there."""

    @property
    def value(self) -> float:
        """The score, infinite if it diverged."""
        return math.inf if self.score is None else self.score


def run(problem: Problem, trial: Trial) -> Outcome:
    """Train for the full schedule, and score."""
    start = time.process_time()
    task = problem.make(trial.steps, trial.seed)
    optimizer = make_optimizer(trial, task)
    name = "constant" if trial.optimizer in AVERAGING else "linear-to-zero"
    schedule = bind(ScheduleConfig(name=name, warmup_ratio=WARMUP), trial.steps)  # type: ignore[arg-type]
    scheduler = LambdaLR(optimizer, schedule)
    closure, spent = timed_closure(task, optimizer)
    losses: list[float] = []
    total = 0.0
    for step in range(trial.steps):
        before = time.process_time()
        try:
            losses.append(float(optimizer.step(closure(step))))  # type: ignore[arg-type]
        except torch.linalg.LinAlgError:  # a decomposition of what is no longer finite
            losses.append(math.inf)
        total += time.process_time() - before
        scheduler.step()
        if not math.isfinite(losses[-1]):
            break
    if hasattr(optimizer, "eval"):
        optimizer.eval()
    score = task.score(trial.split) if math.isfinite(losses[-1]) else math.inf
    parameters = [p for p in task.module.parameters() if p.requires_grad]
    return Outcome(
        trial,
        score if math.isfinite(score) else None,
        cpu_s=time.process_time() - start,
        step_cpu_s=total - sum(spent),
        state_bytes=state_bytes(optimizer),
        parameter_bytes=sum(p.numel() * p.element_size() for p in parameters),
        curve=[x for x in losses[:: max(1, trial.steps // POINTS)] if math.isfinite(x)],
    )


def timed_closure(
    task: Task, optimizer: Optimizer
) -> tuple[Callable[[int], Callable[[], Tensor]], list[float]]:
    """Closures that compute a loss and its gradients, and the CPU seconds of all their calls."""
    spent: list[float] = []

    def closure(step: int) -> Callable[[], Tensor]:
        def evaluate() -> Tensor:
            start = time.process_time()
            optimizer.zero_grad()
            loss = task.loss(step)
            loss.backward()
            spent.append(time.process_time() - start)
            return loss.detach()

        return evaluate

    return closure, spent


def names() -> list[str]:
    """All contenders: the rules of the registry, and SAM around AdamW."""
    return [*registry.names(), "sam"]


def decays(optimizer: str) -> tuple[float, ...]:
    """Weight decays to try; rules without the option get none."""
    return (0.0, 0.1) if optimizer == "sam" or "weight_decay" in registry.rule(optimizer).options else (0.0,)


def default_rate(optimizer: str) -> float:
    """Default learning rate of a contender."""
    rule = registry.rule("adamw" if optimizer == "sam" else optimizer)
    return float(rule.options["lr"].default)


def make_optimizer(trial: Trial, task: Task) -> Optimizer:
    """The optimizer of a trial; parameters that its rule does not take are left to AdamW in the same one.

    Their learning rate is AdamW's default times the same factor.
    """
    factor = 10.0 ** (trial.quarters / 4)
    trained = [(n, p) for n, p in task.module.named_parameters() if p.requires_grad]
    decay = {"weight_decay": trial.decay} if trial.decay or len(decays(trial.optimizer)) > 1 else {}
    rate = default_rate(trial.optimizer) * factor
    if trial.optimizer == "sam":
        from thalweg.core_optim import SAM

        return SAM([p for _, p in trained], "AdamW", {"lr": rate, **decay})
    rule, given = registry.rule(trial.optimizer), GIVEN.get(trial.optimizer, {})
    options = {name: option.default for name, option in {**COMMON, **rule.options}.items()} | given

    def left(name: str, parameter: Tensor) -> bool:
        hidden_only = trial.optimizer in HIDDEN_ONLY and name in task.rest
        return hidden_only or rule.refuse(parameter, options) is not None

    rest = [(n, p) for n, p in trained if left(n, p)]
    own = [(n, p) for n, p in trained if not left(n, p)]
    groups: list[dict[str, Any]] = [{"params": own, "lr": rate, **decay}] if own else []
    if rest:
        adamw = {"rule": "adamw", "lr": default_rate("adamw") * factor, "weight_decay": trial.decay}
        groups.append({"params": rest, **adamw})
    return registry.create(trial.optimizer, groups, seed=trial.seed, **given)


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of the tensors in an optimizer's state, without the counts of steps."""
    tensors = [
        value
        for state in optimizer.state.values()
        for name, value in state.items()
        if isinstance(value, Tensor) and name != "step"
    ]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Archive:
    """Outcomes on disk, one line each, in a file per problem; a stopped ladder finds them again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.found: dict[Trial, Outcome] = {}
        for path in sorted(folder.glob("*.jsonl")):
            for line in path.read_text().splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    continue  # the last line of a run that was killed
                outcome = Outcome(Trial(**row.pop("trial")), **row)
                self.found[outcome.trial] = outcome

    def get(self, problem: Problem, trial: Trial) -> Outcome:
        """The outcome of a trial, run if it has not been."""
        if trial not in self.found:
            torch.manual_seed(trial.seed)
            outcome = run(problem, trial)
            with (self.folder / f"{trial.problem}.jsonl").open("a") as file:
                file.write(json.dumps(asdict(outcome), allow_nan=False) + "\n")
            self.found[trial] = outcome
        return self.found[trial]
