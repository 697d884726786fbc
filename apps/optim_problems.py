"""Problems of ``thalweg bench optim``: small, offline, seconds each on one CPU core.

Data and the instance of a problem are the same for every seed; the seed draws initial weights and the order
of the batches, the same for every optimizer. Where parameters are not those of a network they form a matrix,
so that rules for matrices apply.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

Split = Literal["valid", "test"]


@dataclass(frozen=True)
class Task:
    """A problem with weights drawn from one seed."""

    module: nn.Module
    """Owner of the parameters; those that are frozen stay so."""
    loss: Callable[[int], Tensor]
    """Training loss at a step."""
    score: Callable[[Split], float]
    """What is compared at the end, lower is better; lr and decay are chosen by valid, reported is test."""
    rest: tuple[str, ...] = ()
    """Parameters that are no hidden matrices: embeddings and output layers."""


@dataclass(frozen=True)
class Problem:
    """An entry of the ladder."""

    name: str
    summary: str
    score: str
    """What the score is."""
    steps: int
    """Length of the full schedule."""
    make: Callable[[int, int], Task]
    """Task from a number of steps and a seed."""


class Matrix(nn.Module):
    """One matrix of parameters."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(start)


def rotation(n: int, generator: torch.Generator) -> Tensor:
    """Random orthogonal matrix (n, n)."""
    return torch.linalg.qr(torch.randn(n, n, generator=generator)).Q


def batches(count: int, size: int, steps: int, seed: int) -> Tensor:
    """Indices (steps, size) that go through shuffled epochs."""
    generator = torch.Generator().manual_seed(seed)
    epochs = math.ceil(steps * size / count)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(epochs)])
    return order[: steps * size].view(steps, size)


def quadratic(steps: int, seed: int) -> Task:
    """Minimise d^T H d / 2, d = x - x*, over 384 numbers, H with eigenvalues 1 to 1e-4 in a random rotation.

    The optimum x* is as far from 0 as the start is, so that weight decay does not lead there.
    """
    generator = torch.Generator().manual_seed(0)
    q = rotation(384, generator)
    h = (q * torch.logspace(0, -4, 384)) @ q.T
    optimum = torch.randn(384, generator=generator)
    start = torch.randn(16, 24, generator=torch.Generator().manual_seed(seed))
    module = Matrix(start)

    def value(x: Tensor) -> Tensor:
        d = x.flatten() - optimum
        return 0.5 * d @ (h @ d)

    first = float(value(start))

    def score(split: Split) -> float:
        return float(value(module.weight.detach())) / first

    return Task(module, lambda step: value(module.weight), score)


def rosenbrock(steps: int, seed: int) -> Task:
    """Minimise the sum of 100 (x_{i+1} - x_i^2)^2 + (1 - x_i)^2 over a chain of 16 numbers."""
    noise = 0.1 * torch.randn(16, generator=torch.Generator().manual_seed(seed))
    module = Matrix((torch.tensor([-1.2, 1.0]).repeat(8) + noise).view(4, 4))

    def value(x: Tensor) -> Tensor:
        flat = x.flatten()
        return (100.0 * (flat[1:] - flat[:-1] ** 2) ** 2 + (1.0 - flat[:-1]) ** 2).sum()

    return Task(module, lambda step: value(module.weight), lambda split: float(value(module.weight.detach())))


