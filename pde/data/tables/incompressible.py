"""Incompressible Navier-Stokes sets.

Means and standard deviations are those the released networks were trained with (Herde et al. 2024, PDEgym);
they belong to the published files. Sets generated here carry constants of their own.

The density is 1 and the pressure 0 by construction: both are synthesised so that incompressible and
compressible sets share the channels (rho, u, v, p). The pressure is masked, since it is not the physical one.
"""

from __future__ import annotations

from thalweg.pde.problem import Channel, ProblemSpec, Splits, Variable

EQUATION = "u_t + (u . grad) u + grad p = nu Lap u, div u = 0"
GROUPS = (("rho",), ("u", "v"), ("p",))

RHO = Channel(name="rho", formula="1", role="constant", mean=0.80, std=0.31)
PRESSURE = Channel(name="p", formula="0", role="constant", mean=0.0, std=0.185, masked=True)


def flow(
    variable: str, u: tuple[float, float] = (0.0, 0.391), v: tuple[float, float] = (0.0, 0.356)
) -> tuple[Channel, ...]:
    """Channels (rho, u, v, p) with the velocity read from `variable`; pairs are (mean, std)."""
    return (
        RHO,
        Channel(name="u", variable=variable, index=0, mean=u[0], std=u[1]),
        Channel(name="v", variable=variable, index=1, mean=v[0], std=v[1]),
        PRESSURE,
    )


def incompressible(
    name: str,
    reference: str,
    summary: str,
    *,
    file: str | None = None,
    variable: str = "velocity",
    samples: int = 20000,
    components: int = 3,
    extra: tuple[Channel, ...] = (),
    channels: tuple[Channel, ...] | None = None,
    equation: str = EQUATION,
    transpose: bool = False,
    pretraining: bool = False,
    aliases: tuple[str, ...] = (),
) -> ProblemSpec:
    """One row: 21 snapshots of a periodic flow on the unit square, t = 0, 0.05, ..., 1."""
    channels = (channels or flow(variable)) + extra
    return ProblemSpec(
        name=name,
        aliases=(f"fluids.incompressible.{reference}", *aliases),
        summary=summary,
        equation=equation,
        boundary="periodic",
        file=file or f"{name}.nc",
        variables=(
            Variable(
                name=variable,
                dims=("sample", "time", "channel", "x", "y"),
                shape=(samples, 21, components, 128, 128),
            ),
        ),
        inputs=channels,
        outputs=channels,
        groups=GROUPS + tuple((channel.name,) for channel in extra),
        splits=Splits(total=samples, val=120, test=240),
        frames=21,
        time_step=0.05,
        time_scale=20.0,
        transpose=transpose,
        mask_rule="channels",
        pretraining=pretraining,
    )


TABLE = (
    incompressible("NS-Sines", "Sines", "Flow started from a sum of sines", pretraining=True),
    incompressible("NS-Gauss", "Gaussians", "Flow started from 100 Gaussian vortices", pretraining=True),
    incompressible(
        "NS-PwC", "PiecewiseConstants", "Flow started from a vorticity constant on each cell of a coarse grid"
    ),
    incompressible("NS-BB", "BrownianBridge", "Flow started from a Brownian-bridge velocity"),
    # The stored spatial axes of the shear layer are swapped on load; the components are not.
    incompressible(
        "NS-SL", "ShearLayer", "Perturbed double shear layer", samples=40000, components=2, transpose=True
    ),
    incompressible("NS-SVS", "VortexSheet", "Perturbed vortex sheet"),
    incompressible(
        "NS-Tracer-PwC",
        "PiecewiseConstants.tracer",
        "NS-PwC with a passive tracer started as a disk",
        file="NS-PwC.nc",
        equation=EQUATION + ", c_t + u . grad c = kappa Lap c",
        extra=(Channel(name="tracer", variable="velocity", index=2, mean=0.19586183, std=0.37),),
        aliases=("NS-PwC.tracer",),
    ),
    incompressible(
        "FNS-KF",
        "forcing.KolmogorovFlow",
        "Kolmogorov flow: forced Navier-Stokes",
        variable="solution",
        components=2,
        equation="u_t + (u . grad) u + grad p = nu Lap u + g, div u = 0",
        channels=flow("solution", u=(-2.2424793e-13, 0.22017328), v=(4.1510376e-12, 0.22078253)),
        extra=(
            Channel(
                name="g",
                formula="kolmogorov_forcing",
                role="static",
                mean=-1.2996679e-09,
                std=0.0707106739,
            ),
        ),
    ),
)
"""Two pretraining sets and six downstream sets."""
