"""Known solvers on known grids, for the first round of a search."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from thalweg.diffusion.s3.fit import Path
from thalweg.diffusion.s3.genes import Genes
from thalweg.diffusion.s3.space import SearchSpace
from thalweg.diffusion.schedules import Flow
from thalweg.diffusion.solvers.dp import Teacher, cheapest_path, step_costs
from thalweg.diffusion.solvers.grids import nodes


def grid_seeds(space: SearchSpace, names: Sequence[str] = ("dmn", "ays", "shift")) -> list[Genes]:
    """The known solvers of a space on grids that need more than a formula, or that are made for some models.

    Args:
        space: The space; its range of last times gives the ends.
        names: Names of :data:`thalweg.diffusion.solvers.grids.GRIDS`. ``ays`` is stretched to the schedule,
            ``shift`` is left out where time is not that of a rectified flow.
    """
    found = []
    for name in names:
        if name == "shift" and not isinstance(space.noise, Flow):
            continue
        options = {"stretch": True} if name == "ays" else {}
        for end in np.geomspace(*space.t_end, 2):
            count = space.num_times - 1
            if count < 1:
                continue
            grid = nodes(space.noise, count, name, t_end=float(end), end="keep", **options)
            found += space.seeds_on([float(node.t) for node in grid if node.t is not None])
    return list(dict.fromkeys(found))


def gits_seeds(space: SearchSpace, path: Path, gammas: Sequence[float] = (1.0, 1.15, 1.3)) -> list[Genes]:
    """The known solvers of a space on grids that dynamic programming finds on a teacher's path (GITS).

    Args:
        space: The space; grids are brought into its range.
        path: Of a teacher from the first time of the noise schedule.
        gammas: Weights of what is left to do against the step at hand.
    """
    noisy = [i for i, node in enumerate(path.nodes) if node.t is not None and node.t <= space.noise.t_start]
    teacher = Teacher(
        nodes=[path.nodes[i] for i in noisy],
        states=[path.states[i] for i in noisy],
        data=[path.data[i] for i in noisy],
    )
    costs, found = step_costs(teacher), list[Genes]()
    for gamma in gammas:
        picks = cheapest_path(costs, space.num_times - 1, gamma)
        found += space.seeds_on([float(teacher.nodes[i].t or 0.0) for i in picks])
    return list(dict.fromkeys(found))
