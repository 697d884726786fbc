"""``thalweg data generate``: make a data set with our solvers, in the published layout."""

from __future__ import annotations

from typing import Any

from thalweg.pde.solvers.generate import generate as run


def generate(name: str, out: str = "data", samples: int = 64, **options: Any) -> None:
    """Generate a PDE data set with our solvers, in the published layout.

    Sample i depends on the seed and i alone: batch size, workers and restarts do not change it, and a larger
    set starts with the samples of a smaller one. A run that was stopped, by Ctrl-C, kill -9 or a full disk,
    continues when the same command is given again.

    Args:
        name: Data set: NS-Sines, NS-Gauss, NS-PwC, NS-Tracer-PwC, NS-BB, NS-SL, NS-SVS, FNS-KF, CE-RP,
            CE-CRP, CE-KH, CE-Gauss, CE-RPUI, CE-RM, GCE-RT, Wave-Gauss, Wave-Layer, ACE, Poisson-Gauss or
            Helmholtz.
        out: Folder for the file, which gets the published file name.
        samples: Number of trajectories, or of samples of a steady problem.
        options: Options of the solver, which the command line takes from its signature.
    """
    print(run(name, out, samples, **options))
