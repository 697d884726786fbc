"""Multi-stage search as ask and tell: sample, evaluate truly, train the predictor, evolve on the predictor.

The state is plain JSON: an archive of candidates with their scores, and the random state. Whoever evaluates
tells scores in any order; a search that is killed goes on from its file and ends as it would have.

A round may be scored in stages: all of it on few samples, the better part on more. All candidates of a stage
see the same samples. What the predictor thought of a round is compared with its first scores before it learns
them: Kendall's tau of each round tells how good it is on schedules that it has not seen.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from thalweg.checkpoints.atomic import write_text
from thalweg.diffusion.s3.genes import Genes, with_weights
from thalweg.diffusion.s3.guide import Guess, Train, tau_of
from thalweg.diffusion.s3.objective import Score
from thalweg.diffusion.s3.space import SearchSpace
from thalweg.diffusion.solvers.linear import LinearSchedule
from thalweg.diffusion.solvers.schedule import SolverSchedule


@dataclass(frozen=True, kw_only=True, slots=True)
class EvolutionConfig:
    """Settings of a search.

    Raises:
        ValueError: For a number out of range.
    """

    seed: int = 0
    """Seed of all its choices."""
    num_random: int = 64
    """Random candidates beside the known solvers in the first round."""
    num_seeds: int = 128
    """Known solvers on plain grids in the first round, at most."""
    batch: int = 64
    """Candidates of each later round."""
    counts: tuple[int, ...] = ()
    """Samples of the stages of a round, rising; empty: all samples at once."""
    survive: float = 0.5
    """Part of a stage that goes on to the next."""
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
    guided_shrink: float = 0.8
    """With a predictor: factor of the width from generation to generation."""
    explore: float = 0.1
    """With a predictor: part of a round taken for its uncertainty, not its guess."""

    def __post_init__(self) -> None:
        """Check the stages."""
        if list(self.counts) != sorted(set(self.counts)) or any(count < 1 for count in self.counts):
            raise ValueError(f"counts are {self.counts}, allowed: rising numbers of samples")
        if not 0 < self.survive <= 1:
            raise ValueError(f"survive is {self.survive}, allowed: above 0, up to 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """Something to evaluate."""

    number: int
    """Its place in the archive."""
    genes: Genes
    """What it is made of."""
    count: int | None = None
    """Samples to score it on; None for all."""


class Evolution:
    """The search.

    Args:
        space: Where to search.
        config: How.
        train: Makes a predictor of the archive; None for plain evolution.
        seeds: Candidates of the first round beside those of the space, all of which are taken.
    """

    def __init__(
        self,
        space: SearchSpace,
        config: EvolutionConfig,
        train: Train | None = None,
        seeds: Sequence[Genes] = (),
    ) -> None:
        self.space = space
        self.config = config
        self.train = train
        self.seeds = tuple(seeds)
        self.rng = np.random.default_rng(config.seed)
        self.archive: list[Genes] = []
        self.scores: dict[int, Score] = {}
        self.round = 0
        self.stage = 0
        self.alive: list[int] = []
        self.pending: list[int] = []
        self.guesses: list[float] = []
        self.taus: list[float | None] = []
        self.network_evaluations = 0

    def ask(self) -> list[Candidate]:
        """Candidates that wait for a score; a new round once all have one."""
        if not self.pending:
            fresh = self._first() if self.round == 0 else self._next()
            self.alive = list(range(len(self.archive), len(self.archive) + len(fresh)))
            self.pending = list(self.alive)
            self.archive += fresh
            self.round += 1
            self.stage = 0
        count = self.config.counts[self.stage] if self.config.counts else None
        return [Candidate(number=n, genes=self.archive[n], count=count) for n in self.pending]

    def tell(self, scores: Mapping[int, Score]) -> None:
        """Scores by candidate number; those of candidates that do not wait for one are left out.

        Raises:
            ValueError: For a candidate that was never asked for.
        """
        for number, score in scores.items():
            if not 0 <= number < len(self.archive):
                raise ValueError(f"candidate {number} was never asked for; there are {len(self.archive)}")
            if number in self.pending:
                self.pending.remove(number)
                self.scores[number] = score
                self.network_evaluations += self.space.nfe * score.count
                if not self.pending:
                    self._finish_stage()

    def _finish_stage(self) -> None:
        """Note how good the guesses were; send the better part to the next stage."""
        if self.stage == 0:
            values = [self.scores[n].value for n in self.alive]
            self.taus.append(tau_of(self.guesses, values) if self.guesses else None)
            self.guesses = []
        if self.stage + 1 < len(self.config.counts):
            self.stage += 1
            ranked = sorted(self.alive, key=lambda n: (self.scores[n].value, n))
            self.alive = sorted(ranked[: max(1, round(self.config.survive * len(ranked)))])
            self.pending = list(self.alive)

    def ranked(self) -> list[int]:
        """Numbers of those with a score, best first; those scored on the most samples before others."""
        most = max((score.count for score in self.scores.values()), default=0)
        return sorted(self.scores, key=lambda n: (self.scores[n].count < most, self.scores[n].value, n))

    def best(self, count: int = 1) -> list[tuple[Genes, Score]]:
        """The best so far, best first."""
        return [(self.archive[n], self.scores[n]) for n in self.ranked()[:count]]

    def schedule(self, number: int) -> SolverSchedule | LinearSchedule:
        """What a candidate does, with the weights that were fitted when it was scored, if they were."""
        schedule = self.space.schedule(self.archive[number])
        score = self.scores.get(number)
        if score is None or score.weights is None:
            return schedule
        return LinearSchedule(nodes=schedule.nodes, weights=score.weights, info={"weights": "least squares"})

    def fitted(self, count: int) -> list[Genes]:
        """The best with fitted weights as genes with shifts, to go on from in a search of the weights."""
        ranked = [n for n in self.ranked() if self.scores[n].weights is not None][:count]
        return [with_weights(self.archive[n], self.schedule(n)) for n in ranked]

    def _first(self) -> list[Genes]:
        seeds = self.space.seeds()
        if len(seeds) > self.config.num_seeds:
            picks = np.sort(self.rng.choice(len(seeds), self.config.num_seeds, replace=False))
            seeds = [seeds[i] for i in picks]
        wild = [self.space.random(self.rng) for _ in range(self.config.num_random)]
        return _distinct([*self.seeds, *seeds, *wild], ())

    def _width(self) -> float:
        return max(self.config.width * self.config.shrink ** (self.round - 1), self.config.min_width)

    def _children(self, parents: Sequence[Genes], count: int, width: float) -> list[Genes]:
        found = []
        for _ in range(count):
            # Better parents more often: the smaller of two draws.
            first, second = (parents[int(self.rng.integers(0, len(parents), 2).min())] for _ in range(2))
            if self.rng.random() < self.config.crossover:
                first = self.space.crossover(first, second, self.rng)
            found.append(self.space.mutate(first, self.rng, width))
        return found

    def _next(self) -> list[Genes]:
        parents = [genes for genes, _ in self.best(self.config.parents)]
        if self.train is None:
            found = self._children(parents, self.config.batch, self._width())
        else:
            found = self._guided(parents)
        return _distinct(found, self.archive) or [self.space.random(self.rng)]

    def _guided(self, parents: list[Genes]) -> list[Genes]:
        """Breed on the guesses; take the best guesses and a few of the least certain."""
        assert self.train is not None
        numbers = sorted(self.scores)
        schedules = [self.space.schedule(self.archive[n]) for n in numbers]
        guess = self.train(schedules, [self.scores[n] for n in numbers])
        pool, values = self._bred(parents, guess)
        means, spreads = values
        count = min(self.config.batch, len(pool))
        unsure = round(self.config.explore * count)
        picks = np.argsort(means, kind="stable")[: count - unsure].tolist()
        hopeful = np.argsort(means - 2 * spreads, kind="stable").tolist()
        picks += [i for i in hopeful if i not in set(picks)][:unsure]
        self.guesses = means[picks].tolist()
        return [pool[i] for i in picks]

    def _bred(self, parents: list[Genes], guess: Guess) -> tuple[list[Genes], np.ndarray]:
        """The best by their guesses of some generations; means and spreads of the guesses, (2, B)."""
        size = self.config.guided_pool * self.config.batch
        pool: list[Genes] = []
        values = np.zeros((2, 0))
        for generation in range(self.config.guided_generations):
            width = self._width() * self.config.guided_shrink**generation
            children = _distinct(self._children(parents, size // 2, width), [*self.archive, *pool])
            if children:
                found = np.stack(guess([self.space.schedule(genes) for genes in children]))
                pool, values = pool + children, np.concatenate([values, found], 1)
            order = np.argsort(values[0], kind="stable")[:size]
            pool, values = [pool[i] for i in order], values[:, order]
            parents = pool[: self.config.parents] or parents
        return pool, values

    def state_dict(self) -> dict[str, Any]:
        """The search as plain JSON values."""
        return {
            "round": self.round,
            "stage": self.stage,
            "random": self.rng.bit_generator.state,
            "archive": [genes.to_dict() for genes in self.archive],
            "scores": {str(n): asdict(score) for n, score in sorted(self.scores.items())},
            "alive": list(self.alive),
            "pending": sorted(self.pending),
            "guesses": list(self.guesses),
            "taus": list(self.taus),
            "network_evaluations": self.network_evaluations,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.round, self.stage = state["round"], state["stage"]
        self.rng.bit_generator.state = state["random"]
        self.archive = [Genes.from_dict(genes) for genes in state["archive"]]
        self.scores = {int(n): Score(**score) for n, score in state["scores"].items()}
        self.alive, self.pending = list(state["alive"]), list(state["pending"])
        self.guesses, self.taus = list(state["guesses"]), list(state["taus"])
        self.network_evaluations = state["network_evaluations"]

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
