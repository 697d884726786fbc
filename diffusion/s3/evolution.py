"""Multi-stage search as ask and tell: sample, evaluate truly, train the predictor, evolve on the predictor.

The state is plain JSON: an archive of candidates with their scores, and the random state. Whoever evaluates
tells scores in any order; a search that is killed goes on from its file and ends as it would have.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from thalweg.checkpoints.atomic import write_text
from thalweg.diffusion.s3.genes import Genes
from thalweg.diffusion.s3.objective import Score
from thalweg.diffusion.s3.space import SearchSpace
from thalweg.diffusion.solvers.schedule import SolverSchedule

Guess = Callable[[Sequence[SolverSchedule]], tuple[np.ndarray, np.ndarray]]
"""Predicted scores and their uncertainty, lower is better."""
Train = Callable[[Sequence[SolverSchedule], Sequence[Score]], Guess]
"""Makes a guess from everything that has been evaluated."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvolutionConfig:
    """Settings of a search."""

    seed: int = 0
    """Seed of all its choices."""
    num_random: int = 64
    """Random candidates beside the known solvers in the first round."""
    num_seeds: int = 128
    """Known solvers on plain grids in the first round, at most."""
    batch: int = 64
    """Candidates of each later round."""
    parents: int = 24
    """How many of the best have children."""
    crossover: float = 0.3
    """Part of the children with two parents."""
    width: float = 0.4
    """Width of mutations in the second round."""
    shrink: float = 0.85
    """Factor of the width from round to round."""
    min_width: float = 0.03
    """Smallest width."""
    guided_pool: int = 8
    """With a predictor: candidates bred for each one that is evaluated, per generation."""
    guided_generations: int = 6
    """With a predictor: generations bred on its guesses between rounds."""
    explore: float = 0.1
    """With a predictor: part of a round taken for its uncertainty, not its guess."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """Something to evaluate."""

    number: int
    """Its place in the archive."""
    genes: Genes
    """What it is made of."""


class Evolution:
    """The search.

    Args:
        space: Where to search.
        config: How.
        train: Makes a predictor of the archive; None for plain evolution.
    """

    def __init__(self, space: SearchSpace, config: EvolutionConfig, train: Train | None = None) -> None:
        self.space = space
        self.config = config
        self.train = train
        self.rng = np.random.default_rng(config.seed)
        self.archive: list[Genes] = []
        self.scores: dict[int, Score] = {}
        self.round = 0

    def ask(self) -> list[Candidate]:
        """Candidates that wait for a score; a new round once all have one."""
        waiting = [n for n in range(len(self.archive)) if n not in self.scores]
        if not waiting:
            fresh = self._first() if self.round == 0 else self._next()
            waiting = list(range(len(self.archive), len(self.archive) + len(fresh)))
            self.archive += fresh
            self.round += 1
        return [Candidate(number=n, genes=self.archive[n]) for n in waiting]

    def tell(self, scores: Mapping[int, Score]) -> None:
        """Scores by candidate number.

        Raises:
            ValueError: For a candidate that was never asked for.
        """
        for number, score in scores.items():
            if not 0 <= number < len(self.archive):
                raise ValueError(f"candidate {number} was never asked for; there are {len(self.archive)}")
            self.scores[number] = score

    def best(self, count: int = 1) -> list[tuple[Genes, Score]]:
        """The best so far, best first."""
        order = sorted(self.scores, key=lambda n: (self.scores[n].value, n))[:count]
        return [(self.archive[n], self.scores[n]) for n in order]

    def _first(self) -> list[Genes]:
        seeds = self.space.seeds()
        if len(seeds) > self.config.num_seeds:
            picks = np.sort(self.rng.choice(len(seeds), self.config.num_seeds, replace=False))
            seeds = [seeds[i] for i in picks]
        return _distinct([*seeds, *(self.space.random(self.rng) for _ in range(self.config.num_random))], [])

    def _width(self) -> float:
        return max(self.config.width * self.config.shrink ** (self.round - 1), self.config.min_width)

    def _children(self, parents: Sequence[Genes], count: int) -> list[Genes]:
        found = []
        for _ in range(count):
            # Better parents more often: the smaller of two draws.
            first, second = (parents[int(self.rng.integers(0, len(parents), 2).min())] for _ in range(2))
            if self.rng.random() < self.config.crossover:
                first = self.space.crossover(first, second, self.rng)
            found.append(self.space.mutate(first, self.rng, self._width()))
        return found

    def _next(self) -> list[Genes]:
        parents = [genes for genes, _ in self.best(self.config.parents)]
        if self.train is None:
            return _distinct(self._children(parents, self.config.batch), self.archive)
        numbers = sorted(self.scores)
        schedules = [self.space.schedule(self.archive[n]) for n in numbers]
        guess = self.train(schedules, [self.scores[n] for n in numbers])
        return self._guided(parents, guess)

    def _guided(self, parents: list[Genes], guess: Guess) -> list[Genes]:
        """Breed on the guesses; take the best guesses and a few of the least certain."""
        pool: list[Genes] = []
        for _ in range(self.config.guided_generations):
            children = self._children(parents, self.config.guided_pool * self.config.batch // 2)
            pool = _distinct([*pool, *children], self.archive)
            means, _ = guess([self.space.schedule(genes) for genes in pool])
            order = np.argsort(means, kind="stable")
            pool = [pool[i] for i in order[: self.config.guided_pool * self.config.batch]]
            parents = pool[: self.config.parents]
        means, spreads = guess([self.space.schedule(genes) for genes in pool])
        count = min(self.config.batch, len(pool))
        unsure = round(self.config.explore * count)
        picks = np.argsort(means, kind="stable")[: count - unsure].tolist()
        hopeful = np.argsort(means - 2 * spreads, kind="stable").tolist()
        picks += [i for i in hopeful if i not in set(picks)][:unsure]
        return [pool[i] for i in picks]

    def state_dict(self) -> dict[str, Any]:
        """The search as plain JSON values."""
        return {
            "round": self.round,
            "random": self.rng.bit_generator.state,
            "archive": [genes.to_dict() for genes in self.archive],
            "scores": {str(n): asdict(score) for n, score in sorted(self.scores.items())},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.round = state["round"]
        self.rng.bit_generator.state = state["random"]
        self.archive = [Genes.from_dict(genes) for genes in state["archive"]]
        self.scores = {int(n): Score(**score) for n, score in state["scores"].items()}

    def save(self, path: str | Path) -> None:
        """Write the state, whole or not at all."""
        write_text(Path(path), json.dumps(self.state_dict()))

    def load(self, path: str | Path) -> None:
        """Read a state."""
        self.load_state_dict(json.loads(Path(path).read_text()))


def _distinct(genes: Sequence[Genes], known: Sequence[Genes]) -> list[Genes]:
    """Candidates in their order, without those known and without repeats."""
    seen = set(known)
    return [g for g in genes if not (g in seen or seen.add(g))]  # type: ignore[func-returns-value]
