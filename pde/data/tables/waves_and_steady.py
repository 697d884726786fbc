"""Wave, Allen-Cahn, Poisson and Helmholtz sets.

Means and standard deviations are those the released networks were trained with (Herde et al. 2024, PDEgym);
they belong to the published files. Sets generated here carry constants of their own.
"""

from __future__ import annotations

from thalweg.pde.problem import Channel, ProblemSpec, Splits, Variable


def wave(
    name: str,
    reference: str,
    summary: str,
    *,
    frames: int,
    solution: tuple[float, float],
    speed: tuple[float, float],
) -> ProblemSpec:
    """One row: the field u and the wave speed c, whose (mean, std) are `solution` and `speed`.

    The physical time of the published snapshots is not documented; they are taken to span one unit.
    """
    channels = (
        Channel(name="u", variable="solution", mean=solution[0], std=solution[1]),
        Channel(name="c", variable="c", role="static", units="m/s", mean=speed[0], std=speed[1]),
    )
    return ProblemSpec(
        name=name,
        aliases=(f"wave.{reference}",),
        summary=summary,
        equation="u_tt = c(x)^2 Lap u",
        boundary="absorbing",
        file=f"{name}.nc",
        variables=(
            Variable(name="solution", dims=("sample", "time", "x", "y"), shape=(10512, frames, 128, 128)),
            Variable(name="c", dims=("sample", "x", "y"), shape=(10512, 128, 128)),
        ),
        inputs=channels,
        outputs=channels,
        groups=(("u",), ("c",)),
        splits=Splits(total=10512, val=60, test=240),
        frames=frames,
        time_step=1.0 / (frames - 1),
        time_scale=float(frames - 1),
        grid="closed",
    )


ALLEN_CAHN = Channel(name="u", variable="solution", mean=0.002484262, std=0.65351176)


def poisson(suffix: str) -> ProblemSpec:
    """Source to solution of the Poisson problem."""
    return ProblemSpec(
        name=f"Poisson-Gauss{suffix}",
        aliases=(f"elliptic.poisson.Gaussians{suffix}",),
        summary="Poisson problem with Gaussian sources: source to solution",
        equation="-Lap u = f",
        boundary="dirichlet",
        file="Poisson-Gauss.nc",
        variables=tuple(
            Variable(name=name, dims=("sample", "x", "y"), shape=(20000, 128, 128))
            for name in ("source", "solution")
        ),
        inputs=(
            Channel(
                name="f",
                variable="source",
                role="static",
                mean=0.014822142414492256,
                std=4.755138816607612,
            ),
        ),
        outputs=(
            Channel(name="u", variable="solution", mean=0.0005603458434937093, std=0.02401226126952699),
        ),
        groups=(("u",),),
        splits=Splits(total=20000, val=120, test=240),
        frames=1,
        time_scale=1.0,
        max_num_time_steps=1,
        time_step_size=1,
        grid="closed",
        steady=True,
        conditioned=suffix == ".time",
    )


def helmholtz(suffix: str) -> ProblemSpec:
    """Coefficient and boundary value to solution of the Helmholtz problem."""
    return ProblemSpec(
        name=f"Helmholtz{suffix}",
        aliases=(f"elliptic.Helmholtz{suffix}",),
        summary="Helmholtz problem: coefficient and boundary value to solution",
        equation="-Lap u - omega^2 a(x) u = 0, omega = 5 pi / 2",
        boundary="dirichlet: one value per sample",
        file="Helmholtz.h5",
        layout="helmholtz",
        variables=(
            Variable(name="a", dims=("sample", "x", "y"), shape=(19675, 128, 128)),
            Variable(name="u", dims=("sample", "x", "y"), shape=(19675, 128, 128)),
            Variable(name="bc", dims=("sample",), shape=(19675,)),
        ),
        inputs=(
            Channel(name="a", variable="a", role="static", shift=1.0),
            # A scalar per sample, spread over the plane by the reader.
            Channel(name="b", variable="bc", role="constant"),
        ),
        outputs=(Channel(name="u", variable="u", mean=0.11523915668552, std=0.8279975746000605),),
        groups=(("u",),),
        splits=Splits(total=19675, val=128, test=512),
        frames=1,
        time_scale=1.0,
        max_num_time_steps=1,
        time_step_size=1,
        grid="closed",
        steady=True,
        conditioned=suffix == ".time",
    )


TABLE = (
    wave(
        "Wave-Layer",
        "Layer",
        "Acoustic wave through a layered medium",
        frames=21,
        solution=(0.03467443221585092, 0.10442421752963911),
        speed=(3498.5644380917424, 647.843958567462),
    ),
    # 16 snapshots by the size of the published files, although their card says 15.
    wave(
        "Wave-Gauss",
        "Gaussians",
        "Acoustic wave through a medium with four bumps",
        frames=16,
        solution=(0.0334376316, 0.1171879068),
        speed=(2618.4593933, 601.51658913),
    ),
    ProblemSpec(
        name="ACE",
        aliases=("reaction_diffusion.AllenCahn",),
        summary="Allen-Cahn equation: formation of phases",
        equation="u_t = Lap u - eps^2 u (u^2 - 1), eps = 220",
        boundary="periodic",
        file="ACE.nc",
        variables=(
            Variable(name="solution", dims=("sample", "time", "x", "y"), shape=(15000, 20, 128, 128)),
        ),
        inputs=(ALLEN_CAHN,),
        outputs=(ALLEN_CAHN,),
        groups=(("u",),),
        splits=Splits(total=15000, val=60, test=240),
        frames=20,
        time_step=2e-4 / 19,
        time_scale=19.0,
    ),
    poisson(""),
    poisson(".time"),
    helmholtz(""),
    helmholtz(".time"),
)
"""Five downstream sets and two conditioned variants."""
