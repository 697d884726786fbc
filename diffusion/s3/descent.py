"""Descent of a sampler's free numbers along the gradient of its error.

Shapes: B starts, ... anything; N steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from thalweg.diffusion.s3.examples import Denoiser, Examples, evaluate
from thalweg.diffusion.s3.goals import Distance, Goal, Loss
from thalweg.diffusion.s3.parameters import Parameters
from thalweg.diffusion.solvers.linear import LinearSchedule
from thalweg.diffusion.solvers.sample import first_prediction


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to refine.

    Raises:
        ValueError: For values out of range.
    """

    iterations: int = 800
    """Steps of Adam of each run."""
    learning_rates: tuple[float, ...] = (0.02, 0.05)
    """One run for each, from every start; falling to nought along a cosine."""
    loss: Loss = "l2"
    """Mean distance, mean squared distance, or mean logarithm of the distance."""
    batch_size: int | None = None
    """Starts of an iteration, and of an evaluation; all by default."""
    evaluate_every: int = 10
    """Iterations between evaluations on the validation starts."""
    scout: int = 100
    """Iterations of the short runs that choose among many starts."""
    keep: int | None = 2
    """Starts that are refined fully, after short runs from all with the first learning rate; None: all."""
    patience: int | None = None
    """Evaluations without a better one after which a run ends."""
    jitter: float = 0.0
    """Standard deviation of noise on the free numbers, for all learning rates but the first."""
    free_end: bool = True
    """Let the last evaluated node move, if the result has no noise."""
    free_start: bool = False
    """Let the first node move."""
    offsets: bool = False
    """Let the labels that the network is told differ from those of the nodes."""
    checkpoint: bool = False
    """Keep only the states, and run the network again for its gradient."""
    seed: int = 0
    """Of batches and jitter."""

    def __post_init__(self) -> None:
        """Check the values."""
        if self.loss not in get_args(Loss):
            raise ValueError(f"loss is {self.loss!r}, allowed: {', '.join(get_args(Loss))}")
        for name in ("iterations", "evaluate_every", "batch_size", "scout", "keep", "patience"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} is {value}, allowed: 1 or more")
        if not self.learning_rates or min(self.learning_rates) <= 0:
            raise ValueError(f"learning_rates are {self.learning_rates}, allowed: one or more above 0")


def rollout(
    parameters: Parameters,
    denoiser: Denoiser,
    examples: Examples,
    *,
    recompute: bool = False,
    mean: Tensor | None = None,
) -> Tensor:
    """Results of the sampler, differentiable in its parameters, B ...

    Args:
        parameters: Nodes and weights.
        denoiser: Data prediction.
        examples: Starts.
        recompute: Keep only states and predictions, and run the network again when its gradient is needed.
        mean: Mean of the data, for samplers whose first step uses it.
    """
    alpha, sigma = parameters.levels()
    weights, labels = parameters.weights(alpha, sigma), parameters.labels()
    ratio, x = sigma[1:] / sigma[:-1], examples.x_T
    condition = () if examples.condition is None else (examples.condition,)
    predictions: list[Tensor] = []
    for i, row in enumerate(weights):
        if i == 0 and parameters.first != "network":
            predictions.append(first_prediction(parameters, x, mean))
        else:
            inputs = (x, alpha[i], sigma[i], None if labels is None else labels[i], *condition)
            if recompute:
                predictions.append(checkpoint(denoiser, *inputs, use_reentrant=False))
            else:
                predictions.append(denoiser(*inputs))
        x = ratio[i].to(x) * x
        for j, prediction in enumerate(predictions):
            x = x + row[j].to(x) * prediction
    return x


class Descent:
    """One descent."""

    def __init__(
        self,
        parameters: Parameters,
        denoiser: Denoiser,
        train: Examples,
        validation: Examples,
        settings: Settings,
        mean: Tensor | None,
        generator: torch.Generator,
        goal: Goal | None = None,
    ) -> None:
        self.parameters, self.denoiser, self.mean = parameters, denoiser, mean
        self.train, self.validation, self.settings = train, validation, settings
        self.generator, self.goal = generator, goal or Distance(settings.loss)
        self.nfe = len(parameters.nodes) - 1 - (parameters.first != "network")
        self.calls = 0
        self.order = torch.zeros(0, dtype=torch.long)  # of the examples that are next

    def adam(self, rate: float, iterations: int) -> tuple[LinearSchedule | None, float, int]:
        """Best sampler on the validation starts, how it is judged, and the iteration it came from."""
        settings = self.settings
        free = [p for p in self.parameters.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(free, lr=rate)
        best, best_error, at, waited = None, math.inf, 0, 0
        for k in range(1, iterations + 1):
            for group in optimizer.param_groups:
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * (k - 1) / iterations))
            if not self._descend(optimizer, free):
                break
            if k % settings.evaluate_every and k < iterations:
                continue
            schedule = freeze(self.parameters)
            if schedule is None:
                break
            error = evaluate(
                schedule, self.denoiser, self.validation, settings.batch_size, self.mean, self.goal.judge
            )
            self.calls += self.nfe * len(self.validation)
            waited += 1
            if error < best_error:
                best, best_error, at, waited = schedule, error, k, 0
            if settings.patience is not None and waited >= settings.patience:
                break
        return best, best_error, at

    def _descend(self, optimizer: torch.optim.Optimizer, free: list[torch.nn.Parameter]) -> bool:
        """One step; False where the loss is not a number."""
        batch = self.train
        if (size := self.settings.batch_size) is not None and size < len(batch):
            if len(self.order) < size:
                self.order = torch.randperm(len(batch), generator=self.generator)
            batch, self.order = batch.pick(self.order[:size]), self.order[size:]
        x = rollout(self.parameters, self.denoiser, batch, recompute=self.settings.checkpoint, mean=self.mean)
        self.calls += self.nfe * len(batch)
        loss = self.goal.loss(x, batch.target)
        gradients = torch.autograd.grad(loss, free)
        if not all(bool(torch.isfinite(g).all()) for g in gradients):
            return False
        for p, g in zip(free, gradients, strict=True):
            p.grad = g
        optimizer.step()
        return True


def freeze(parameters: Parameters) -> LinearSchedule | None:
    """The sampler that the parameters stand for; None if they are not one any more."""
    nodes = parameters.frozen_nodes()
    try:
        return LinearSchedule(nodes=nodes, weights=parameters.frozen_weights(nodes), first=parameters.first)
    except ValueError:
        return None


def jitter(parameters: Parameters, width: float, generator: torch.Generator) -> None:
    """Add noise to all free numbers."""
    if width:
        with torch.no_grad():
            for p in parameters.parameters():
                if p.requires_grad:
                    p += width * torch.randn(p.shape, generator=generator, dtype=p.dtype)
