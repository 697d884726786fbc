"""Multistep exponential integrators as solver schedules: the general one, DPM-Solver, DEIS, UniPC and flows.

All of them extrapolate a prediction from its values at earlier nodes. They differ in what they extrapolate,
in how the first derivative is scaled, and in whether a step is corrected once its end has been evaluated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from thalweg.diffusion.solvers.compile import compile_schedule
from thalweg.diffusion.solvers.linear import LinearSchedule
from thalweg.diffusion.solvers.schedule import (
    Corrector,
    Derivative,
    Node,
    Prediction,
    Scale,
    SolverSchedule,
    Step,
    multistep,
)
from thalweg.diffusion.solvers.table import linear

SolverType = Literal["midpoint", "heun"]
Variant = Literal["bh1", "bh2", "vary"]

PLAIN = Scale()
"""No scaling: the Taylor form."""
SOLVER_TYPES: dict[str, Scale] = {"midpoint": Scale(kind="bh2"), "heun": PLAIN}
"""Scaling of the first derivative at order 2: the choice of DPM-Solver, and the plain Taylor form."""
VARIANTS: dict[str, Scale] = {"bh1": Scale(kind="bh1"), "bh2": Scale(kind="bh2"), "vary": PLAIN}
"""Scalings of UniPC, where order 2 leaves one free."""
LEAST_ALPHA = 1e-6
"""What stands for alpha = 0 where lambda must be finite."""
SHORT = 15
"""Below this many steps DPM-Solver and DEIS end on lower orders, as published."""


def step_orders(steps: int, order: int, lower_order_final: bool) -> list[int]:
    """Order of every step: as many terms as the history allows, falling to 1 at the end on request."""
    return [min(order, i + 1, steps - i if lower_order_final else order) for i in range(steps)]


def choose(name: str, value: object, allowed: Sequence[object]) -> None:
    """Refuse what is not among the allowed values.

    Raises:
        ValueError: It is not.
    """
    if value not in allowed or isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}, allowed: {', '.join(map(str, allowed))}")


def last_step(nodes: Sequence[Node], i: int, prediction: Prediction) -> Step | None:
    """The only step that reaches sigma = 0 (lambda = infinity): its result is the data prediction."""
    if prediction == "velocity" or nodes[i + 1].sigma > 0:
        return None
    return Step(start=i, prediction="data", order=1)


def lift_start(nodes: Sequence[Node]) -> tuple[Node, ...]:
    """The nodes, with alpha = 1e-6 at a first node where it is 0, and sigma less by the same part.

    Where lambda starts at minus infinity, a correction of the first step has no finite form for every
    scaling; diffusers moves the node as well.
    """
    first = nodes[0]
    if first.alpha > 0:
        return tuple(nodes)
    return (replace(first, alpha=LEAST_ALPHA, sigma=first.sigma * (1 - LEAST_ALPHA)), *nodes[1:])


def adams(
    nodes: Sequence[Node],
    *,
    prediction: Prediction = "data",
    order: int = 3,
    scale: Scale = PLAIN,
    corrector: bool = False,
    corrector_scale: Scale = PLAIN,
    low_order: bool = False,
    lower_order_final: bool = False,
) -> SolverSchedule:
    """Exponential Adams-Bashforth(-Moulton) method of order 1 to 4.

    Args:
        nodes: Where the network is evaluated, and the result.
        prediction: What is extrapolated: noise, data or velocity (rectified flow).
        order: Taylor order; the first steps take what their history allows, which caps the order of the whole
            at 2, or at 3 with the corrector.
        scale: Factor of the first derivative in steps of order 2.
        corrector: Correct every step but the last with the prediction at its end, one order higher.
        corrector_scale: Factor of the first derivative in the corrector of steps of order 1.
        low_order: Estimate the first derivative from the nearest node only; order 2 at most.
        lower_order_final: Fall to order 1 at the end.

    Raises:
        ValueError: For an order or prediction that is not there.
    """
    choose("prediction", prediction, ("noise", "data", "velocity"))
    choose("order", order, (1, 2, 3, 4))
    steps = []
    for i, n in enumerate(step_orders(len(nodes) - 1, order, lower_order_final)):
        derivatives = _scaled(multistep(n, i), scale if n == 2 else PLAIN)
        if low_order and n > 2:
            derivatives = (Derivative(k=1, nodes=derivatives[0].nodes[:1]), *derivatives[1:])
        step = Step(start=i, prediction=prediction, order=n, derivatives=derivatives)
        # Nothing is learnt about a step from lambda = -infinity, whose derivatives have no weight.
        if corrector and i < len(nodes) - 2 and (nodes[i].alpha > 0 or prediction == "velocity"):
            step = replace(step, corrector=_corrector(i, n, corrector_scale if n == 1 else PLAIN))
        steps.append(last_step(nodes, i, prediction) or step)
    return SolverSchedule(nodes=tuple(nodes), steps=tuple(steps))


def _scaled(derivatives: Sequence[Derivative], scale: Scale) -> tuple[Derivative, ...]:
    return tuple(replace(d, scale=scale) if d.k == 1 else d for d in derivatives)


def _corrector(i: int, order: int, scale: Scale) -> Corrector:
    """One order more than the step, with its end as a further node."""
    nodes = (i + 1, *range(i - 1, i - order, -1))
    derivatives = [Derivative(k=k, nodes=nodes) for k in range(1, order + 1)]
    return Corrector(order=order + 1, derivatives=_scaled(derivatives, scale))


def _dpm(
    nodes: Sequence[Node],
    prediction: Prediction,
    order: int,
    solver_type: SolverType,
    lower_order_final: bool | None,
    compat: Literal["diffusers"] | None,
) -> SolverSchedule | LinearSchedule:
    choose("order", order, (1, 2, 3))
    choose("solver_type", solver_type, tuple(SOLVER_TYPES))
    choose("compat", compat, (None, "diffusers"))
    final = len(nodes) - 1 < SHORT if lower_order_final is None else lower_order_final
    scale = SOLVER_TYPES[solver_type]
    schedule = adams(nodes, prediction=prediction, order=order, scale=scale, lower_order_final=final)
    if compat is None:
        return schedule
    return linear(nodes, compile_schedule(schedule, second_derivative=0.5))


def dpm(
    nodes: Sequence[Node],
    *,
    order: int = 2,
    solver_type: SolverType = "midpoint",
    lower_order_final: bool | None = None,
    compat: Literal["diffusers"] | None = None,
) -> SolverSchedule | LinearSchedule:
    """Multistep DPM-Solver on noise prediction (Lu et al. 2022, arXiv 2206.00927).

    Args:
        nodes: Where the network is evaluated, and the result.
        order: 1 to 3.
        solver_type: Scaling at order 2; midpoint is the authors' "dpmsolver", heun their "taylor".
        lower_order_final: Fall to order 1 at the end; where not given, below 15 steps.
        compat: "diffusers" halves the second derivative at order 3, as that library does (measured order 2),
            and gives weights, since no decision of a schedule does so.

    Raises:
        ValueError: For an option that is not there.
    """
    return _dpm(nodes, "noise", order, solver_type, lower_order_final, compat)


def dpmpp(
    nodes: Sequence[Node],
    *,
    order: int = 2,
    solver_type: SolverType = "midpoint",
    lower_order_final: bool | None = None,
    compat: Literal["diffusers"] | None = None,
) -> SolverSchedule | LinearSchedule:
    """Multistep DPM-Solver++ on data prediction (Lu et al. 2022, arXiv 2211.01095); arguments as in dpm.

    Raises:
        ValueError: For an option that is not there.
    """
    return _dpm(nodes, "data", order, solver_type, lower_order_final, compat)


def deis(nodes: Sequence[Node], *, order: int = 3, lower_order_final: bool | None = None) -> SolverSchedule:
    """DEIS with polynomials in log rho = -lambda (Zhang & Chen 2023, arXiv 2204.13902), order 1 to 3.

    Args:
        nodes: Where the network is evaluated, and the result.
        order: Number of predictions used.
        lower_order_final: Fall to order 1 at the end; where not given, below 15 steps.

    Raises:
        ValueError: For an order that is not there.
    """
    choose("order", order, (1, 2, 3))
    final = len(nodes) - 1 < SHORT if lower_order_final is None else lower_order_final
    return adams(nodes, prediction="noise", order=order, lower_order_final=final)


def unipc(
    nodes: Sequence[Node],
    *,
    order: int = 2,
    variant: Variant = "bh2",
    prediction: Prediction = "data",
    corrector: bool = True,
    lower_order_final: bool = True,
) -> SolverSchedule:
    """UniPC (Zhao et al. 2023, arXiv 2302.04867), order 1 to 3; without the corrector it is UniP.

    With the corrector a first node with alpha = 0 is moved, see lift_start.

    Args:
        nodes: Where the network is evaluated, and the result.
        order: Order of the predictor.
        variant: The function B(h), which acts where one derivative is used; vary takes the exact weights.
        prediction: noise or data.
        corrector: Correct every step but the last.
        lower_order_final: Fall to order 1 at the end.

    Raises:
        ValueError: For an option that is not there.
    """
    choose("order", order, (1, 2, 3))
    choose("variant", variant, tuple(VARIANTS))
    choose("prediction", prediction, ("noise", "data"))
    return adams(
        lift_start(nodes) if corrector else nodes,
        prediction=prediction,
        order=order,
        scale=VARIANTS[variant],
        corrector=corrector,
        corrector_scale=VARIANTS[variant],
        lower_order_final=lower_order_final,
    )


def unip(
    nodes: Sequence[Node],
    *,
    order: int = 2,
    variant: Variant = "bh2",
    prediction: Prediction = "data",
    lower_order_final: bool = True,
) -> SolverSchedule:
    """UniP, the predictor of UniPC; arguments as there.

    Raises:
        ValueError: For an option that is not there.
    """
    return unipc(
        nodes,
        order=order,
        variant=variant,
        prediction=prediction,
        corrector=False,
        lower_order_final=lower_order_final,
    )


def ddim(nodes: Sequence[Node]) -> SolverSchedule:
    """DDIM (Song et al. 2021, arXiv 2010.02502); Euler's method in rho = sigma / alpha is the same."""
    return adams(nodes, order=1)


def flow_euler(nodes: Sequence[Node]) -> SolverSchedule:
    """Euler's method on the velocity of a rectified flow; its coefficients are those of DDIM."""
    return adams(nodes, prediction="velocity", order=1)


def flow_adams(nodes: Sequence[Node], *, order: int = 2, lower_order_final: bool = False) -> SolverSchedule:
    """Adams-Bashforth in t on the velocity of a rectified flow, order 1 to 4.

    Raises:
        ValueError: For an order that is not there.
    """
    return adams(nodes, prediction="velocity", order=order, lower_order_final=lower_order_final)
