"""Where a sampler begins: not at pure noise if a few evaluations are spent better further down.

At the first times of a schedule the network can tell little more than the mean of the data. Whoever has few
evaluations may start from pure noise as if it were the state of an earlier time, as the "leading" grids of
diffusers do; what that costs is in the distance to the teacher, which starts where the schedule does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from thalweg.diffusion.s3.pool import Pool
from thalweg.diffusion.s3.space import SearchSpace

STARTS = (1.0, 0.95, 0.9, 0.85, 0.8)
"""Parts of the schedule's first time that are tried."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Starts:
    """How well solvers do from several first times."""

    part: float
    """Part of the schedule's first time from which they do best."""
    errors: dict[str, float]
    """Best score of each part."""
    network_evaluations: int
    """Samples put through the network to find out."""

    def apply(self, space: SearchSpace) -> SearchSpace:
        """A space with the best first time."""
        return replace(space, noise=replace(space.noise, t_start=self.part * space.noise.t_start))


def choose_start(
    space: SearchSpace,
    pool: Pool,
    *,
    starts: tuple[float, ...] = STARTS,
    each: int = 12,
    count: int | None = None,
    seed: int = 0,
) -> tuple[SearchSpace, Starts]:
    """Try known solvers from several first times and keep the space of the best.

    Args:
        space: Where to search.
        pool: Scores candidates.
        starts: Parts of the first time of the noise schedule.
        each: Known solvers to try for each.
        count: Samples to score them on; all by default.
        seed: Seed of the choice of solvers.

    Returns:
        The space with the best first time, and what was found.
    """
    spaces, tasks = {}, []
    for part in starts:
        noise = replace(space.noise, t_start=part * space.noise.t_start)
        spaces[part] = replace(space, noise=noise)
        seeds = spaces[part].seeds()
        rng = np.random.default_rng(seed)  # the same solvers for each, as far as they are valid
        picks = rng.permutation(len(seeds))[:each]
        tasks += [(part, spaces[part].schedule(seeds[i])) for i in picks]
    scores = dict(pool.scores([(i, schedule) for i, (_, schedule) in enumerate(tasks)], count=count))
    best = {part: min(scores[i].value for i, (of, _) in enumerate(tasks) if of == part) for part in starts}
    found = Starts(
        part=min(best, key=lambda part: best[part]),
        errors={f"{part:g}": value for part, value in best.items()},
        network_evaluations=sum(space.nfe * score.count for score in scores.values()),
    )
    return found.apply(space), found
