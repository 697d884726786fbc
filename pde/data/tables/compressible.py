"""Compressible Euler sets: periodic Riemann-type problems, Richtmyer-Meshkov, Rayleigh-Taylor, airfoil.

Means and standard deviations are those the released networks were trained with (Herde et al. 2024, PDEgym);
they belong to the published files. The mean pressure of a periodic set is subtracted first (`shift`), so that
all of them share one set of constants. Sets generated here carry constants of their own.
"""

from __future__ import annotations

from dataclasses import replace

from thalweg.pde.problem import Channel, ProblemSpec, Splits, Variable

EQUATION = "rho_t + div(rho u) = 0, (rho u)_t + div(rho u u + p I) = 0, E_t + div((E + p) u) = 0, gamma = 1.4"
NAMES = ("rho", "u", "v", "p")
GROUPS = (("rho",), ("u", "v"), ("p",))
DIMS = ("sample", "time", "channel", "x", "y")


def flow(
    variable: str, means: tuple[float, ...], stds: tuple[float, ...], pressure: float = 0.0
) -> tuple[Channel, ...]:
    """Channels (rho, u, v, p), the first four of `variable`; `pressure` is subtracted from p first."""
    channels = tuple(
        Channel(name=name, variable=variable, index=index, mean=mean, std=std)
        for index, (name, mean, std) in enumerate(zip(NAMES, means, stds))
    )
    return (*channels[:3], replace(channels[3], shift=pressure))


def periodic(
    name: str, reference: str, summary: str, *, pressure: float, pretraining: bool = True
) -> ProblemSpec:
    """One row: 21 snapshots on the unit square, t = 0, 0.05, ..., 1."""
    channels = flow("data", (0.80, 0.0, 0.0, 0.0), (0.31, 0.391, 0.356, 0.185), pressure)
    return ProblemSpec(
        name=name,
        aliases=(f"fluids.compressible.{reference}",),
        summary=summary,
        equation=EQUATION,
        boundary="periodic",
        file=f"{name}.nc",
        variables=(Variable(name="data", dims=DIMS, shape=(10000, 21, 5, 128, 128)),),
        inputs=channels,
        outputs=channels,
        groups=GROUPS,
        splits=Splits(total=10000, val=120, test=240),
        frames=21,
        time_step=0.05,
        time_scale=20.0,
        grid="cells",
        pretraining=pretraining,
    )


_RICHTMYER_MESHKOV = flow(
    "solution",
    (1.1964245, -7.164812e-06, 2.8968952e-06, 1.5648036),
    (0.5543239, 0.24304213, 0.2430597, 0.89639103),
)
_RAYLEIGH_TAYLOR = (
    *flow(
        "solution",
        (0.8970493, 4.0316996e-13, -1.3858967e-13, 0.7133829),
        (0.12857835, 0.014896976, 0.014896975, 0.21293919),
    ),
    # Component 4 of the file is a tracer that the published task leaves out.
    Channel(name="g", variable="solution", index=5, role="static", mean=-1.7055787, std=0.40131348),
)


def airfoil(suffix: str) -> ProblemSpec:
    """The steady flow around an airfoil: shape indicator in, density out."""
    return ProblemSpec(
        name=f"SE-AF{suffix}",
        aliases=(f"fluids.compressible.steady.Airfoil{suffix}",),
        summary="Steady flow around an airfoil: the shape's indicator to the density",
        equation="div(rho u) = 0, div(rho u u + p I) = 0, div((E + p) u) = 0",
        boundary="slip wall on the airfoil, far field outside",
        file="SE-AF.nc",
        variables=(
            Variable(name="solution", dims=("sample", "channel", "x", "y"), shape=(10869, 2, 128, 128)),
        ),
        inputs=(Channel(name="mask", variable="solution", index=0, role="static"),),
        outputs=(Channel(name="rho", variable="solution", index=1, mean=0.92984116, std=0.10864315),),
        groups=(("rho",),),
        splits=Splits(total=10869, val=120, test=240),
        frames=1,
        time_scale=1.0,
        max_num_time_steps=1,
        time_step_size=1,
        grid="cells",
        steady=True,
        conditioned=suffix == ".time",
        mask_rule="input_is_one",
    )


TABLE = (
    periodic("CE-RP", "Riemann", "Riemann problem with four quadrants", pressure=0.215),
    periodic("CE-CRP", "RiemannCurved", "Riemann problem with curved interfaces", pressure=0.553),
    periodic("CE-KH", "KelvinHelmholtz", "Kelvin-Helmholtz instability", pressure=1.0),
    periodic("CE-Gauss", "Gaussians", "Euler flow started from Gaussian vortices", pressure=2.513),
    periodic(
        "CE-RPUI",
        "RiemannKelvinHelmholtz",
        "Riemann problem with uncertain interfaces",
        pressure=1.33,
        pretraining=False,
    ),
    ProblemSpec(
        name="CE-RM",
        aliases=("fluids.compressible.RichtmyerMeshkov",),
        summary="Richtmyer-Meshkov instability",
        equation=EQUATION,
        boundary="periodic",
        file="CE-RM.nc",
        variables=(Variable(name="solution", dims=DIMS, shape=(1260, 21, 5, 128, 128)),),
        inputs=_RICHTMYER_MESHKOV,
        outputs=_RICHTMYER_MESHKOV,
        groups=GROUPS,
        splits=Splits(total=1260, val=100, test=130),
        frames=21,
        time_step=0.1,
        time_scale=20.0,
        grid="cells",
    ),
    ProblemSpec(
        name="GCE-RT",
        aliases=("fluids.compressible.gravity.RayleighTaylor",),
        summary="Rayleigh-Taylor instability of a self-gravitating polytrope",
        equation="rho_t + div(rho u) = 0, (rho u)_t + div(rho u u + p I) = -rho grad g, "
        "E_t + div((E + p) u) = -rho u . grad g, gamma = 2",
        boundary="hydrostatic",
        file="GCE-RT.nc",
        variables=(Variable(name="solution", dims=DIMS, shape=(1260, 11, 6, 128, 128)),),
        inputs=_RAYLEIGH_TAYLOR,
        outputs=_RAYLEIGH_TAYLOR,
        groups=(*GROUPS, ("g",)),
        splits=Splits(total=1260, val=100, test=130),
        frames=11,
        time_step=0.5,
        time_scale=10.0,
        max_num_time_steps=7,
        time_step_size=1,
        domain=((-0.5, 0.5), (-0.5, 0.5)),
        grid="cells",
    ),
    airfoil(""),
    airfoil(".time"),
)
"""Four pretraining sets, four downstream sets and the airfoil's conditioned variant."""
