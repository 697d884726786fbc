"""``thalweg data generate``: make a data set with our solvers, in the published layout."""

from __future__ import annotations

from typing import Literal


def generate(
    name: str,
    out: str = "data",
    samples: int = 64,
    resolution: int = 128,
    seed: int = 0,
    workers: int = 1,
    batch_size: int = 8,
    device: str = "cpu",
    num_val: int | None = None,
    num_test: int | None = None,
    frames: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
    engine: Literal["processes", "dask"] = "processes",
    dtype: Literal["float32", "float64"] = "float32",
) -> None:
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
        resolution: Grid points per axis.
        seed: Seed of the whole set.
        workers: Number of processes.
        batch_size: Samples computed together.
        device: Where the solver runs, e.g. cpu or cuda.
        num_val: Validation samples, noted in the file; a tenth by default.
        num_test: Test samples, noted in the file; a tenth by default.
        frames: Number of snapshots from the start; all published times by default.
        overwrite: Compute again what is already there.
        progress: Show a progress bar.
        engine: processes, or dask for a local or configured dask cluster.
        dtype: Precision of the time stepping.

    Raises:
        ValueError: If an argument is not possible, or what exists was made with other parameters.
        OSError: If the disk is full; finished samples are kept.
        RuntimeError: If a solver blows up or a worker process dies.
    """
    from thalweg.pde.solvers.generate import generate as run

    try:
        path = run(
            name,
            out,
            samples,
            resolution=resolution,
            seed=seed,
            workers=workers,
            batch_size=batch_size,
            device=device,
            num_val=num_val,
            num_test=num_test,
            frames=frames,
            overwrite=overwrite,
            progress=progress,
            engine=engine,
            dtype=dtype,
        )
    except FloatingPointError as error:
        raise RuntimeError(str(error)) from error
    print(path)