def regression(steps: int, seed: int) -> Task:
    """Linear regression (32 -> 16) in batches of 64; covariance of the features 1 to 1e-4, rotated."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.logspace(0, -2, 32)
    q = rotation(32, generator)
    features = (torch.randn(2048, 32, generator=generator) * spread) @ q.T
    truth = torch.randn(16, 32, generator=generator) / spread.square().sum().sqrt()
    targets = features @ truth.T + 0.1 * torch.randn(2048, 16, generator=generator)
    covariance = (q * spread.square()) @ q.T
    order = batches(2048, 64, steps, seed)
    module = Matrix(0.1 * torch.randn(16, 32, generator=torch.Generator().manual_seed(seed)))

    def loss(step: int) -> Tensor:
        x, y = features[order[step]], targets[order[step]]
        return (x @ module.weight.T - y).square().mean()

    def score(split: Split) -> float:
        error = module.weight.detach() - truth
        return float((error @ covariance * error).sum() / (truth @ covariance * truth).sum())

    return Task(module, loss, score)


def lora(steps: int, seed: int) -> Task:
    """LoRA of rank 4 with B = 0 on both layers of a frozen network that has to become another."""
    from thalweg.apps.optim_networks import LowRank

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1536, 32, generator=generator)

    def gaussian(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) / columns**0.5

    frozen = [gaussian(64, 32), gaussian(16, 64)]
    moved = [w + gaussian(len(w), 4) @ gaussian(4, w.shape[1]) for w in frozen]
    gelu = nn.functional.gelu
    y = gelu(x @ moved[0].T) @ moved[1].T
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = nn.Sequential(LowRank(frozen[0], 4), nn.GELU(), LowRank(frozen[1], 4))
    variance = float(y.var())
    order = batches(1024, 64, steps, seed)
    parts = {"valid": slice(1024, 1280), "test": slice(1280, None)}

    def loss(step: int) -> Tensor:
        return (module(x[order[step]]) - y[order[step]]).square().mean()

    @torch.no_grad()
    def score(split: Split) -> float:
        part = parts[split]
        return float((module(x[part]) - y[part]).square().mean()) / variance

    return Task(module, loss, score)


def classify(
    network: Callable[[], nn.Module], images: Callable[[], tuple[Tensor, Tensor]], rest: tuple[str, ...]
) -> Callable[[int, int], Task]:
    """Cross-entropy of a network on labelled images: 70 % train it, 15 % choose, 15 % report."""

    def make(steps: int, seed: int) -> Task:
        x, labels = images()
        train, valid = int(0.7 * len(x)), int(0.85 * len(x))
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            module = network()
        order = batches(train, 64, steps, seed)
        parts = {"valid": slice(train, valid), "test": slice(valid, None)}
        entropy = nn.functional.cross_entropy

        def loss(step: int) -> Tensor:
            return entropy(module(x[order[step]]), labels[order[step]])

        @torch.no_grad()
        def score(split: Split) -> float:
            return float(entropy(module(x[parts[split]]), labels[parts[split]]))

        return Task(module, loss, score, rest)

    return make


def mlp() -> nn.Module:
    """64 - 128 - 128 - 10."""
    layers = [nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 10)]
    return nn.Sequential(*layers)


def cnn() -> nn.Module:
    """Two convolutions of stride 2 on 16 x 16 pixels, and a linear layer."""
    convolutions = [nn.Conv2d(1, 16, 3, 2, 1), nn.GELU(), nn.Conv2d(16, 32, 3, 2, 1), nn.GELU()]
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(512, 10))


@functools.cache
def labelled(name: str, size: int, flat: bool) -> tuple[Tensor, Tensor]:
    """Images of a packaged set in fixed random order, standardised, (N, 1, H, W) or (N, H W), and labels."""
    from thalweg.diffusion.images import open_images

    found = open_images(name, size=size, channels=1)
    images, labels = found.images_NCHW.float(), torch.tensor(found.labels)  # type: ignore[attr-defined]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x = (images[order] - images.mean()) / images.std()
    return (x.flatten(1) if flat else x), labels[order]


def scot(steps: int, seed: int) -> Task:
    """A tiny scOT that maps sources to solutions of a Poisson problem on 16 x 16 points."""
    from thalweg.apps.optim_networks import poisson_data, tiny_scot

    x, y = poisson_data()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = tiny_scot()
    order = batches(160, 16, steps, seed)
    parts = {"valid": slice(160, 208), "test": slice(208, None)}
    ends = ("embeddings", "patch_recovery")
    rest = tuple(name for name, _ in module.named_parameters() if name.startswith(ends))

    def loss(step: int) -> Tensor:
        found: Tensor = module(x[order[step]], None, labels=y[order[step]]).loss
        return found

    @torch.no_grad()
    def score(split: Split) -> float:
        module.eval()
        error = module(x[parts[split]], None).output - y[parts[split]]
        module.train()
        return float(error.abs().mean() / y[parts[split]].abs().mean())

    return Task(module, loss, score, rest)


def _register(*problems: Problem) -> dict[str, Problem]:
    return {problem.name: problem for problem in problems}


PROBLEMS = _register(
    Problem("quadratic", "384 numbers, condition 1e4, rotated", "loss / first loss", 300, quadratic),
    Problem("rosenbrock", "chain of 16 numbers", "loss", 400, rosenbrock),
    Problem(
        "regression", "linear, features of condition 1e4, batches", "excess risk, relative", 300, regression
    ),
    Problem(
        "digits-mlp",
        "perceptron on the digits of scikit-learn",
        "test cross-entropy",
        240,
        classify(mlp, functools.partial(labelled, "digits", 8, True), ("4.weight", "4.bias")),
    ),
    Problem(
        "mnist-cnn",
        "two convolutions on 5000 images of MNIST",
        "test cross-entropy",
        160,
        classify(cnn, functools.partial(labelled, "mnist5k", 16, False), ("5.weight", "5.bias")),
    ),
    Problem("scot-poisson", "tiny scOT on generated Poisson problems", "relative L1 error", 120, scot),
    Problem("lora", "LoRA with B = 0 on a frozen network", "error / variance", 240, lora),
)
"""The ladder, by name."""
